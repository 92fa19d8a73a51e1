"""The just-noticeable difference and the budget that follows it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from shields.protectors.facelock import Cvl, CvlConfig
from shields.visibility import just_noticeable
from tests import tiny


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0, 20.0), (127, 3.0), (255, 3 + 3 / 128 * 128), (32, 3 + 17 * (1 - math.sqrt(32 / 127)))],
)
def test_flat_grey_has_the_threshold_of_the_paper(level: int, expected: float) -> None:
    image = torch.full((1, 3, 12, 12), level / 255)
    assert torch.allclose(just_noticeable(image), torch.tensor(expected), atol=1e-3)


def test_an_edge_hides_more_and_only_near_it() -> None:
    image = torch.full((1, 3, 24, 24), 120 / 255)
    image[..., 12:] = 220 / 255
    threshold = just_noticeable(image)[0, 0]
    assert threshold[:, 11:13].min() > 1.5 * threshold[:, :8].max()


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_no_direction_is_preferred(turn: int) -> None:
    image = tiny.faces_image(1, 32)
    turned = just_noticeable(image.rot90(turn, (2, 3))).rot90(-turn, (2, 3))
    assert torch.allclose(turned, just_noticeable(image), atol=1e-4)


def test_stealth_stays_below_the_threshold_and_inside_the_budget() -> None:
    image, points = tiny.faces_image(2, 32), tiny.landmarks(2, 32)
    config = dataclasses.replace(CvlConfig(), steps=4, step=8.0, levels=12.0)
    plain, stealthy = (
        Cvl(dataclasses.replace(config, stealth=stealth), recognizer=tiny.recognizer())(
            image, rng=torch.Generator().manual_seed(0), landmarks=points
        ).abs()
        * 255
        for stealth in (False, True)
    )
    assert (stealthy <= just_noticeable(image) + 1e-3).all()
    assert stealthy.max() <= 12 + 1e-3
    assert stealthy.mean() < 0.8 * plain.mean()


@pytest.mark.parametrize("norm", ["l2", "none"])
def test_stealth_holds_for_budgets_that_are_no_box(norm: str) -> None:
    image, points = tiny.faces_image(2, 32), tiny.landmarks(2, 32)
    config = CvlConfig(steps=4, step=64.0, levels=4000.0, norm=norm, stealth=True)
    protector = Cvl(config, recognizer=tiny.recognizer())
    change = protector(image, rng=torch.Generator().manual_seed(0), landmarks=points).abs() * 255
    assert (change <= just_noticeable(image) + 1e-3).all()
    assert (change > 0.9 * just_noticeable(image)).float().mean() > 0.3
