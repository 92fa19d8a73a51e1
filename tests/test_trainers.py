"""Trainers on a sliver of data: packing, splitting, learning, resuming, exporting."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import save_file
from skimage.data import astronaut
from typer.testing import CliRunner

from shields.errors import ImageError
from shields.faces import similarity
from shields.models import load
from shields.models.networks import FaceEmbedder, PortraitAutoencoder
from shields.weights import Card, WeightStore
from tests import tiny
from tests.training import PowerCut, trainer
from trainers.cli import app
from trainers.data import FacePack, FacePacks, augment, held_out, jittered_alignment, random_crop
from trainers.export import Recipe, export
from trainers.face_embedder import (
    FaceEmbedderTraining,
    attacked,
    verification_accuracy,
    verification_pairs,
)
from trainers.pack import pack
from trainers.portrait_ae import PortraitAutoencoderTraining

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Twelve smooth faces of six people, 128 pixels."""
    path = tmp_path / "faces.safetensors"
    faces = (tiny.faces_image(12, 128) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    save_file(
        {
            "faces": faces.contiguous(),
            "landmarks": tiny.landmarks(12, 128),
            "identity": torch.arange(12) // 2,
        },
        path,
        metadata={"identities": json.dumps([f"person {i}" for i in range(6)]), "skipped": "{}"},
    )
    return path


@pytest.fixture
def teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small networks of ours as teachers, found as a user's own cards would be."""
    folder = tmp_path / "teachers"
    folder.mkdir()
    with tiny.seeded(3):
        autoencoder = PortraitAutoencoder(fine=8, coarse=8, blocks=1)
        embedder = FaceEmbedder(widths=(4, 4, 4, 4), blocks=(1, 1, 1, 1))
    cards = {
        "ae-teacher": (
            "autoencoder", "portrait-ae", autoencoder, "fine = 8\ncoarse = 8\nblocks = 1",
        ),
        "id-teacher": (
            "recognizer", "face-embedder", embedder, "widths = [4, 4, 4, 4]\nblocks = [1, 1, 1, 1]",
        ),
    }  # fmt: skip
    for name, (role, architecture, network, config) in cards.items():
        save_file(network.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.toml").write_text(
            f'name = "{name}"\nrole = "{role}"\narchitecture = "{architecture}"\n'
            f'file = "{name}.safetensors"\n[config]\n{config}\n'
        )
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(folder))
    return folder


def small(kind: str, **settings: object) -> pl.LightningModule:
    pl.seed_everything(0, verbose=False)
    if kind == "portrait-ae":
        return PortraitAutoencoderTraining(
            fine=8, coarse=8, blocks=1, teacher="ae-teacher", crop=32, warmup=1, **settings
        )
    return FaceEmbedderTraining(
        widths=(4, 4, 4, 4),
        blocks=(1, 1, 1, 1),
        teacher="id-teacher",
        warmup=1,
        pairs=4,
        **settings,
    )


def packs(path: Path, **settings: object) -> FacePacks:
    return FacePacks([path], batch=4, share=0.4, **settings)  # type: ignore[arg-type]


KINDS = pytest.mark.parametrize("kind", ["portrait-ae", "face-embedder"])


