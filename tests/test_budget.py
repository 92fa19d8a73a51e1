"""The ball, the mask and the valid range, held to what they say."""

import pytest
import torch

from shields.budget import Budget, per_sample_norm
from shields.errors import ConfigError


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("levels", "whole"),
    [(8, 8), (7.65, 7), (6.375, 6), (0, 0), (0.9, 0), (3.0000000001, 3), (400, 255)],
)
def test_a_saved_pixel_may_move_by_the_floor_of_the_levels(levels, whole):
    assert Budget(levels=levels).whole_levels == whole


def test_three_tenths_of_ten_levels_are_three_whole_ones_despite_rounding():
    assert Budget(levels=0.1 * 3 * 10).whole_levels == 3


def test_without_a_bound_every_change_of_a_byte_is_allowed():
    assert Budget(levels=2, norm="none").whole_levels == 255


@pytest.mark.parametrize("levels", [-1, float("nan"), float("inf")])
def test_levels_that_are_no_length_are_refused(levels):
    with pytest.raises(ConfigError, match="levels"):
        Budget(levels=levels)


def test_an_unknown_norm_is_refused():
    with pytest.raises(ConfigError, match="norm"):
        Budget(norm="l1")


@pytest.mark.parametrize("norm", ["linf", "l2", "none"])
def test_the_bounds_hold_mask_and_valid_range_at_once(norm, rng):
    image = torch.rand(2, 3, 6, 5, generator=rng)
    mask = torch.rand(2, 1, 6, 5, generator=rng)
    low, high = Budget(levels=20, norm=norm).bounds(image, mask)
    reach = 20 / 255 if norm == "linf" else 1.0
    assert torch.equal(low, torch.maximum((-reach * mask).expand_as(image), -image))
    assert torch.equal(high, torch.minimum((reach * mask).expand_as(image), 1 - image))
    assert ((image + high) <= 1).all()
    assert ((image + low) >= 0).all()


def test_projection_onto_the_euclidean_ball_shrinks_each_sample_on_its_own(rng):
    image = torch.full((2, 3, 8, 8), 0.5)
    change = 0.1 * torch.randn(2, 3, 8, 8, generator=rng)
    change[1] *= 1e-3
    budget = Budget(levels=25.5, norm="l2")
    projected = budget.project(change, *budget.bounds(image, torch.ones(2, 1, 8, 8)))
    assert per_sample_norm(projected).flatten()[0] == pytest.approx(0.1, rel=1e-5)
    direction = change[0] / change[0].norm()
    assert torch.allclose(projected[0], 0.1 * direction, atol=1e-7)
    assert torch.equal(projected[1], change[1]), "inside the ball nothing is changed"


@pytest.mark.parametrize("norm", ["linf", "l2", "none"])
def test_a_second_projection_changes_nothing(norm, rng):
    image = torch.rand(1, 3, 8, 8, generator=rng)
    mask = (torch.rand(1, 1, 8, 8, generator=rng) > 0.5).float()
    budget = Budget(levels=8, norm=norm)
    bounds = budget.bounds(image, mask)
    once = budget.project(torch.randn(1, 3, 8, 8, generator=rng), *bounds)
    assert torch.allclose(budget.project(once, *bounds), once, atol=1e-8)
    assert (once * (1 - mask) == 0).all()
