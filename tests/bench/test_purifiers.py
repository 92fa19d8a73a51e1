"""`make bench`: TIP-RSR against DiffPure, and how much of its time is not the networks'.

Equal network cost: one evaluation of DiffPure's denoiser is one run of TIP-RSR's general network
over the whole photo, the dearest of the three that TIP-RSR runs. So the ratio says how much less
work TIP-RSR is, whatever networks both are given; with the published ones it is another.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from robustness.purifiers.diffusion import DiffPure, DiffPureConfig
from robustness.purifiers.super_resolution import find_faces
from robustness.purifiers.tip_rsr import TipRsr, TipRsrConfig
from shields.models.restoration import Compact, CompactRestorer
from shields.models.unconditional import UnconditionalDiffusion
from shields.types import Face, Image, Photo
from tests import tiny
from tests.bench.test_speed import DEVICES, report, seconds

#: what DiffPure takes, evaluations of its network
STEPS = 100
#: sides of the photo; a CPU runs a hundred evaluations of a small one in a quarter of a minute
SIDES = {"cpu": 128, "cuda": 512}
BATCHES = [1, 4]


class Denoiser(nn.Module):
    """A denoiser that costs what an enlargement of the same photo costs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, state: Tensor, timestep: int) -> UNet2DOutput:
        made = self.network(state)
        return UNet2DOutput(sample=made[..., ::2, ::2])


class Clock:
    """Seconds spent inside networks and the detector."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.total, self.began = device, 0.0, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, network: nn.Module) -> None:
        def start(*_: object) -> None:
            self.began = self.now()

        def stop(*_: object) -> None:
            self.total += self.now() - self.began

        network.register_forward_pre_hook(start)
        network.register_forward_hook(stop)


class Watched:
    """A detector on a clock."""

    def __init__(self, finder: Any, clock: Clock) -> None:
        self.finder, self.clock = finder, clock

    def detect_batch(self, images: Image) -> list[list[Face]]:
        began = self.clock.now()
        found = find_faces(self.finder, images)
        self.clock.total += self.clock.now() - began
        return found


def restorer(device: torch.device) -> CompactRestorer:
    """The layout that ships, random but for its last layer, which changes nothing: faces stay."""
    with tiny.seeded(0):
        return CompactRestorer(Compact()).to(device)


def portraits(batch: int, side: int, device: torch.device) -> Image:
    data = pytest.importorskip("skimage.data")
    photo = Photo(pixels=data.astronaut()[:320, 64:384]).image(device)
    small = torch.nn.functional.interpolate(photo, (side, side), mode="bilinear", antialias=True)
    return small.clamp(0, 1).repeat(batch, 1, 1, 1)


def both(device: torch.device, side: int, clock: Clock) -> tuple[TipRsr, DiffPure]:
    from shields.models.detectors import MtcnnDetector

    network = restorer(device)
    with tiny.seeded(0):
        denoiser = UnconditionalDiffusion(Denoiser(Compact()).to(device), {}, size=side)
    clock.watch(network.network)
    finder = Watched(MtcnnDetector.load(device=device), clock)
    ours = TipRsr(TipRsrConfig(parser="none"), general=network, face=network, finder=finder)
    return ours, DiffPure(DiffPureConfig(timestep=STEPS), network=denoiser)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("where", DEVICES)
@torch.no_grad()
def test_tip_rsr_against_diffpure(benchmark: Any, where: str, batch: int) -> None:
    device = torch.device(where)
    side = SIDES[where]
    ours, theirs = both(device, side, Clock(device))
    image = portraits(batch, side, device)
    assert all(find_faces(ours.finder, image)), "no face to purify"
    ours.purify(image)
    benchmark.pedantic(lambda: ours.purify(image), rounds=3)
    own = sorted(seconds(lambda: ours.purify(image), device) for _ in range(5))[2]
    other = seconds(lambda: theirs.purify(image), device)
    text = (
        f"TIP-RSR {where} batch {batch}, {side} px: {own / batch:.3f} s an image, "
        f"{other / own:.1f} times faster than DiffPure in {STEPS} steps at equal network cost"
    )
    report(benchmark, text, seconds=own / batch, ratio=other / own, batch=batch, side=side)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("where", DEVICES)
@torch.no_grad()
def test_time_outside_the_networks(benchmark: Any, where: str, batch: int) -> None:
    device = torch.device(where)
    side = 2 * SIDES[where]
    clock = Clock(device)
    ours, _ = both(device, side, clock)
    image = portraits(batch, side, device)
    ours.purify(image)
    benchmark.pedantic(lambda: ours.purify(image), rounds=3)
    shares = []
    for _ in range(5):
        clock.total = 0.0
        whole = seconds(lambda: ours.purify(image), device)
        shares.append(1 - clock.total / whole)
    outside = sorted(shares)[2]
    text = f"TIP-RSR {where} batch {batch}, {side} px: {100 * outside:.1f} % outside the networks"
    report(benchmark, text, outside=outside, shares=shares, batch=batch, side=side)
