"""The attacker who knows the protector: pairs, learning, resuming, exporting."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file

from robustness.purifiers import load as load_purifier
from shields.errors import ConfigError, ImageError, UnknownName
from shields.models.ars_network import ArsGenerator
from shields.weights import Card, WeightStore
from tests import cards, tiny
from tests.training import PowerCut, trainer
from trainers.data import FacePacks
from trainers.export import export_checkpoint
from trainers.pairs import pack_pairs
from trainers.purifier import PurifierTraining, left, likelier, saved

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def faces(count: int = 12, size: int = 40) -> torch.Tensor:
    return (tiny.faces_image(count, size) * 255).byte().permute(0, 2, 3, 1).contiguous()


def write_pack(path: Path, photos: torch.Tensor) -> Path:
    save_file(
        {
            "faces": photos,
            "landmarks": tiny.landmarks(12, 40),
            "identity": torch.arange(12) // 2,
        },
        path,
        metadata={"identities": json.dumps([f"person {i}" for i in range(6)])},
    )
    return path


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve faces of six people, and the card of a small generator."""
    folder = tmp_path / "cards"
    folder.mkdir()
    with tiny.seeded(0):
        network = ArsGenerator(widths=(8, 8), encoder=(4,), channels=4, levels=16.0)
    cards.save_file_model(
        folder, "small-ars", "generator", "ars", network,
        "[config]\nwidths = [8, 8]\nencoder = [4]\nchannels = 4\nlevels = 16.0\n",
    )  # fmt: skip
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(folder))
    return write_pack(tmp_path / "faces.safetensors", faces())


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """The same with stripes as a perturbation, which every photo shares."""
    clean = faces()
    stripes = (torch.arange(40) % 4 < 2).view(1, 1, 40, 1) * 16 - 8
    protected = (clean.int() + stripes).clamp(0, 255).byte()
    return write_pack(tmp_path / "pairs.safetensors", torch.cat([clean, protected], dim=3))


def small(**settings: object) -> PurifierTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "protector": "small-ars", "widths": (8, 8), "crop": 32, "warmup": 1, "rate": 1e-2,
    }  # fmt: skip
    return PurifierTraining(**(defaults | settings))  # type: ignore[arg-type]


def packs(path: Path, batches: int) -> FacePacks:
    return FacePacks([path], batch=2, batches=batches, share=0.4)


class TestMeasures:
    def test_closed_forms(self) -> None:
        clean, protected = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)
        assert torch.equal(left(protected, protected, clean), torch.ones(2))
        assert torch.equal(left(clean, protected, clean), torch.zeros(2))
        torch.testing.assert_close(left(protected / 2, protected, clean), torch.full((2,), 0.25))
        high, low = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
        assert float(likelier(high, low)) == pytest.approx(3.5 / 4)
        assert float(likelier(high, high)) == 0.5

    def test_photos_are_as_they_would_be_saved(self) -> None:
        image = torch.tensor([0.0, 100.0, 250.0]).view(1, 3, 1, 1) / 255
        made = saved(image, torch.full((1, 3, 1, 1), 12.75 / 255), 12.75)
        torch.testing.assert_close(made.flatten() * 255, torch.tensor([12.0, 112.0, 255.0]))


