"""The IAP-like generator: what is correlated, a step, resuming, shipping."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from shields.errors import ConfigError
from shields.protectors.learned_baselines import BaselineConfig, IapLike
from tests import baselines, tiny
from tests.training import trainer
from trainers.ars_targets import Task
from trainers.iap import IapTraining, correlation

pytestmark = baselines.QUIET


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path))
    return baselines.save_everything(tmp_path)


def small(**settings: object) -> IapTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "manipulators": ("small-stargan", "small-ae"), "features": "features:small-face",
        "settings": {"width": 4, "blocks": 1}, "size": 16, "rate": 1e-2, "average": 0.5,
    }  # fmt: skip
    return IapTraining(**(defaults | settings))  # type: ignore[arg-type]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestCorrelation:
    def test_it_is_pearsons_of_each_map_in_the_mean(self) -> None:
        shapes = ((2, 3, 4, 5), (2, 7, 2, 2))
        ours = [torch.randn(shape, generator=rng(index)) for index, shape in enumerate(shapes)]
        theirs = [torch.randn(side.shape, generator=rng(2)) + side for side in ours]
        pairs = list(zip(ours, theirs, strict=True))
        wanted = [
            np.mean([np.corrcoef(a[i].flatten(), b[i].flatten())[0, 1] for a, b in pairs])
            for i in range(2)
        ]
        found = correlation(tuple(ours), tuple(theirs))
        torch.testing.assert_close(found, torch.tensor(np.array(wanted)).float())

    def test_scale_and_offset_do_not_count(self) -> None:
        maps = (torch.randn(2, 3, 4, 4, generator=rng()),)
        for factor, wanted in ((5.0, 1.0), (-0.1, -1.0)):
            found = correlation((factor * maps[0] + 3,), maps)
            torch.testing.assert_close(found, torch.full((2,), wanted))


class TestTraining:
    def test_forgeries_of_clean_photos_are_alike(self, packed: Path) -> None:
        module, face = small(), tiny.faces_image(2, 16)
        task = Task(manipulator=module._manipulators[0], condition="smiling")
        watcher = module._watching[0]
        clean = watcher.features(task.forge_clean(face))
        assert float(module.likeness(face, task, clean)) == pytest.approx(1, abs=1e-4)
        assert float(module.likeness(1 - face, task, clean)) < 0.99

    @pytest.mark.parametrize("network", ["resnet", "unet"])
    def test_the_correlation_falls(self, packed: Path, tmp_path: Path, network: str) -> None:
        settings = {"width": 4, "depth": 3} if network == "unet" else {"width": 4, "blocks": 1}
        module = small(
            network=network, settings=settings, manipulators=("small-fpgan",), levels=60.0
        )  # fmt: skip
        before = {name: value.clone() for name, value in module.named_parameters()}
        watch = baselines.fit(module, packed, tmp_path)
        assert watch.change("correlation") < -0.02
        still = [name for name, value in module.named_parameters()
                 if torch.equal(before[name], value)]  # fmt: skip
        assert still == []

    def test_manipulators_take_part_alike(self, packed: Path, tmp_path: Path) -> None:
        met = [("small-stargan",), ("small-ae",), ("small-stargan", "small-ae")]
        found = [
            baselines.fit(small(manipulators=names, rate=0.0), packed, tmp_path, 1) for names in met
        ]
        alone, other, both = (watch.seen[0]["correlation"] for watch in found)
        assert both == pytest.approx((alone + other) / 2, abs=1e-6)

    def test_one_batch_of_everything(self, packed: Path, tmp_path: Path) -> None:
        run = trainer(tmp_path, fast_dev_run=True, callbacks=[])
        run.fit(small(), baselines.packs(packed, 1))
        assert 0 <= float(run.callback_metrics["val_success_mean"]) <= 1

    def test_stop_and_resume_equals_going_through(self, packed: Path, tmp_path: Path) -> None:
        baselines.check_resume(small, packed, tmp_path)

    def test_settings_that_make_no_sense_are_explained(self, packed: Path) -> None:
        with pytest.raises(ConfigError, match="no network is called 'renset'; did you mean resnet"):
            small(network="renset")
        with pytest.raises(ConfigError, match="multiple of 4, got 18"):
            small(size=18)


class TestShipping:
    def test_the_budget_holds_in_files(self, packed: Path, tmp_path: Path) -> None:
        module = small(bound="clamp")
        baselines.fit(module, packed, tmp_path, 5)  # it begins with less than a level
        baselines.check_bound_after_png(module)

    def test_the_shipped_file_makes_the_same_bits(self, packed: Path, tmp_path: Path) -> None:
        module = small()
        card, model = baselines.exported("iap-like", module, packed, tmp_path)
        assert (card.architecture, card.config["channels"]) == ("idguard", 3)
        assert "IAP-like" in card.summary
        face = tiny.faces_image(2, 32)
        with torch.no_grad():
            wanted = module.perturbation(face)
        assert torch.equal(model.perturb(face, levels=6.375, rng=rng()), wanted)
        protector = IapLike(BaselineConfig(), generator=model)
        torch.testing.assert_close(protector(face, rng=rng()), wanted)

    def test_without_a_generator_it_says_what_to_do(self) -> None:
        with pytest.raises(ConfigError, match=r"--generator .*shields train iap-like export"):
            IapLike()

    def test_the_recipe_names_settings_that_exist(self) -> None:
        baselines.check_recipe("iap-like-smile", IapTraining)
