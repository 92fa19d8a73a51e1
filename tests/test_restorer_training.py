"""The restorer in training: damage, learning, resuming, exporting."""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file

from shields.errors import ConfigError
from shields.models import load
from shields.models.restoration import Restorer
from shields.weights import Card, WeightStore
from tests import tiny
from tests.training import PowerCut, trainer
from trainers.data import FacePacks
from trainers.export import export_checkpoint
from trainers.restorer import Damage, RestorerTraining, charbonnier, pretended, restoration_loss

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Twelve faces of six people, with edges for the network to sharpen."""
    path = tmp_path / "faces.safetensors"
    edges = (torch.arange(40).view(1, 1, 1, 40) % 10 < 5).float() * 0.3
    faces = (tiny.faces_image(12, 40) * 0.7 + edges) * 255
    save_file(
        {
            "faces": faces.byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(12, 40),
            "identity": torch.arange(12) // 2,
        },
        path,
        metadata={"identities": json.dumps([f"person {i}" for i in range(6)])},
    )
    return path


def small(**settings: object) -> RestorerTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {"features": 8, "convolutions": 1, "crop": 32, "warmup": 1}
    return RestorerTraining(**(defaults | settings))  # type: ignore[arg-type]


def packs(path: Path, batches: int) -> FacePacks:
    return FacePacks([path], batch=2, batches=batches, share=0.4)


class TestDamage:
    def test_the_usual_is_pillows_own(self) -> None:
        image = (tiny.faces_image(1, 48) * 255).round() / 255
        pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
        file = io.BytesIO()
        PillowImage.fromarray(pixels).save(file, "JPEG", quality=75)
        coded = PillowImage.open(file).resize((24, 24), PillowImage.Resampling.LANCZOS)
        made = (Damage().usual(image)[0].permute(1, 2, 0) * 255).round().numpy()
        assert np.abs(made - np.asarray(coded, dtype=float)).max() <= 1

    @pytest.mark.parametrize("scale", [1, 2])
    def test_each_photo_is_damaged_in_its_own_way(self, scale: int) -> None:
        image = tiny.faces_image(1, 32).expand(8, -1, -1, -1)
        made = Damage(scale=scale)(image, rng())
        assert made.shape == (8, 3, 32 // scale, 32 // scale)
        assert 0 <= float(made.min()) <= float(made.max()) <= 1
        torch.testing.assert_close(made * 255, (made * 255).round(), atol=1e-3, rtol=0)
        assert len({one.numpy().tobytes() for one in made}) > 4
        assert torch.equal(made, Damage(scale=scale)(image, rng()))

    def test_what_looks_like_a_protection_keeps_its_budget(self) -> None:
        image, generator = tiny.faces_image(1, 20, width=28), rng()
        made = [pretended(image, 8.0, generator) for _ in range(12)]
        assert all(one.shape == (1, 3, 20, 28) for one in made)
        assert all(4 < float(one.abs().max()) * 255 <= 8.001 for one in made)
        values = {len(one.unique()) for one in made}
        assert min(values) <= 3 < max(values), "of two values, or of all"


class TestLoss:
    def test_closed_forms(self) -> None:
        assert float(charbonnier(torch.zeros(3))) == pytest.approx(1e-3)
        assert float(charbonnier(torch.tensor([3.0, -4.0]), softness=0)) == 3.5
        clean = tiny.faces_image(1, 8)
        # A constant error of c has one coefficient, c * 8, among the 8 * 5 of the half spectrum.
        loss = restoration_loss(clean + 0.5, clean, 2.0)
        assert float(loss) == pytest.approx(0.5 + 2 * 0.5 * 8 / 40, abs=1e-4)

    def test_a_scale_that_makes_no_sense_is_explained(self) -> None:
        with pytest.raises(ConfigError, match="got 2 and 33"):
            small(crop=33)
        with pytest.raises(ConfigError, match="must be 1 or 2"):
            small(scale=4)


class TestTraining:
    def test_a_fast_run_goes_through(self, packed: Path, tmp_path: Path) -> None:
        trainer(tmp_path, fast_dev_run=True, callbacks=[]).fit(small(scale=1), packs(packed, 2))

    def test_it_learns_to_restore(self, packed: Path, tmp_path: Path) -> None:
        module = small(rate=1e-2, average=0.5)
        watch = trainer(tmp_path, max_epochs=1)
        watch.validate(module, packs(packed, 1), verbose=False)
        before = float(watch.callback_metrics["val_psnr"])
        watch.fit(module, packs(packed, 40))
        assert watch.callback_metrics["val_psnr"] > before + 1

    def test_stop_and_resume_equals_going_through(self, packed: Path, tmp_path: Path) -> None:
        through = small()
        trainer(tmp_path / "through", max_epochs=2).fit(through, packs(packed, 2))
        first = trainer(tmp_path / "half", max_epochs=2)
        first.callbacks.append(PowerCut())
        with pytest.raises(ConnectionError):
            first.fit(small(), packs(packed, 2))
        resumed = small()
        trainer(tmp_path / "half", max_epochs=2).fit(
            resumed, packs(packed, 2), ckpt_path=tmp_path / "half" / "last.ckpt"
        )
        for name, value in through.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_an_untrained_network_gains_next_to_nothing_where_the_size_is_kept(
        self, packed: Path, tmp_path: Path
    ) -> None:
        watch = trainer(tmp_path)
        watch.validate(small(scale=1), packs(packed, 1), verbose=False)
        gains = {name: float(value) for name, value in watch.callback_metrics.items()
                 if "gain" in name}  # fmt: skip
        assert set(gains) == {"val_psnr_gain", "val_ssim_gain", "val_psnr_gain_perturbed",
                              "val_ssim_gain_perturbed"}  # fmt: skip
        assert all(-1 < gain < 0.1 for gain in gains.values())


class TestExport:
    def test_the_shipped_file_restores_the_same(self, packed: Path, tmp_path: Path) -> None:
        module = small(rate=1e-2)
        trainer(tmp_path / "run", max_epochs=1).fit(module, packs(packed, 4))
        path = export_checkpoint(
            "restorer", tmp_path / "run" / "last.ckpt", packed, tmp_path, Path("recipe.yaml"),
            called="small-restorer",
        )  # fmt: skip
        card = Card.read(path)
        assert (card.role, card.architecture, card.training["steps"]) == ("purifier", "compact", 4)
        assert card.config == {"scale": 2, "features": 8, "convolutions": 1}
        assert "psnr_gain" in card.results
        device = torch.device("cpu")
        network = load("purifier", "small-restorer", store=WeightStore(tmp_path), device=device)
        assert isinstance(network, Restorer)
        image = tiny.faces_image(1, 18)
        module.averaged.half().float()
        with torch.no_grad():
            wanted = module.averaged(image).clamp(0, 1)
        assert torch.equal(network.restore(image), wanted)

    def test_spandrel_loads_what_was_exported(self, packed: Path, tmp_path: Path) -> None:
        spandrel = pytest.importorskip("spandrel")
        trainer(tmp_path / "run", max_epochs=1).fit(small(scale=1), packs(packed, 1))
        card = export_checkpoint(
            "restorer", tmp_path / "run" / "last.ckpt", packed, tmp_path, Path("recipe.yaml")
        )
        found = spandrel.ModelLoader().load_from_state_dict(
            load_file(card.with_suffix(".safetensors"))
        )
        assert (found.architecture.id, found.scale, found.tags) == ("Compact", 1, ["8nf", "1nc"])


def test_the_recipe_names_settings_that_exist() -> None:
    path = Path(__file__).parents[1] / "trainers" / "configs" / "portrait-restorer.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe["model"]) <= set(inspect.signature(RestorerTraining).parameters)
    assert set(recipe["data"]) <= set(inspect.signature(FacePacks).parameters)