class TestPack:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        folder = tmp_path / "photos"
        (folder / "Eileen").mkdir(parents=True)
        photo = PILImage.fromarray(astronaut())
        photo.save(folder / "Eileen" / "one.png")
        photo.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT).save(folder / "Eileen" / "two.png")
        PILImage.new("RGB", (200, 200), (90, 120, 90)).save(folder / "meadow.png")
        (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a photo")
        return folder

    @pytest.mark.parametrize("as_tar", [False, True], ids=["folder", "tar"])
    def test_faces_are_cut_and_bad_files_are_named(
        self, source: Path, tmp_path: Path, as_tar: bool
    ) -> None:
        if as_tar:
            with tarfile.open(tmp_path / "photos.tar", "w") as archive:
                archive.add(source, "photos")
            source = tmp_path / "photos.tar"
        report = pack(source, tmp_path / "pack.safetensors", size=96)
        prefix = "photos/" if as_tar else ""
        assert (report.faces, report.identities) == (2, 1)
        assert set(report.skipped) == {f"{prefix}broken.jpg", f"{prefix}meadow.png"}
        with safe_open(tmp_path / "pack.safetensors", "pt") as archive:
            faces, landmarks = archive.get_tensor("faces"), archive.get_tensor("landmarks")
        assert faces.shape == (2, 96, 96, 3)
        # Eyes above the nose above the mouth, and the mirrored photo is mirrored.
        height = landmarks[:, :, 1]
        assert (height[:, :2].amax(1) < height[:, 2]).all()
        assert (height[:, 2] < height[:, 3:].amin(1)).all()
        mirrored = 95 - landmarks[1, [1, 0, 2, 4, 3], 0]
        assert torch.allclose(landmarks[0, :, 0], mirrored, atol=5)

    def test_command_line_says_what_it_left_out(self, source: Path, tmp_path: Path) -> None:
        output = tmp_path / "pack.safetensors"
        result = CliRunner().invoke(app, ["pack", str(source), str(output)])
        assert result.exit_code == 0
        assert "2 faces of 1 people" in result.output
        assert "meadow.png: no face" in result.output
        nothing = [source / "broken.jpg", source.parent / "meadow"]
        nothing[1].mkdir()
        (source / "meadow.png").rename(nothing[1] / "meadow.png")
        for wrong in nothing:
            result = CliRunner().invoke(app, ["pack", str(wrong), str(output)])
            assert result.exit_code == 2
            assert result.output.splitlines()[-1].startswith("error: ")


class TestData:
    def test_split_is_by_person_and_complete(self, packed: Path) -> None:
        train = FacePack(packed, validation=False, share=0.4)
        held = FacePack(packed, validation=True, share=0.4)
        people = [{int(part[i]["identity"]) for i in range(len(part))} for part in (train, held)]
        assert not people[0] & people[1]
        assert people[0] | people[1] == set(range(6))
        assert people[1]

    def test_split_share_is_about_what_was_asked(self) -> None:
        share = np.mean([held_out(f"person {i}", 0.1) for i in range(4000)])
        assert abs(share - 0.1) < 0.02

    def test_absent_pack_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="shields train pack"):
            FacePack(tmp_path / "none.safetensors", validation=False)

    def test_batches_depend_on_seed_and_epoch_alone(self, packed: Path) -> None:
        def first(seed: int) -> list[int]:
            loader = packs(packed, seed=seed, batches=3).train_dataloader()
            return [int(i) for batch in loader for i in batch["identity"]]

        assert first(1) == first(1)
        assert first(1) != first(2)

    def test_crop_is_part_of_the_face_or_its_mirror(self) -> None:
        face = torch.rand(6, 3, 16, 16)
        crop = random_crop(face, 16, torch.Generator().manual_seed(1))
        same = [
            bool((a == b).all() or (a == b.flip(-1)).all()) for a, b in zip(crop, face, strict=True)
        ]
        assert all(same)
        assert not torch.equal(crop, face)

    def test_alignment_without_jitter_is_the_plain_one(self) -> None:
        points, template = tiny.landmarks(3, 64), tiny.recognizer().template
        rng = torch.Generator().manual_seed(0)
        matrix = jittered_alignment(points, template, rng, strength=0.0)
        assert torch.allclose(matrix, similarity(points, template), atol=1e-5)

    def test_jittered_alignment_stays_near_the_template(self) -> None:
        points, template = tiny.landmarks(64, 64), tiny.recognizer().template
        matrix = jittered_alignment(points, template, torch.Generator().manual_seed(0))
        placed = points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
        middle = (placed.mean(1) - template.mean(0)).norm(dim=1)
        assert middle.mean() < 6
        mirrored = torch.linalg.det(matrix[:, :, :2]) < 0
        assert 0.2 < mirrored.float().mean() < 0.8

    def test_augmentation_keeps_the_range_and_changes_the_image(self) -> None:
        face = tiny.faces_image(8, 48)
        changed = augment(face, torch.Generator().manual_seed(0))
        assert changed.shape == face.shape
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert (changed - face).abs().mean() > 0.02


class TestAttacked:
    def test_faces_move_away_from_themselves_within_reach(self) -> None:
        network, face = tiny.recognizer(), tiny.faces_image(6, 32)[..., :24]
        moved = attacked(face, network.embed, 16.0, torch.Generator().manual_seed(3))
        assert 0 < (moved - face).abs().max() <= 16 / 255 + 1e-6
        assert moved.min() >= 0
        assert moved.max() <= 1
        cosine = (network.embed(moved) * network.embed(face)).sum(dim=1)
        noise = (torch.rand(face.shape) * 2 - 1) * float((moved - face).abs().max())
        by_chance = (network.embed(face + noise) * network.embed(face)).sum(dim=1)
        assert (cosine < by_chance).all()

    @pytest.mark.usefixtures("teachers")
    def test_half_is_aimed_at_each_network_and_modes_are_restored(self) -> None:
        module = small("face-embedder", adversarial=0.5)
        module.network.train()
        before = {name: value.clone() for name, value in module.network.state_dict().items()}
        face = torch.rand(8, 3, 112, 96, generator=torch.Generator().manual_seed(0))
        moved = module._attacked(face, torch.Generator().manual_seed(1))
        changed = (moved != face).flatten(1).any(dim=1).tolist()
        assert changed == [True] * 4 + [False] * 4
        assert all(part.training for part in module.network.modules())
        for name, value in module.network.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.usefixtures("teachers")
    def test_second_stage_begins_with_the_weights_of_the_first(
        self, packed: Path, tmp_path: Path
    ) -> None:
        first = small("face-embedder")
        trainer(tmp_path, max_steps=1).fit(first, packs(packed, batches=1))
        second = small("face-embedder", start=tmp_path / "last.ckpt", adversarial=0.5)
        second.setup("fit")
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name]), name
        trainer(tmp_path / "second", max_steps=1).fit(second, packs(packed, batches=1))
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)


