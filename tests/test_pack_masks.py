"""Maps of parts and heat maps in packs: right, resumable, and what ID-Guard's trainer sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import default_collate

from shields.errors import ConfigError, ImageError, UnknownName, WeightsError
from shields.masks import CLASSES, components, from_labels
from shields.models import load
from shields.models.bisenet import BiSeNet
from shields.models.heatmaps import heat_map
from shields.weights import WeightStore
from tests import cards, tiny
from trainers.data import FacePack
from trainers.draft import Draft
from trainers.idguard_faces import cut_faces, described, photos_of
from trainers.pack import pack
from trainers.pack_masks import drawn_parts

SIZE = 48


def write_pack(path: Path) -> Path:
    landmarks = tiny.landmarks(5, SIZE)
    landmarks[3] = float("nan")
    faces = (tiny.faces_image(5, SIZE) * 255).byte().permute(0, 2, 3, 1).contiguous()
    save_file(
        {"faces": faces, "landmarks": landmarks, "identity": torch.arange(5)},
        path,
        metadata={"identities": json.dumps(list("abcde")), "files": json.dumps(list("abcde"))},
    )
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Five faces, the fourth with damaged landmarks, and a small recognizer and parser."""
    folder = tmp_path_factory.mktemp("networks")
    with tiny.seeded(0):
        cards.save_file_model(
            folder, "small-face", "recognizer", "face-embedder",
            cards.randomised(
                cards.FaceEmbedder(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), dimensions=16), 1
            ),
            "[config]\nwidths = [8, 8, 8, 8]\nblocks = [1, 1, 1, 1]\ndimensions = 16\n",
        )  # fmt: skip
        cards.save_file_model(
            folder, "small-parser", "parser", "bisenet", cards.randomised(BiSeNet(), 2),
            "[config]\nsize = 64\n",
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIELDS_CHECKPOINTS", str(folder))
        yield write_pack(folder / "faces.safetensors")


@pytest.fixture(scope="module")
def whole(packed: Path) -> Path:
    """The same with a drawn map of parts and a heat map."""
    output = packed.with_name("whole.safetensors")
    pack(packed, output, masks="landmarks", heat="grad-cam++:small-face")
    return output


def batch_of(path: Path) -> dict[str, torch.Tensor]:
    faces = FacePack(path, validation=False, share=0.0)
    return default_collate([faces[row] for row in range(len(faces))])


def test_a_drawn_map_gives_the_masks_that_landmarks_give() -> None:
    points = tiny.landmarks(3, SIZE)
    drawn = drawn_parts(points, SIZE).long()
    for names in (["face"], ["id-guard-binary"], ["mouth"], ["nose", "lips", "mouth"]):
        wanted = components(points, (SIZE, SIZE), names)
        assert torch.equal(from_labels(drawn, names), wanted), names


def test_maps_are_added_and_all_else_stays(packed: Path, whole: Path) -> None:
    with safe_open(packed, "pt") as before, safe_open(whole, "pt") as after:
        for name in before.keys():  # noqa: SIM118
            a, b = before.get_tensor(name), after.get_tensor(name)
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
        assert set(after.keys()) - set(before.keys()) == {"parts", "heat:grad-cam++:small-face"}
        assert before.metadata().items() <= after.metadata().items()
        assert json.loads(after.metadata()["classes"]) == list(CLASSES)
        parts, heat = (after.get_tensor(name) for name in ("parts", "heat:grad-cam++:small-face"))
    assert parts.dtype == heat.dtype == torch.uint8
    # The face whose landmarks are damaged has none.
    assert parts.flatten(1).any(dim=1).tolist() == [True, True, True, False, True]
    assert not heat[3].any()


def test_a_heat_map_is_that_of_the_library(packed: Path, whole: Path) -> None:
    batch = batch_of(whole)
    recognizer = load("recognizer", "small-face", store=WeightStore(), device=torch.device("cpu"))
    wanted = heat_map(recognizer, batch["face"].float() / 255, batch["landmarks"])[:, 0]
    kept = batch["heat:grad-cam++:small-face"].float() / 255
    assert (kept - wanted).abs().max() <= 0.5 / 255 + 1e-6
    assert wanted.amax() == 1


def test_a_parser_gives_its_labels(packed: Path) -> None:
    output = packed.with_name("parsed.safetensors")
    pack(packed, output, masks="parser:small-parser")
    batch = batch_of(output)
    parser = load("parser", "small-parser", store=WeightStore(), device=torch.device("cpu"))
    wanted = parser.labels(batch["face"].float() / 255)
    # Rows are parsed in other company here, which moves a logit or two.
    assert (batch["parts"] == wanted).float().mean() > 0.99
    assert len(wanted.unique()) > 1


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"masks": "parser"}, ConfigError),
        ({"masks": "lines"}, ConfigError),
        ({"masks": "source"}, ConfigError),
        ({"heat": "grad-cam++"}, ConfigError),
        ({"heat": "warmth:small-face"}, ConfigError),
        ({"masks": "parser:small-face"}, ConfigError),
        ({"masks": "parser:nobody"}, UnknownName),
        ({"heat": "grad-cam:./none.pth"}, WeightsError),
        ({}, ConfigError),
    ],
)
def test_what_cannot_be_added_is_said_and_nothing_is_left(
    packed: Path, tmp_path: Path, settings: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        pack(packed, tmp_path / "out.safetensors", **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_maps_go_on_where_they_were_interrupted(tmp_path: Path) -> None:
    maps = np.arange(6 * 16, dtype=np.uint8).reshape(6, 4, 4)
    asked: list[int] = []

    def make(start: int, stop: int) -> Iterator[np.ndarray]:
        for row in range(start, stop):
            if row == 3 and len(asked) < 4:
                asked.append(row)
                raise KeyboardInterrupt
            asked.append(row)
            yield maps[row : row + 1]

    with pytest.raises(KeyboardInterrupt), Draft(tmp_path / "out", {}, 4) as draft:
        draft.layer("heat:a/b", 4, 6, make)
    with (tmp_path / "out.part" / "layer-heat-a-b").open("ab") as stream:
        stream.write(b"half")
    draft = Draft(tmp_path / "out", {}, 4)
    assert torch.equal(draft.layer("heat:a/b", 4, 6, make), torch.from_numpy(maps))
    assert asked == [0, 1, 2, 3, 3, 4, 5]


class TestTraining:
    def photos(self, batch: dict[str, torch.Tensor], heat: str, seed: int, size: int = SIZE):
        recognizer = load(
            "recognizer", "small-face", store=WeightStore(), device=torch.device("cpu")
        )
        rng = torch.Generator().manual_seed(seed)
        photos = photos_of(batch, size, (0.7, 0.9), recognizer, heat, rng=rng)  # type: ignore[arg-type]
        return photos, recognizer, int(torch.randint(1000, (), generator=rng))

    @pytest.mark.parametrize("seed", range(4))
    def test_crops_are_those_of_cut_faces(self, whole: Path, seed: int) -> None:
        batch = batch_of(whole)
        photos, _, after = self.photos(batch, "none", seed)
        rng = torch.Generator().manual_seed(seed)
        face, points = cut_faces(batch, SIZE, (0.7, 0.9), rng)
        assert torch.equal(photos.face, face)
        assert torch.equal(photos.landmarks, points)
        assert int(torch.randint(1000, (), generator=rng)) == after

    @pytest.mark.parametrize("seed", range(4))
    def test_masks_of_the_pack_lie_where_drawn_ones_would(
        self, packed: Path, whole: Path, seed: int
    ) -> None:
        """Mirrored windows among them: the seeds draw both."""
        kept, recognizer, _ = self.photos(batch_of(whole), "grad-cam++", seed)
        plain = batch_of(packed)
        fresh, _, _ = self.photos(plain, "grad-cam++", seed)
        assert set(kept.binary.unique().tolist()) == {0, 1}
        overlap = (kept.binary * fresh.binary).sum() / (kept.binary + fresh.binary).clamp(
            0, 1
        ).sum()
        assert overlap > 0.85
        assert kept.heat.shape == fresh.heat.shape
        assert float(kept.heat.amax()) == 1
        assert float(kept.heat.amin()) >= 0
        # Without them, photos are described as before.
        rng = torch.Generator().manual_seed(seed)
        before = described(*cut_faces(plain, SIZE, (0.7, 0.9), rng), recognizer, "grad-cam++")
        assert torch.equal(before.heat, fresh.heat)
        assert torch.equal(before.binary, fresh.binary)

    def test_windows_turn_masks_as_they_turn_faces(self, whole: Path) -> None:
        """A map that is the photo's own brightness stays so in every window."""
        batch = batch_of(whole)
        batch["heat:grad-cam:small-face"] = batch["face"][:, 0]
        for seed in range(6):
            photos, _, _ = self.photos(batch, "grad-cam", seed, 32)
            red = photos.face[:, :1] / photos.face[:, :1].amax(dim=(1, 2, 3), keepdim=True)
            torch.testing.assert_close(photos.heat, red, atol=1e-5, rtol=0)

    def test_a_heat_map_of_another_network_is_not_taken(self, whole: Path, packed: Path) -> None:
        batch = batch_of(whole)
        batch["heat:grad-cam++:somebody"] = batch.pop("heat:grad-cam++:small-face") * 0
        photos, _, _ = self.photos(batch, "grad-cam++", 0)
        assert float(photos.heat.amax()) > 0


def test_a_pack_that_numbers_parts_otherwise_is_refused(whole: Path, tmp_path: Path) -> None:
    with safe_open(whole, "pt") as archive:
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        notes = archive.metadata() | {"classes": json.dumps(["skin", "background"])}
    save_file(tensors, tmp_path / "odd.safetensors", metadata=notes)
    with pytest.raises(ImageError, match="numbers the parts"):
        FacePack(tmp_path / "odd.safetensors", validation=False)