class TestPairs:
    def test_faces_are_protected_by_the_generator_at_its_own_size(self, packed: Path) -> None:
        module = small()
        face = faces().permute(0, 3, 1, 2)[:2]
        clean, protected = module.pair(face, 8.0, 1.0, rng()).chunk(2, dim=1)
        assert torch.equal(clean, face / 255)
        (generator,) = module._generator
        wanted = saved(clean, generator.perturb(clean, levels=8.0, rng=rng()), 8.0)
        torch.testing.assert_close(protected, wanted)
        wide = module.pair(face, 8.0, 2.0, rng())[:, 3:] - clean
        assert 0 < float(wide.abs().max()) * 255 <= 8.001
        assert not torch.equal(wide, protected - clean)

    def test_pairs_are_taken_as_they_are(self, pairs: Path) -> None:
        module = small(pairs=True, protector="a tool")
        batch = torch.randint(256, (2, 6, 8, 8), generator=rng(), dtype=torch.uint8)
        assert torch.equal(module.pair(batch, 8.0, 1.0, rng()), batch.float() / 255)

    def test_mistakes_are_explained(self, packed: Path, pairs: Path, tmp_path: Path) -> None:
        with pytest.raises(UnknownName, match="did you mean small-ars"):
            small(protector="small-as")
        with pytest.raises(ConfigError, match="multiple of 2 pixels, got 33"):
            small(crop=33)
        run = trainer(tmp_path, fast_dev_run=True, callbacks=[])
        with pytest.raises(ConfigError, match="holds pairs; set `pairs` to True"):
            run.fit(small(), packs(pairs, 1))
        with pytest.raises(ConfigError, match="holds faces; set `pairs` to False"):
            small(pairs=True).pair(torch.zeros(1, 3, 8, 8), 8.0, 1.0, rng())


class TestTraining:
    def test_a_fast_run_goes_through(self, packed: Path, tmp_path: Path) -> None:
        run = trainer(tmp_path, fast_dev_run=True, callbacks=[])
        run.fit(small(handled=1.0), packs(packed, 2))

    def test_it_learns_what_a_protector_adds(self, pairs: Path, tmp_path: Path) -> None:
        module = small(pairs=True, protector="stripes", average=0.5, handled=0.0)
        watch = trainer(tmp_path, max_epochs=1)
        watch.validate(module, packs(pairs, 1), verbose=False)
        before = {name: float(value) for name, value in watch.callback_metrics.items()}
        assert before["val_left"] == 1.0
        assert before["val_psnr_before"] == before["val_psnr_after"]
        watch.fit(module, packs(pairs, 60))
        assert watch.callback_metrics["val_left"] < 0.5
        assert watch.callback_metrics["val_psnr_after"] > before["val_psnr_after"] + 3

    def test_what_is_untouched_stays(self, pairs: Path, tmp_path: Path) -> None:
        module = small(pairs=True, protector="stripes", untouched=1.0, handled=0.0)
        before = {name: value.clone() for name, value in module.network.named_parameters()}
        trainer(tmp_path, max_epochs=1).fit(module, packs(pairs, 2))
        # Nothing is to be taken away, and nothing is at first: there is no gradient.
        for name, value in module.network.named_parameters():
            assert torch.equal(value, before[name]), name

    def test_stop_and_resume_equals_going_through(self, packed: Path, tmp_path: Path) -> None:
        through = small(handled=0.5)
        trainer(tmp_path / "through", max_epochs=2).fit(through, packs(packed, 2))
        first = trainer(tmp_path / "half", max_epochs=2)
        first.callbacks.append(PowerCut())
        with pytest.raises(ConnectionError):
            first.fit(small(handled=0.5), packs(packed, 2))
        resumed = small(handled=0.5)
        trainer(tmp_path / "half", max_epochs=2).fit(
            resumed, packs(packed, 2), ckpt_path=tmp_path / "half" / "last.ckpt"
        )
        for name, value in through.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        assert not any("generator" in name for name in through.state_dict())


def test_the_shipped_file_purifies_the_same(packed: Path, tmp_path: Path) -> None:
    module = small()
    trainer(tmp_path / "run", max_epochs=1).fit(module, packs(packed, 3))
    path = export_checkpoint(
        "purifier", tmp_path / "run" / "last.ckpt", packed, tmp_path, Path("recipe.yaml"),
        called="purifier-small-ars",
    )  # fmt: skip
    card = Card.read(path)
    assert (card.role, card.architecture, card.training["steps"]) == ("purifier", "unet", 3)
    assert "Adaptive, knows the protector small-ars" in card.summary
    assert card.results["left"] > 0
    purifier = load_purifier("adaptive:purifier-small-ars", store=WeightStore(tmp_path), device=CPU)
    image = tiny.faces_image(1, 20)
    module.averaged.half().float()
    with torch.no_grad():
        assert torch.equal(purifier.purify(image), module.averaged(image).clamp(0, 1))


