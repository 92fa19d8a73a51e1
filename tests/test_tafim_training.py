"""TAFIM in training and shipped; and the measure that all learned baselines share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from shields.errors import ConfigError, WeightsError
from shields.models.learned_baselines import TafimModel, TafimNetwork
from shields.models.manipulation import wrap
from shields.protectors.learned_baselines import Tafim, TafimConfig
from shields.weights import Card
from tests import baselines, tiny
from tests.training import trainer
from trainers.ars_targets import Task, distance
from trainers.disruption_measure import disruption
from trainers.tafim import TafimTraining

pytestmark = baselines.QUIET


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path))
    return baselines.save_everything(tmp_path)


def small(**settings: object) -> TafimTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "manipulators": ("small-stargan", "small-ae"), "widths": (8, 8), "size": 16, "rate": 1e-2,
    }  # fmt: skip
    return TafimTraining(**(defaults | settings))  # type: ignore[arg-type]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class TestNetwork:
    def test_the_unet_sees_photo_and_noise_and_nothing_else(self) -> None:
        with tiny.seeded(0):
            network = TafimNetwork(widths=(8, 8), size=16)
        seen = []
        network.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        face = tiny.faces_image(2, 16)
        made = network(face)
        assert torch.equal(seen[0][:, :3], 2 * face - 1)
        torch.testing.assert_close(seen[0][1, 3:], network.noise)
        torch.testing.assert_close(made, network.unet(seen[0]).tanh() / 2)
        assert network.noise.min() >= 0
        assert 0.9 < network.noise.max() <= 1

    def test_the_noise_is_resized_to_the_photo(self) -> None:
        network = TafimNetwork(widths=(8, 8), size=16)
        torch.nn.init.constant_(network.noise, 0.5)
        wide = network.everywhere((20, 30))
        torch.testing.assert_close(wide, torch.full((1, 3, 20, 30), 0.25))

    def test_a_budget_cuts_off_and_does_not_scale(self) -> None:
        with tiny.seeded(0):
            model = TafimModel(TafimNetwork(widths=(8, 8), size=16))
        face = tiny.faces_image(1, 21)
        wide, narrow = (model.perturb(face, levels=reach, rng=rng()) for reach in (255.0, 8.0))
        assert wide.abs().max() > 20 / 255
        assert torch.equal(narrow, wide.clamp(-8 / 255, 8 / 255))

    def test_a_card_that_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        card = Card(
            name="t", role="generator", architecture="tafim", file="t.safetensors",
            config={"levels": 0},
        )  # fmt: skip
        with pytest.raises(WeightsError, match="`levels` must be above 0"):
            TafimModel.load(tmp_path / "t.safetensors", card)


class TestTraining:
    def test_the_first_terms_are_those_of_the_paper(self, packed: Path, tmp_path: Path) -> None:
        module = small(region=(1.0, 1.0), rate=0.0, conditions={"small-stargan": ["smiling"]})
        watch = baselines.fit(module, packed, tmp_path, 1)
        batch = next(iter(baselines.packs(packed, 1).train_dataloader()))
        # The crop is the whole face, perhaps mirrored.
        face = torch.nn.functional.interpolate(
            batch["face"].float() / 255, (16, 16), mode="bilinear", antialias=True
        )  # fmt: skip
        wanted = []
        for photo in (face, face.flip(-1)):
            noisy = (photo + module.generator.noise / 2).clamp(0, 1)
            white = [(2 * net(noisy) - 2).square().mean() for net in module._manipulators]
            wanted.append(
                (float(torch.stack(white).mean()), float(10 * distance(noisy, photo).mean()))
            )
        seen = watch.seen[0]["forgery_noise"], watch.seen[0]["size_noise"]
        assert any(seen == pytest.approx(pair, rel=1e-3) for pair in wanted)

    def test_each_term_moves_the_right_way(self, packed: Path, tmp_path: Path) -> None:
        settings = {"manipulators": ("small-fpgan",), "rate": 3e-2, "region": (1.0, 1.0)}
        free = baselines.fit(small(penalty=0.0, **settings), packed, tmp_path)
        bound = baselines.fit(small(penalty=1e3, **settings), packed, tmp_path)
        for name in ("network", "noise"):
            assert free.change(f"forgery_{name}") < -0.02
            assert bound.change(f"size_{name}") < -0.2 * bound.seen[0][f"size_{name}"]

    def test_everything_learns_through_jpeg_and_the_cut(self, packed: Path, tmp_path: Path) -> None:
        module = small(handling="jpeg:1..99", clipped=True, levels=60.0)
        before = {name: value.clone() for name, value in module.named_parameters()}
        baselines.fit(module, packed, tmp_path, 2)
        still = [name for name, value in module.named_parameters()
                 if torch.equal(before[name], value)]  # fmt: skip
        assert still == []

    def test_cutting_off_while_training_is_an_option(self, packed: Path) -> None:
        face = tiny.faces_image(2, 16)
        for clipped, most in ((True, 12.76 / 255), (False, 0.51)):
            views = small(clipped=clipped).views(face, rng())
            moved = max(float((view - face).detach().abs().max()) for view in views.values())
            assert 12.7 / 255 < moved < most

    def test_noise_that_is_cut_off_starts_where_it_has_a_gradient(self, packed: Path) -> None:
        module = small(clipped=True)
        assert torch.equal(module.averaged.noise, module.generator.noise)
        module.views(torch.full((1, 3, 16, 16), 0.5), rng())["noise"].sum().backward()
        assert (module.generator.noise.grad != 0).all()

    def test_a_checkpoint_in_the_middle_holds_the_averages_of_its_step(
        self, packed: Path, tmp_path: Path
    ) -> None:
        keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
        through = small()
        run = trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=[keep])
        run.fit(through, baselines.packs(packed, 3))
        resumed = small()
        trainer(tmp_path / "resumed", max_epochs=1, limit_val_batches=0).fit(
            resumed, baselines.packs(packed, 3), ckpt_path=tmp_path / "step=2.ckpt"
        )
        for name, value in through.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_one_batch_of_everything(self, packed: Path, tmp_path: Path) -> None:
        run = trainer(tmp_path, fast_dev_run=True, callbacks=[])
        run.fit(small(), baselines.packs(packed, 1))
        assert 0 <= float(run.callback_metrics["val_success_handled_small-ae"]) <= 1

    def test_stop_and_resume_equals_going_through(self, packed: Path, tmp_path: Path) -> None:
        baselines.check_resume(lambda: small(handling="jpeg:1..99"), packed, tmp_path)

    def test_settings_that_make_no_sense_are_explained(self, packed: Path) -> None:
        with pytest.raises(ConfigError, match="multiple of 2, got 17"):
            small(size=17)
        with pytest.raises(ConfigError, match="`levels` must be above 0"):
            small(levels=0.0)
        with pytest.raises(
            ConfigError, match=r"conditions are given for 'small-gan'; did you mean"
        ):
            small(conditions={"small-gan": ["smiling"]})


class TestShipping:
    def test_the_budget_holds_in_files(self, packed: Path) -> None:
        baselines.check_bound_after_png(small(levels=6.375))

    def test_the_shipped_file_makes_the_same_bits(self, packed: Path, tmp_path: Path) -> None:
        module = small(levels=6.375)
        card, model = baselines.exported("tafim", module, packed, tmp_path)
        assert (card.architecture, card.config["levels"]) == ("tafim", 6.375)
        assert {"success_mean", "psnr", "mse_handled_small-ae"} <= set(card.results)
        face = tiny.faces_image(2, 32)
        with torch.no_grad():
            wanted = module.perturbation(face).clamp(-6.375 / 255, 6.375 / 255)
        assert torch.equal(model.perturb(face, levels=6.375, rng=rng()), wanted)
        protector = Tafim(TafimConfig(levels=6.375), generator=model)
        torch.testing.assert_close(protector(face, rng=rng()), wanted)

    def test_without_a_generator_it_says_what_to_do(self) -> None:
        with pytest.raises(ConfigError, match=r"--generator .*shields train tafim export"):
            Tafim()

    def test_the_recipe_names_settings_that_exist(self) -> None:
        baselines.check_recipe("tafim-smile", TafimTraining)


class TestMeasure:
    def test_it_is_over_conditions_then_manipulators(self) -> None:
        def grow(image: torch.Tensor, name: str) -> torch.Tensor:
            return image * {"little": 0.5, "much": 1.0}[name]

        networks = [
            wrap(grow, conditions=["little", "much"], native_range="unit"),
            wrap(lambda image: image * 0, native_range="unit"),
        ]
        networks[0].name, networks[1].name = "grow", "black.out"
        tasks = [[Task(manipulator=net, condition=name) for name in net.conditions]
                 for net in networks]  # fmt: skip
        face = torch.full((2, 3, 32, 32), 0.25)
        found = disruption(tasks, face, face + 0.15)
        # Mean squares of 0.15 and of half of it, in [-1, 1]: 0.09 and 0.0225.
        assert float(found["val_mse_grow"]) == pytest.approx((0.0225 + 0.09) / 2)
        assert float(found["val_success_grow"]) == 0.5
        assert float(found["val_mse_black-out"]) == float(found["val_success_black-out"]) == 0
        assert float(found["val_mse"]) == pytest.approx((0.0225 + 0.09) / 4)
        assert float(found["val_success"]) == 0.25
        assert float(found["val_psnr"]) == pytest.approx(-20 * math.log10(0.15), rel=1e-4)
        # Flat photos survive JPEG and half size, up to rounding.
        assert float(found["val_mse_handled"]) == pytest.approx(float(found["val_mse"]), rel=0.05)
        assert float(found["val_success_mean"]) == 0.25
        # 0.0225 is 0.45 of the way to 0.05; the others are there, or have not moved.
        assert float(found["val_progress"]) == pytest.approx(((0.45 + 1) / 2 + 0) / 2, rel=0.02)
