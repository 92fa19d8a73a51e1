"""`make bench`: one pass forward and backward of each manipulator at 256 x 256, full width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shields.models.hisd import HiSDModel
from shields.models.hisd_network import HisdGenerator
from shields.models.manipulation import Manipulator
from shields.models.manipulators import CELEBA_FIVE, AGGANModel, FPGANModel, StarGANModel
from shields.models.relgan import RelGANModel
from shields.models.relgan_network import RelganGenerator
from shields.models.star_networks import AttentionGenerator, FixedPointGenerator, StarGenerator
from tests import tiny
from tests.bench.test_speed import DEVICES, report, seconds

BUILDERS: dict[str, Callable[[], Manipulator]] = {
    "stargan": lambda: StarGANModel(StarGenerator(), CELEBA_FIVE),
    "aggan": lambda: AGGANModel(AttentionGenerator(), CELEBA_FIVE),
    "fpgan": lambda: FPGANModel(FixedPointGenerator(), CELEBA_FIVE),
    "relgan": lambda: RelGANModel(RelganGenerator(5), CELEBA_FIVE, 1),
    "hisd": lambda: HiSDModel(HisdGenerator()),
}


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("name", BUILDERS)
def test_forward_and_backward(benchmark: Any, name: str, where: str) -> None:
    device = torch.device(where)
    with tiny.seeded(0):
        model = BUILDERS[name]().to(device)
    model.name = name
    image = tiny.faces_image(1, 256).to(device).requires_grad_(True)
    condition = model.condition()

    def run() -> None:
        torch.autograd.grad(model(image, condition).square().sum(), image)

    run()
    benchmark.pedantic(run, rounds=3)
    took = sorted(seconds(run, device) for _ in range(3))[1]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    text = f"{name} {device}: {took:.2f} s forward and backward, {millions:.1f} M parameters"
    report(benchmark, text, seconds=took)
