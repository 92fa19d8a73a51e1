"""The CMUA watermark: its walk in closed form, both variants, resuming, shipping."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from shields.errors import ConfigError, WeightsError
from shields.models.learned_baselines import UniversalModel
from shields.models.manipulation import Manipulator, wrap
from shields.protectors.learned_baselines import BaselineConfig, Cmua
from shields.weights import Card
from tests import baselines, tiny
from tests.training import trainer
from trainers.ars_targets import Task, distance
from trainers.cmua import CmuaTraining

pytestmark = baselines.QUIET

REACH, STEP = 6.375 / 255, 1.275 / 255


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path))
    return baselines.save_everything(tmp_path)


def small(**settings: object) -> CmuaTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "manipulators": ("small-fpgan", "small-stargan"), "size": 16, "steps": 3,
    }  # fmt: skip
    return CmuaTraining(**(defaults | settings))  # type: ignore[arg-type]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def twice(module: CmuaTraining) -> Task:
    """A manipulator that doubles: what disrupts it most is known."""
    network: Manipulator = wrap(lambda image: 2 * image, native_range="unit")
    network.name = "twice"
    module.factors["twice"] = 1.0
    return Task(manipulator=network, condition="default")


class TestWalk:
    def test_every_step_goes_half_a_step_outwards_until_the_budget(self, packed: Path) -> None:
        module = small(steps=1)
        task, face = twice(module), torch.full((5, 3, 16, 16), 0.2)
        start = (torch.rand(1, 3, 16, 16, generator=rng()) * 2 - 1) * REACH
        once, far = module.walk(start, face, task, rng())
        away = (start + STEP * start.sign()).clamp(-REACH, REACH)
        torch.testing.assert_close(once, (start + away) / 2, atol=1e-7, rtol=0)
        # The distance where it began: a difference of twice the watermark, in [-1, 1].
        assert float(far) == pytest.approx(float((4 * start).square().mean()), rel=1e-4)
        module.steps = 60
        torch.testing.assert_close(
            module.walk(start, face, task, rng())[0], REACH * start.sign(), atol=1e-6, rtol=0
        )

    def test_a_factor_and_the_momentum_say_how_far(self, packed: Path) -> None:
        module = small(steps=1, momentum=0.9)
        task, face = twice(module), torch.full((2, 3, 16, 16), 0.2)
        module.factors["twice"] = 3.0
        start = torch.full((1, 3, 16, 16), 1 / 255)
        once = module.walk(start, face, task, rng())[0]
        wanted = 0.9 * start + 0.1 * min(REACH, 3 * (1 / 255 + STEP))
        torch.testing.assert_close(once, wanted, atol=1e-7, rtol=0)

    def test_the_authors_walk_forgets_half_of_what_was_gathered(self, packed: Path) -> None:
        task = twice(module := small(steps=1, variant="faithful"))
        face = torch.full((400, 3, 4, 4), 0.2)
        start = torch.full((1, 3, 4, 4), REACH)
        found = module.walk(start, face, task, rng())[0]
        assert found.min() > 0.4 * REACH
        assert found.max() < 0.6 * REACH
        module.variant = "corrected"
        torch.testing.assert_close(module.walk(start, face, task, rng())[0], start)

    def test_manipulators_follow_one_another_with_conditions_by_turns(
        self, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = small()
        met, walk = [], module.walk

        def spy(watermark, face, task, generator):
            met.append((task.manipulator.name, task.condition))
            return walk(watermark, face, task, generator)

        monkeypatch.setattr(module, "walk", spy)
        baselines.fit(module, packed, tmp_path, 2)
        names = ["small-fpgan", "small-stargan"]
        assert met == [(name, condition) for condition in ("smiling", "not_smiling")
                       for name in names]  # fmt: skip


class TestTraining:
    def test_it_begins_where_there_is_a_gradient(self, packed: Path) -> None:
        value = small().universal.value.detach()
        assert 0 < value.abs().max() <= 1 / 255

    def test_forgeries_move_away_and_the_budget_holds(self, packed: Path, tmp_path: Path) -> None:
        module = small(levels=20.0, region=(1.0, 1.0))
        watch = baselines.fit(module, packed, tmp_path)
        assert module.universal.value.abs().max() <= 20 / 255 + 1e-7
        for name in ("small-fpgan", "small-stargan"):
            assert watch.change(f"distance_{name}") > watch.seen[0][f"distance_{name}"]

    def test_photos_it_never_saw_are_disrupted(self, packed: Path, tmp_path: Path) -> None:
        module, face = small(levels=20.0), tiny.faces_image(4, 16, seed=9)

        def moved() -> float:
            task = module._tasks[0][0]
            forged = task.forge_clean(module.protect(face))
            return float(distance(forged, task.forge_clean(face)).mean())

        before = moved()
        baselines.fit(module, packed, tmp_path, 10)
        assert moved() > 3 * before

    def test_one_batch_of_everything(self, packed: Path, tmp_path: Path) -> None:
        run = trainer(tmp_path, fast_dev_run=True, callbacks=[])
        run.fit(small(), baselines.packs(packed, 1))
        assert 0 <= float(run.callback_metrics["val_success_mean"]) <= 1

    @pytest.mark.parametrize("variant", ["corrected", "faithful"])
    def test_stop_and_resume_equals_going_through(
        self, packed: Path, tmp_path: Path, variant: str
    ) -> None:
        baselines.check_resume(lambda: small(variant=variant), packed, tmp_path)

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"variant": "faithfull"}, "no variant is called 'faithfull'; did you mean faithful"),
            ({"steps": 0}, "`steps` must be 1 or more"),
            ({"momentum": 1.0}, "`momentum` in"),
            ({"factors": {"small-gan": 2.0}}, "factors are given for small-gan; there are: small"),
        ],
    )
    def test_settings_that_make_no_sense_are_explained(
        self, packed: Path, wrong: dict[str, object], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            small(**wrong)


class TestShipping:
    def test_the_budget_holds_in_files(self, packed: Path, tmp_path: Path) -> None:
        module = small(steps=10)
        baselines.fit(module, packed, tmp_path, 2)
        baselines.check_bound_after_png(module)

    def test_the_shipped_file_makes_the_same_bits(self, packed: Path, tmp_path: Path) -> None:
        module = small()
        card, model = baselines.exported("cmua", module, packed, tmp_path)
        assert (card.architecture, dict(card.config)) == ("universal", {"levels": 6.375})
        face = tiny.faces_image(2, 16)
        with torch.no_grad():
            wanted = module.perturbation(face)
        assert torch.equal(model.perturb(face, levels=6.375, rng=rng()), wanted)
        half = model.perturb(face, levels=3.1875, rng=rng())
        torch.testing.assert_close(half, wanted / 2)
        protector = Cmua(BaselineConfig(), generator=model)
        torch.testing.assert_close(protector(face, rng=rng()), wanted)
        assert model.perturb(tiny.faces_image(1, 21), levels=6.0, rng=rng()).shape[2:] == (21, 21)

    def test_files_of_something_else_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "t.safetensors"
        known = {"levels": 6.0}
        for state, config, said in (
            ({"weight": torch.zeros(3, 4, 4)}, known, "one tensor 'universal'"),
            ({"universal": torch.zeros(4, 4)}, known, r"got universal \(4, 4\)"),
            ({"universal": torch.zeros(3, 4, 4)}, {}, "`levels` in"),
        ):
            save_file(state, file)
            card = Card(
                name="t", role="generator", architecture="universal", file=file.name, config=config
            )  # fmt: skip
            with pytest.raises(WeightsError, match=said):
                UniversalModel.load(file, card)

    def test_without_a_generator_it_says_what_to_do(self) -> None:
        with pytest.raises(ConfigError, match=r"--generator .*shields train cmua export"):
            Cmua()

    def test_the_recipe_names_settings_that_exist(self) -> None:
        baselines.check_recipe("cmua-smile", CmuaTraining)
