"""The manipulators that ship: they load with no download, obey their contract, and are as told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from shields import models
from shields.models.inspection import inspect
from shields.weights import WeightStore
from tests import tiny

ROOT = Path(__file__).parents[1]
STORE = WeightStore(ROOT / "checkpoints")
SHIPPED = [
    name
    for name in STORE.names()
    if (card := STORE.card(name)).role == "manipulator" and card.training
]


def test_three_architectures_or_more_ship() -> None:
    assert len({STORE.card(name).architecture for name in SHIPPED}) >= 3


@pytest.mark.parametrize("name", SHIPPED)
def test_it_obeys_its_contract_at_a_size_that_is_not_its_own(name: str) -> None:
    model = models.load("manipulator", name, store=STORE, device=torch.device("cpu"))
    found = inspect(model, size=100, rng=torch.Generator().manual_seed(0))
    assert found.passed, found.checks


@pytest.mark.parametrize("name", SHIPPED)
def test_smile_and_no_smile_differ(name: str) -> None:
    model = models.load("manipulator", name, store=STORE, device=torch.device("cpu"))
    image = tiny.faces_image(2, 64)
    smiling, serious = (model(image, condition) for condition in model.conditions[:2])
    assert (smiling - serious).abs().mean() > 1e-3


@pytest.mark.parametrize("name", SHIPPED)
def test_its_card_meets_what_was_asked_for_and_the_readme_says_the_same(name: str) -> None:
    card = STORE.card(name)
    results = card.results
    assert card.bytes <= 6e6
    assert results["success"] >= 0.7
    assert results["identity"] >= 0.5
    assert results["reconstruction_psnr"] >= 25
    row = re.search(rf"^\| `{name}` \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert row is not None
    cells = [cell.strip() for cell in row[0].strip("|").split("|")]
    assert cells[2:] == [
        f"{card.bytes / 1e6:.1f} MB",
        f"{results['success']:.0%}".replace("%", " %"),
        f"{results['identity']:.2f}",
        f"{results['reconstruction_psnr']:.1f} dB",
        f"{results['alpha']:.3f}",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_it_runs_in_half_precision_too(name: str) -> None:
    model = models.load("manipulator", name, store=STORE, device=torch.device("cpu"))
    image = tiny.faces_image(1, 96).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        forged = model(image)
    forged.float().sum().backward()
    assert image.grad is not None
    torch.testing.assert_close(forged.float(), model(image), atol=0.1, rtol=0)