class TestVerification:
    def test_separable_pairs_give_accuracy_one_and_random_ones_a_half(self) -> None:
        rng = torch.Generator().manual_seed(0)
        same = torch.rand(400, generator=rng) < 0.5
        clear = same.float() + 0.1 * torch.rand(400, generator=rng)
        accuracy, threshold = verification_accuracy(clear, same, rng)
        assert accuracy == 1
        assert 0.1 <= threshold <= 1
        accuracy, _ = verification_accuracy(torch.rand(400, generator=rng), same, rng)
        assert 0.35 < accuracy < 0.65

    def test_pairs_are_what_they_say(self) -> None:
        identity = torch.arange(30) // 3
        rows, same = verification_pairs(identity, 20, torch.Generator().manual_seed(0))
        assert rows.shape == (40, 2)
        assert torch.equal(identity[rows[:, 0]] == identity[rows[:, 1]], same)
        assert int(same.sum()) == 20


@pytest.mark.usefixtures("teachers")
class TestTraining:
    @KINDS
    def test_twenty_steps_on_few_faces_learn(self, kind: str, packed: Path, tmp_path: Path) -> None:
        module = small(kind, rate=3e-3)
        watch = trainer(tmp_path, max_steps=1)
        watch.fit(module, packs(packed, batches=1))
        name = "loss" if kind == "portrait-ae" else "cosine"
        before = float(watch.callback_metrics[name])
        module = small(kind, rate=3e-3)
        watch = trainer(tmp_path / "long", max_steps=40)
        watch.fit(module, packs(packed, batches=40))
        after = float(watch.callback_metrics[name])
        assert after < 0.8 * before if kind == "portrait-ae" else after > before

    @KINDS
    def test_stop_and_resume_equals_going_through(
        self, kind: str, packed: Path, tmp_path: Path
    ) -> None:
        through = small(kind)
        trainer(tmp_path / "through", max_steps=4).fit(through, packs(packed, batches=2))
        stopped = small(kind)
        first = trainer(tmp_path / "half", max_steps=4)
        first.callbacks.append(PowerCut())
        with pytest.raises(ConnectionError):
            first.fit(stopped, packs(packed, batches=2))
        resumed = small(kind)
        trainer(tmp_path / "half", max_steps=4).fit(
            resumed, packs(packed, batches=2), ckpt_path=tmp_path / "half" / "last.ckpt"
        )
        for name, value in through.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        changed = [not torch.equal(a, b) for a, b in
                   zip(stopped.parameters(), resumed.parameters(), strict=True)]  # fmt: skip
        assert any(changed)

    @KINDS
    def test_the_teacher_is_neither_trained_nor_saved(
        self, kind: str, packed: Path, tmp_path: Path
    ) -> None:
        module = small(kind)
        before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
        watch = trainer(tmp_path, max_steps=2)
        watch.fit(module, packs(packed, batches=2))
        for name, value in module.teacher.state_dict().items():
            assert torch.equal(value, before[name]), name
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert {key.partition(".")[0] for key in saved} <= {"network", "averaged"}


@KINDS
@pytest.mark.usefixtures("teachers")
def test_export_loads_to_the_same_network(kind: str, tmp_path: Path) -> None:
    module = small(kind)
    state, config = module.export()
    recipe = Recipe(name=kind, command="train", seed=0, steps=0, **module.CARD)
    card_path = export(state, config, recipe, {"val_psnr": 1.23456}, tmp_path)
    card = Card.read(card_path)
    assert card.results["psnr"] == 1.2346
    store = WeightStore(tmp_path)
    assert store.find(card) == tmp_path / f"{kind}.safetensors"
    loaded = load(card.role, kind, store=store, device=torch.device("cpu"))
    for name, value in loaded.network.state_dict().items():
        wanted = state[name].half().float() if state[name].is_floating_point() else state[name]
        assert torch.equal(value, wanted), name


@pytest.mark.usefixtures("teachers")
def test_export_command_measures_on_held_out_people(packed: Path, tmp_path: Path) -> None:
    module = small("portrait-ae")
    trainer(tmp_path / "run", max_steps=2).fit(module, packs(packed, batches=2))
    arguments = ["portrait-ae", "export", str(tmp_path / "run" / "last.ckpt"),
                 "--pack", str(packed), "--to", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    card = Card.read(tmp_path / "out" / "portrait-ae.toml")
    assert card.training["steps"] == 2
    assert 0 < card.results["psnr"] < 60


def test_lightning_command_line_runs_a_recipe(
    teachers: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path(__file__).parents[1] / "trainers" / "configs" / "portrait-ae.yaml"
    arguments = [
        "portrait-ae", "fit", "--config", str(recipe), "--trainer.fast_dev_run", "true",
        "--trainer.precision", "32", "--data.packs", f"[{packed}]", "--data.batch", "2",
        "--model.teacher", "ae-teacher", "--model.crop", "32", "--model.fine", "8",
        "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_unknown_trainer_names_its_neighbours() -> None:
    result = CliRunner().invoke(app, ["portrait-au", "fit"])
    assert result.exit_code == 2
    assert "did you mean 'portrait-ae'" in result.output.lower()
