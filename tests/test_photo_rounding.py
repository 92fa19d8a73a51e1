"""Rounding to whole levels: the budget holds in the file, not only before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shields.budget import Budget
from shields.errors import ImageError
from shields.photo import quantize
from tests.photos import NOISE


def _tensor(levels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(levels / 255).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("levels", [0.0, 0.5, 4.0, 6.375, 7.65, 8.0])
def test_rounding_never_exceeds_whole_levels(levels: float) -> None:
    change = np.random.default_rng(2).uniform(-levels, levels, NOISE.shape)
    result = quantize(NOISE, _tensor(change), Budget(levels=levels)).astype(int)
    assert np.abs(result - NOISE).max() <= int(levels)
    # independently: nearest, then clamped
    expected = np.clip(np.round(change), -int(levels), int(levels)) + NOISE
    assert np.abs(result - np.clip(expected, 0, 255)).max() == 0


def test_the_budget_is_reached_where_there_is_room() -> None:
    grey = np.full((4, 5, 3), 100, dtype=np.uint8)
    for sign in (1, -1):
        result = quantize(grey, torch.full((1, 3, 4, 5), sign * 8 / 255), Budget(levels=8))
        assert (result == 100 + sign * 8).all()


def test_zero_perturbation_or_mask_keeps_every_bit() -> None:
    change = np.random.default_rng(3).uniform(-8, 8, NOISE.shape)
    change[::2] = 0
    mask = torch.ones(1, 1, *NOISE.shape[:2])
    mask[..., 1::4] = 0
    result = quantize(NOISE, _tensor(change), Budget(levels=8), mask)
    assert np.array_equal(result[::2], NOISE[::2])
    assert np.array_equal(result[:, 1::4], NOISE[:, 1::4])
    assert not np.array_equal(result, NOISE)


def test_a_mask_scales_the_budget() -> None:
    grey = np.full((2, 2, 3), 100, dtype=np.uint8)
    mask = torch.tensor([[[[1.0, 0.5], [0.49, 0.1]]]])
    result = quantize(grey, torch.full((1, 3, 2, 2), 1.0), Budget(levels=8), mask)
    assert (result[..., 0] - 100).tolist() == [[8, 4], [3, 0]]


def test_l2_rounding_never_lengthens() -> None:
    rng = np.random.default_rng(4)
    for seed in range(5):
        change = rng.normal(size=NOISE.shape) * (seed + 1)
        tensor = _tensor(change)
        length = float(tensor.double().mul(255).norm())
        result = quantize(NOISE, tensor, Budget(levels=length, norm="l2"))
        assert 0 < np.linalg.norm(result.astype(float) - NOISE) <= length


def test_extremes_do_not_wrap() -> None:
    ends = np.array([[[0, 255, 128]]], dtype=np.uint8)
    for sign, expected in ((-1, [0, 247, 120]), (1, [8, 255, 136])):
        result = quantize(ends, torch.full((1, 3, 1, 1), sign * 8 / 255), Budget(levels=8))
        assert result[0, 0].tolist() == expected
    free = quantize(ends, torch.full((1, 3, 1, 1), -1.0), Budget(norm="none"))
    assert free.max() == 0


def test_strips_agree_with_the_whole() -> None:
    rng = np.random.default_rng(5)
    tall = rng.integers(0, 256, (700, 3, 3), dtype=np.uint8)
    change = rng.uniform(-8, 8, tall.shape)
    mask = torch.from_numpy(rng.uniform(0, 1, (1, 1, 700, 3))).float()
    whole = quantize(tall, _tensor(change), Budget(levels=8), mask)
    rows = [
        quantize(
            tall[i : i + 1], _tensor(change[i : i + 1]), Budget(levels=8), mask[:, :, i : i + 1]
        )
        for i in range(700)
    ]
    assert np.array_equal(whole, np.concatenate(rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    broken = torch.zeros(1, 3, 24, 32)
    broken[0, 1, 2, 3] = value
    with pytest.raises(ImageError, match="finite"):
        quantize(NOISE, broken, Budget())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ImageError, match="is needed, got"):
        quantize(NOISE, torch.zeros(1, 3, 24, 31), Budget())
    with pytest.raises(ImageError, match="is needed, got"):
        quantize(NOISE, torch.zeros(1, 3, 24, 32), Budget(), torch.ones(1, 3, 24, 32))
