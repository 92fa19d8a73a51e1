"""The loop: closed forms first, then steps, start, safety and precision."""

import math

import pytest
import torch

from shields.budget import Budget, per_sample_norm
from shields.errors import ConfigError, ShieldsError
from shields.pgd import PgdConfig
from tests import tiny
from tests.climbing import SIZE, climb, encoder_objective, generator, linear


class TestClosedForm:
    @pytest.mark.parametrize("start", ["uniform", "zero"])
    @pytest.mark.parametrize("levels", [2.55, 8.0, 60.0])
    def test_sign_steps_reach_the_corner_of_the_box_exactly(self, start, levels):
        image = torch.rand(2, 3, SIZE, SIZE, generator=generator(3))  # near 0 and 1 too
        mask = torch.rand(2, 1, SIZE, SIZE, generator=generator(4))
        mask[:, :, :4] = 0
        slope, objective = linear()
        low, high = Budget(levels=levels).bounds(image, mask)
        found = climb(image, objective, mask, levels=levels, step=levels / 4, steps=10, start=start)
        assert torch.equal(found, torch.where(slope > 0, high, low))

    def test_normalised_steps_reach_the_rim_of_the_ball_along_the_slope(self, mask):
        image = torch.full((2, 3, SIZE, SIZE), 0.5)
        slope, objective = linear()
        found = climb(
            image, objective, mask, levels=200, norm="l2", update="l2", step=100, steps=60
        )
        best = (200 / 255) * slope / slope.norm()
        assert torch.allclose(found, best.expand_as(found), atol=1e-5)

    def test_a_normalised_step_does_not_spend_its_length_where_nothing_may_move(self, mask):
        image = torch.full((2, 3, SIZE, SIZE), 0.5)
        mask[..., : SIZE // 2] = 0
        _, objective = linear()
        found = climb(
            image,
            objective,
            mask,
            levels=500,
            norm="l2",
            update="l2",
            step=50,
            steps=1,
            start="zero",
        )
        assert torch.allclose(per_sample_norm(found).flatten(), torch.full((2,), 50 / 255))
        assert (found[..., : SIZE // 2] == 0).all()

    def test_adam_reaches_the_corner_of_the_box(self, image, mask):
        slope, objective = linear()
        found = climb(image, objective, mask, update="adam", step=1.0, steps=40, start="zero")
        assert torch.equal(found.sign(), slope.sign().expand_as(found))
        assert torch.allclose(found.abs(), torch.full_like(found, 8 / 255))

    def test_tanh_space_starts_at_the_photo_and_ends_inside_the_budget(self, image, mask):
        slope, objective = linear()
        settings = {"update": "adam", "space": "tanh", "start": "zero"}
        still = climb(image, objective, mask, step=1e-9, steps=1, **settings)
        assert still.abs().max() < 1e-5
        found = climb(image, objective, mask, step=0.05, steps=40, **settings)
        assert torch.equal(found.sign(), slope.sign().expand_as(found))
        assert found.abs().max() <= 8 / 255
        assert found.abs().min() > 7.9 / 255

    def test_tanh_space_can_start_at_mid_grey(self, image, mask):
        found = climb(
            image, linear()[1], mask, levels=255, update="adam", space="tanh", start="grey",
            step=1e-9, steps=1,
        )  # fmt: skip
        assert torch.allclose(image + found, torch.full_like(image, 0.5), atol=1e-6)

    def test_tanh_space_survives_black_and_white_pixels(self, mask):
        image = torch.zeros(2, 3, SIZE, SIZE)
        image[:, :, ::2] = 1
        found = climb(
            image, linear()[1], mask, update="adam", space="tanh", start="zero", step=0.1, steps=5
        )
        assert found.isfinite().all()
        assert ((image + found) >= 0).all()
        assert ((image + found) <= 1).all()


class TestSteps:
    def test_linear_decay_ends_at_about_a_fiftieth(self):
        config = PgdConfig(step=3.0, steps=100, decay="linear")
        assert config.step_at(0) == 3.0
        assert config.step_at(99) == pytest.approx(0.0199 * 3.0)
        assert sum(config.step_at(index) for index in range(100)) == pytest.approx(
            0.51 * 3.0 * 100, rel=0.02
        )

    def test_a_constant_step_stays(self):
        assert {PgdConfig(step=2.0).step_at(index) for index in (0, 50, 99)} == {2.0}

    def test_the_walk_travels_by_the_decayed_steps(self, image, mask):
        _, objective = linear()
        found = climb(
            image, objective, mask, levels=20, step=1.0, steps=10, decay="linear", start="zero"
        )
        travel = sum(1 - 0.99 * index / 10 for index in range(10)) / 255
        assert torch.allclose(found.abs(), torch.full_like(found, travel), atol=1e-6)

    def test_steps_below_a_level_add_up(self, image, mask):
        found = climb(image, linear()[1], mask, step=0.003, steps=100, start="zero")
        assert torch.allclose(found.abs(), torch.full_like(found, 0.3 / 255), atol=1e-6)

    def test_momentum_keeps_going_where_the_gradient_turns(self, image, mask):
        slope, _ = linear()

        def objective(view, step):  # three steps up, then a weak push back
            return (view * slope).flatten(1).sum(dim=1) * (1.0 if step.index < 3 else -0.1)

        settings = {"step": 1.0, "steps": 4, "start": "zero"}
        plain = climb(image, objective, mask, **settings)
        carried = climb(image, objective, mask, momentum=0.9, **settings)
        along = slope.sign().expand_as(plain) / 255
        assert torch.allclose(plain, 2 * along, atol=1e-6)
        assert torch.allclose(carried, 4 * along, atol=1e-6)

    def test_momentum_weighs_steps_alike_however_long_their_gradients_are(self, image, mask):
        slope, _ = linear()

        def objective(view, step):  # the second gradient is huge and points back
            factor = 1.0 if step.index == 0 else -1e6
            return (view * slope).flatten(1).sum(dim=1) * factor

        found = climb(image, objective, mask, momentum=0.5, step=1.0, steps=2, start="zero")
        # velocity: +1, then 0.5 - 1 < 0: one step forth, one back
        assert found.abs().max() < 1e-6

    def test_smoothing_lets_a_neighbourhood_outvote_a_lone_pixel(self, mask):
        image = torch.full((2, 3, SIZE, SIZE), 0.5)
        slope = torch.ones(1, 3, SIZE, SIZE)
        slope[..., 8, 8] = -2.0

        def objective(view, step):
            return (view * slope).flatten(1).sum(dim=1)

        plain = climb(image, objective, mask, step=1.0, steps=1, start="zero")
        smooth = climb(image, objective, mask, step=1.0, steps=1, start="zero", smooth=7)
        assert (plain[..., 8, 8] < 0).all()
        assert (smooth > 0).all()

    def test_the_smoothing_kernel_sums_to_one_and_stays_within_its_colour(self, mask):
        image = torch.full((2, 3, SIZE, SIZE), 0.5)
        slope = torch.zeros(1, 3, SIZE, SIZE)
        slope[:, 1, 8, 8] = 1.0
        found = climb(
            image, lambda view, step: (view * slope).flatten(1).sum(dim=1), mask,
            norm="l2", levels=100, update="l2", step=10, steps=1, start="zero", smooth=5,
        )  # fmt: skip
        assert (found[:, [0, 2]] == 0).all()
        assert (found[:, 1] > 0).sum() == 2 * 25


class TestStart:
    def test_a_uniform_start_fills_the_budget_and_is_the_same_for_every_sample(self, image, mask):
        seen = []

        def objective(view, step):
            seen.append(view.detach() - image)
            return view.flatten(1).sum(dim=1)

        climb(image, objective, mask, steps=1)
        assert torch.allclose(seen[0][0], seen[0][1], atol=1e-6)
        assert seen[0].abs().max() <= 8 / 255 + 1e-6
        assert seen[0].abs().mean() == pytest.approx(4 / 255, rel=0.1)

    def test_a_given_start_is_used_after_it_is_brought_into_the_budget(self, image, mask):
        seen = []

        def objective(view, step):
            seen.append(view.detach() - image)
            return view.flatten(1).sum(dim=1)

        climb(image, objective, mask, steps=1, given=torch.full_like(image, 0.9))
        assert torch.allclose(seen[0], torch.full_like(image, 8 / 255), atol=1e-6)

    def test_no_budget_and_no_mask_mean_no_perturbation_and_no_work(self, image, mask):
        def objective(view, step):
            raise AssertionError("must not be asked")

        assert (climb(image, objective, mask, levels=0) == 0).all()
        assert (climb(image, objective, torch.zeros_like(mask)) == 0).all()


class TestSafety:
    def test_a_value_that_is_not_a_number_is_an_error(self, image, mask):
        with pytest.raises(ShieldsError, match="not finite at step 2"):
            climb(
                image,
                lambda view, step: (
                    view.flatten(1).sum(dim=1) + (math.nan if step.index == 2 else 0)
                ),
                mask,
            )

    def test_a_gradient_that_is_not_a_number_is_an_error(self, image, mask):
        with pytest.raises(ShieldsError, match="not finite at step 0"):
            climb(image, lambda view, step: (view - view).sqrt().flatten(1).sum(dim=1), mask)

    def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(self, image, mask):
        runs = [
            climb(image, encoder_objective(image), mask, steps=4, seed=seed) for seed in (7, 7, 8)
        ]
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_global_random_state_and_the_image_are_left_alone(self, image, mask):
        before, copy = torch.random.get_rng_state(), image.clone()
        climb(image, encoder_objective(image), mask, steps=2)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(image, copy)
        assert not image.requires_grad

    def test_progress_counts_every_step_and_reports_the_mean_objective(self, image, mask):
        seen = []
        climb(
            image, lambda view, step: view.flatten(1).mean(dim=1), mask, steps=3, start="zero",
            step=1.0, progress=lambda *values: seen.append(values),
        )  # fmt: skip
        assert [values[:2] for values in seen] == [(1, 3), (2, 3), (3, 3)]
        assert seen[0][2] == pytest.approx(float(image.mean()), rel=1e-5)
        assert seen[2][2] == pytest.approx(float(image.mean()) + 2 / 255, rel=1e-4)

    @pytest.mark.parametrize(
        "settings",
        [
            {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"draws": 0}, {"step": 0},
            {"step": math.nan}, {"momentum": 1.0}, {"momentum": -0.1}, {"smooth": 4},
            {"smooth": -1}, {"patience": -1}, {"start": "grey"}, {"space": "tanh"},
            {"update": "newton"}, {"precision": "int8"}, {"keep": "all"}, {"decay": "cosine"},
        ],
        ids=str,
    )  # fmt: skip
    def test_settings_that_make_no_sense_are_refused(self, settings):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            PgdConfig(**settings)


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_networks_end_within_five_percent_of_float32(image, mask, seed):
    objective = encoder_objective(image, seed)
    values = [
        objective(image + climb(image, objective, mask, steps=15, precision=precision), None)
        for precision in ("float32", "bfloat16")
    ]
    assert torch.allclose(values[1], values[0], rtol=0.05)


def test_float16_gradients_are_scaled_so_that_small_ones_survive(image, mask):
    """A gradient of 1e-8 lies below the smallest number of float16."""
    network = tiny.autoencoder()

    def objective(view, step):
        return 1e-8 * network.encode(view).flatten(1).sum(dim=1).to(torch.float32)

    found = climb(image, objective, mask, steps=1, start="zero", precision="float16", step=1.0)
    assert (found != 0).float().mean() > 0.9


def test_perturbations_stay_float32_whatever_the_networks_run_in(image, mask):
    found = climb(image, encoder_objective(image), mask, steps=2, precision="bfloat16")
    assert found.dtype == torch.float32