class TestPackingPairs:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        """Three photos of two people, of which one was not protected and one does not fit."""
        clean, protected = tmp_path / "clean", tmp_path / "protected"
        photos = (tiny.faces_image(3, 48, width=64) * 255).byte().permute(0, 2, 3, 1).numpy()
        names = ("ada/one", "ada/two", "bob/three")
        for name, pixels in zip(names, photos, strict=True):
            changed = pixels.astype(int)
            changed[20:24, 40:44] += 9
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            (protected / name).parent.mkdir(parents=True, exist_ok=True)
            PillowImage.fromarray(pixels).save(clean / f"{name}.png")
            shown = PillowImage.fromarray(changed.astype(np.uint8))
            shown.save(protected / f"{name}-protected.png")
        PillowImage.open(clean / "bob" / "three.png").save(clean / "four.png")
        PillowImage.new("RGB", (64, 40)).save(clean / "five.png")
        PillowImage.new("RGB", (40, 64)).save(protected / "five.png")
        PillowImage.open(clean / "four.png").save(clean / "six.png")
        PillowImage.open(clean / "four.png").save(protected / "six.png")
        return clean, protected

    def test_the_same_square_of_both_about_the_change(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        report = pack_pairs(*folders, tmp_path / "pairs.safetensors", size=16)
        assert (report.faces, report.identities) == (3, 2)
        assert set(report.skipped) == {"four.png", "five.png", "six.png"}
        assert "no protected photo" in report.skipped["four.png"]
        assert "sizes differ" in report.skipped["five.png"]
        assert report.skipped["six.png"] == "nothing was changed"
        packed = load_file(tmp_path / "pairs.safetensors")["faces"].int()
        assert packed.shape == (3, 16, 16, 6)
        change = packed[..., 3:] - packed[..., :3]
        wanted = torch.zeros(16, 16, 3, dtype=torch.int32)
        wanted[6:10, 6:10] = 9
        assert all(torch.equal(one, wanted) for one in change)
        original = np.asarray(PillowImage.open(folders[0] / "ada" / "one.png"))
        assert np.array_equal(packed[0, ..., :3].numpy(), original[14:30, 34:50])

    def test_photos_and_results_may_lie_in_one_folder(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        clean, protected = folders
        for path in protected.rglob("*-protected.png"):
            path.rename(clean / path.relative_to(protected))
        report = pack_pairs(clean, clean, tmp_path / "pairs.safetensors", size=16)
        assert report.faces == 3

    def test_a_pack_of_pairs_feeds_the_trainer(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        path = tmp_path / "pairs.safetensors"
        pack_pairs(*folders, path, size=16)
        module = small(pairs=True, protector="a tool", crop=16)
        data = FacePacks([path], batch=2, batches=2, share=0.7)
        trainer(tmp_path, max_epochs=1).fit(module, data)
        assert float(left(module.averaged(torch.rand(1, 3, 16, 16)), *torch.rand(2, 1, 3, 16, 16)))

    def test_nothing_usable_is_an_error_and_leaves_no_file(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        target = tmp_path / "pairs.safetensors"
        with pytest.raises(ImageError, match="smaller than 100 pixels"):
            pack_pairs(*folders, target, size=100)
        with pytest.raises(ImageError, match="there are no photos"):
            pack_pairs(tmp_path / "nowhere", folders[1], target)
        assert not target.exists()


def test_the_recipe_names_settings_that_exist() -> None:
    path = Path(__file__).parents[1] / "trainers" / "configs" / "purifier-ars-latent.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe["model"]) <= set(inspect.signature(PurifierTraining).parameters)
    assert set(recipe["data"]) <= set(inspect.signature(FacePacks).parameters)
