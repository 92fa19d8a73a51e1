"""`make bench`: seconds an image of the methods in ARS's Table 4, and of ID-Guard, in one run.

All protect the same photo of 256 x 256. What is attacked, where anything is, is StarGAN at full
width; the iterative ones take the 10 steps of Disrupting Deepfakes. Weights are random: speed does
not depend on them. The paper attacked a larger network (pSp) and does not say in how many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shields.models.ars_network import SCALES, ArsGenerator
from shields.models.generators import ArsModel
from shields.models.idguard import IdGuardModel
from shields.models.idguard_network import ResNetGenerator
from shields.models.learned_baselines import TafimModel, TafimNetwork
from shields.models.manipulators import CELEBA_FIVE, StarGANModel
from shields.models.star_networks import StarGenerator
from shields.protectors.base import Protector
from shields.protectors.disrupting import Disrupting, DisruptingConfig
from shields.protectors.idguard_universal import IdGuard
from shields.protectors.learned import Ars, ArsConfig
from shields.protectors.learned_baselines import Tafim, TafimConfig
from tests import tiny
from tests.bench.test_speed import device, report, seconds

__all__ = ["device"]

_LEVELS, _STEPS, _ASKED = 12.75, 10, "blond_hair"


def _iterative(**settings: Any) -> Protector:
    model = StarGANModel(StarGenerator(), CELEBA_FIVE)
    config = DisruptingConfig(levels=_LEVELS, aim="white", conditions=_ASKED, **settings)
    return Disrupting(config, manipulator=model)


def _ars(scale: str) -> Protector:
    return Ars(ArsConfig(), generator=ArsModel(ArsGenerator(**SCALES[scale])))


METHODS: dict[str, Callable[[], Protector]] = {
    "fgsm": lambda: _iterative(steps=1, step=255.0, start="zero"),
    "pgd": lambda: _iterative(steps=_STEPS),
    "disrupt, spread-spectrum": lambda: _iterative(steps=_STEPS, blur="spread"),
    "tafim": lambda: Tafim(TafimConfig(), generator=TafimModel(TafimNetwork())),
    "ars, small": lambda: _ars("small"),
    "ars, paper": lambda: _ars("paper"),
    "idguard": lambda: IdGuard(generator=IdGuardModel(ResNetGenerator(), torch.zeros(3, 256, 256))),
}


@pytest.mark.parametrize("name", METHODS)
def test_seconds_an_image(benchmark: Any, name: str, device: torch.device) -> None:
    with tiny.seeded(0):
        protector = METHODS[name]()
    for network in protector.networks:
        network.to(device)
    image = tiny.faces_image(1, 256).to(device)

    took: list[float] = []

    def run() -> None:
        protector(image, rng=torch.Generator().manual_seed(0))

    iterative = getattr(protector.config, "steps", 1) > 1
    if not iterative:
        run()
    # On a CPU the methods of many steps need no warming up, and would take minutes.
    rounds = 1 if iterative and device.type == "cpu" else 3
    benchmark.pedantic(lambda: took.append(seconds(run, device)), rounds=rounds)
    middle = sorted(took)[rounds // 2]
    report(benchmark, f"{name} {device}: {middle:.3f} s an image", seconds=middle, all=took)
