"""The loop where the slope is zero, flat, noisy, or worse at the end than on the way."""

import math

import pytest
import torch

from shields.errors import ShieldsError
from tests import tiny
from tests.climbing import SIZE, climb, encoder_objective, linear


class TestZeroGradient:
    def test_an_ascent_objective_leaves_the_photo_where_its_gradient_is_zero(self, image, mask):
        objective = encoder_objective(image)
        view = image.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(view, None).sum(), view)
        assert (gradient == 0).all(), "the case is not the one that it should be"
        found = climb(image, objective, mask, start="zero", steps=5)
        assert (objective(image + found, None) > 0).all()
        assert (found.abs().flatten(1).mean(dim=1) > 1 / 255).all()

    def test_an_objective_that_ignores_the_image_is_an_error(self, image, mask):
        with pytest.raises(ShieldsError, match="does not depend"):
            climb(image, lambda view, step: 0 * view.flatten(1).sum(dim=1), mask)

    def test_an_objective_that_looks_only_where_the_mask_is_zero_is_an_error(self, image, mask):
        mask[..., : SIZE // 2] = 0
        with pytest.raises(ShieldsError, match="mask"):
            climb(image, lambda view, step: view[..., : SIZE // 2].flatten(1).sum(dim=1), mask)

    def test_a_sample_whose_mask_is_zero_does_not_stop_the_others(self, image, mask):
        mask[0] = 0
        found = climb(image, linear()[1], mask, steps=8, step=2)
        assert (found[0] == 0).all()
        assert found[1].abs().min() == pytest.approx(8 / 255, rel=1e-5)

    def test_a_still_neighbour_changes_nothing_for_a_sample_that_moves(self, image, mask):
        """The nudge and the second look must not use up draws of the others."""

        def objective_for(photo, offset):
            clean = photo + offset

            def objective(view, step):
                noise = torch.rand(view.shape[1:], generator=step.rng)
                return ((view - clean).square() * noise).flatten(1).sum(dim=1)

            return objective

        offset = torch.zeros_like(image)
        offset[1] = 0.01
        together = climb(image, objective_for(image, offset), mask, start="zero", steps=3)
        alone = climb(
            image[1:], objective_for(image[1:], offset[1:]), mask[1:], start="zero", steps=3
        )
        assert torch.equal(together[1:], alone)


class TestKeepAndPatience:
    def test_best_keeps_the_best_iterate_of_each_sample(self, mask):
        image = torch.full((2, 3, SIZE, SIZE), 0.5)
        # Each step overshoots the optimum at 3 levels: 2, 4, 2, 4 ... or 5, 0, 5, 0.
        goal = torch.tensor([0.5 + 3 / 255, 0.5 + 0.4 / 255]).view(2, 1, 1, 1)

        def objective(view, step):
            return -(view - goal).abs().flatten(1).mean(dim=1)

        settings = {"steps": 7, "step": 2.0, "start": "zero"}
        last = climb(image, objective, mask, **settings)
        best = climb(image, objective, mask, keep="best", **settings)
        values = objective(image + best, None)
        assert (values >= objective(image + last, None)).all()
        assert torch.allclose(values, torch.tensor([-1 / 255, -0.4 / 255]), atol=1e-6)

    def test_best_looks_at_the_last_iterate_too(self, image, mask):
        found = climb(image, linear()[1], mask, keep="best", steps=3, step=1.0, start="zero")
        assert torch.allclose(found.abs(), torch.full_like(found, 3 / 255), atol=1e-6)

    def test_a_sample_without_gain_stops_and_the_others_go_on(self, image, mask):
        slope, _ = linear()

        def objective(view, step):  # the first sample peaks early, the second never
            gain = ((view - image) * slope).flatten(1).sum(dim=1)
            cap = torch.tensor([gain[0].detach() * 0 + 1e-3, math.inf])
            return torch.minimum(gain, cap) + 1e-12 * gain

        done = []
        found = climb(
            image, objective, mask, levels=64, patience=3, steps=20, step=1.0, start="zero",
            progress=lambda step, total, value: done.append(step),
        )  # fmt: skip
        assert done[-1] == 20
        assert found[1].abs().min() == pytest.approx(20 / 255, rel=1e-4)
        # zero at the start, a rise after one step, then three looks without gain
        assert found[0].abs().max() == pytest.approx(4 / 255, rel=1e-4)

    def test_the_loop_ends_when_every_sample_is_flat(self, image, mask):
        done = []
        climb(
            image, lambda view, step: 1 + 1e-9 * view.flatten(1).sum(dim=1), mask, patience=4,
            steps=50, progress=lambda step, total, value: done.append((step, total)),
        )  # fmt: skip
        assert done[-1] == (5, 50), "one look sets the mark, four without gain follow"

    def test_a_sample_that_has_stopped_stays_stopped_as_it_would_alone(self, image, mask):
        slope, _ = linear()

        def objective_for(late):
            def objective(view, step):  # the late ones rise only when they have been stopped
                gain = (view * slope).flatten(1).sum(dim=1)
                value = torch.where(late & (step.index < 6), 1.0, 1.0 + step.index)
                return value + 1e-9 * (gain - gain.detach())

            return objective

        settings = {"patience": 2, "steps": 12, "start": "zero", "step": 0.5}
        together = climb(image, objective_for(torch.tensor([True, False])), mask, **settings)
        alone = climb(image[:1], objective_for(torch.tensor([True])), mask[:1], **settings)
        assert torch.equal(together[:1], alone)
        assert alone.abs().max() == pytest.approx(1 / 255, rel=1e-4), "two steps, then it stands"
        assert together[1].abs().max() == pytest.approx(6 / 255, rel=1e-4)


class TestDraws:
    def test_gradients_are_averaged_over_the_draws(self, image, mask):
        slope, objective = linear()
        scales = iter([1.0, -3.0])  # the mean points back
        found = climb(
            image, objective, mask, draws=2, steps=1, step=1.0, start="zero",
            transform=lambda view, rng: view * next(scales),
        )  # fmt: skip
        assert torch.allclose(found, -slope.sign().expand_as(found) / 255, atol=1e-6)

    def test_an_objective_with_noise_of_its_own_is_averaged_too(self, image, mask):
        calls = []

        def objective(view, step):
            calls.append(step.index)
            return view.flatten(1).sum(dim=1)

        climb(image, objective, mask, draws=3, steps=2)
        assert calls == [0, 0, 0, 1, 1, 1]

    def test_more_draws_bring_the_gradient_nearer_to_its_expectation(self, mask):
        image = torch.full((2, 3, SIZE, SIZE), 0.5)
        slope, objective = linear()

        def noisy(view, rng):
            return view * (1 + 4 * torch.randn(view.shape[1:], generator=rng))

        def agreement(draws):
            found = climb(
                image,
                objective,
                mask,
                draws=draws,
                steps=1,
                step=1.0,
                start="zero",
                transform=noisy,
            )
            return float((found.sign() == slope.sign()).float().mean())

        assert agreement(32) > agreement(1) + 0.1

    def test_rounding_shows_the_objective_whole_levels_and_lets_the_gradient_pass(self, mask):
        image = (tiny.faces_image(2, SIZE) * 255).round() / 255
        seen = []
        slope, _ = linear()

        def objective(view, step):
            seen.append(view.detach() * 255)
            return (view * slope).flatten(1).sum(dim=1)

        found = climb(image, objective, mask, rounding=True, steps=8, step=1.3)
        assert all(torch.allclose(view, view.round(), atol=1e-3) for view in seen)
        assert torch.equal(found.sign(), slope.sign().expand_as(found))
