"""`make bench`: speed as ratios, measured side by side in one run; nothing here is asserted.

Networks have the sizes of the embedded ones and random weights: speed does not depend on weights.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shields.models.autoencoders import PortraitAutoencoderModel
from shields.models.networks import FaceEmbedder, PortraitAutoencoder
from shields.models.perceptual import DeepFeatures
from shields.models.recognizers import FaceEmbedderModel
from shields.pgd import PgdConfig, pgd
from shields.protectors.facelock import FaceLock, FaceLockConfig
from shields.provenance import hardware
from tests import tiny
from tests.bench.reference import plain_facelock

CUDA = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no CUDA device"))]
STEPS = 20


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def networks(device: torch.device) -> dict[str, Any]:
    with tiny.seeded(0):
        autoencoder = PortraitAutoencoderModel(PortraitAutoencoder()).to(device)
        recognizer = FaceEmbedderModel(FaceEmbedder(), None).to(device)
    autoencoder.name = "portrait-ae"
    perceptual = DeepFeatures(autoencoder)
    return {"autoencoder": autoencoder, "recognizer": recognizer, "perceptual": perceptual}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def side_by_side(
    ours: Callable[[], object], theirs: Callable[[], object], device: torch.device, rounds: int
) -> tuple[float, list[float]]:
    """Median ratio theirs / ours over alternating rounds, and the ratios."""
    ours(), theirs()
    ratios = [seconds(theirs, device) / seconds(ours, device) for _ in range(rounds)]
    return sorted(ratios)[len(ratios) // 2], ratios


def report(benchmark: Any, text: str, **values: object) -> None:
    benchmark.extra_info.update(values, hardware=hardware(), threads=torch.get_num_threads())
    sys.stderr.write(f"\n{text}\n")


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_facelock_against_a_plain_loop(benchmark: Any, device: torch.device, batch: int) -> None:
    if device.type == "cpu" and batch == 16:
        pytest.skip("batch 16 is the GPU's case")
    loaded = networks(device)
    config = dataclasses.replace(FaceLockConfig.paper(), steps=STEPS)
    if device.type == "cuda":
        config = dataclasses.replace(config, precision="bfloat16")
    image = tiny.faces_image(batch, 256).to(device)
    points = tiny.landmarks(batch, 256).to(device)
    protector = FaceLock(config, **loaded)

    def ours() -> Tensor:
        return protector(image, rng=torch.Generator().manual_seed(0), landmarks=points)

    def theirs() -> Tensor:
        return plain_facelock(image, points, **loaded, config=config)

    ratio, ratios = side_by_side(ours, theirs, device, rounds=3)
    benchmark.pedantic(ours, rounds=3)
    text = f"FaceLock {device} batch {batch}: {ratio:.2f}x a plain loop, per image"
    report(benchmark, text, ratio=ratio, ratios=ratios, batch=batch, steps=STEPS)


def test_loop_overhead(benchmark: Any, device: torch.device) -> None:
    loaded = networks(device)
    image = tiny.faces_image(1, 256).to(device)
    mask = torch.ones_like(image[:, :1])
    protector = FaceLock(
        FaceLockConfig(), autoencoder=loaded["autoencoder"], recognizer=loaded["recognizer"]
    )
    rng = torch.Generator().manual_seed(0)
    points = tiny.landmarks(1, 256).to(device)
    objective = protector.objective(image, mask, landmarks=points, rng=rng)
    inside = [0.0]

    def timed(view: Tensor, step: Any) -> Tensor:
        began = time.perf_counter()
        value = objective(view, step)
        inside[0] += time.perf_counter() - began
        return value

    def walk() -> None:
        config = PgdConfig(steps=STEPS)
        pgd(image, timed, protector.config.budget, config, mask=mask, rng=rng)

    def bare() -> None:
        """The networks' forward and backward passes and nothing else."""
        from shields.types import Step

        for index in range(STEPS):
            view = image.clone().requires_grad_(True)
            value = objective(view, Step(index=index, total=STEPS, rng=rng)).sum()
            torch.autograd.grad(value, view)

    ratio, ratios = side_by_side(bare, walk, device, rounds=5)
    benchmark.pedantic(walk, rounds=3)
    text = f"loop overhead {device}: {100 * (ratio - 1):.1f} % beyond the networks"
    report(benchmark, text, overhead=ratio - 1, ratios=ratios)


def test_cost_is_linear_in_steps(benchmark: Any) -> None:
    device = torch.device("cpu")
    loaded = networks(device)
    image, points = tiny.faces_image(1, 256), tiny.landmarks(1, 256)

    def run(steps: int) -> Callable[[], object]:
        config = dataclasses.replace(FaceLockConfig(), steps=steps)
        protector = FaceLock(
            config, autoencoder=loaded["autoencoder"], recognizer=loaded["recognizer"]
        )
        return lambda: protector(image, rng=torch.Generator().manual_seed(0), landmarks=points)

    ratio, ratios = side_by_side(run(10), run(40), device, rounds=3)
    benchmark.pedantic(run(10), rounds=3)
    report(benchmark, f"4x the steps cost {ratio:.2f}x", ratio=ratio, ratios=ratios)


_MEASURE = """
import sys, time, resource
import numpy as np, torch
from PIL import Image
from shields.photo import read, write
from shields.protectors.facelock import FaceLock, FaceLockConfig
from shields.models.detectors import MtcnnDetector
from shields.shield import Shield
from tests.bench.test_speed import networks
from skimage.data import astronaut
import dataclasses, pathlib
side = int(sys.argv[1]); folder = pathlib.Path(sys.argv[2])
face = Image.fromarray(astronaut()).resize((side * 4 // 3, side))
face.save(folder / f"{side}.png")
device = torch.device("cpu")
loaded = networks(device); loaded.pop("perceptual")
shield = Shield(FaceLock(dataclasses.replace(FaceLockConfig(), steps=20), **loaded),
                detector=MtcnnDetector.load(device=device))
began = time.perf_counter()
photo = read(folder / f"{side}.png")
result = shield.protect(photo)
between = time.perf_counter()
write(folder / f"{side}-protected.png", result.pixels, photo)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(between - began, time.perf_counter() - between, peak)
"""


@pytest.mark.parametrize("side", [480, 1500, 3000], ids=["0.3 MP", "3 MP", "12 MP"])
def test_photo_size(benchmark: Any, tmp_path: Path, side: int) -> None:
    def run() -> list[float]:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        output = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(side), str(tmp_path)],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return [float(value) for value in output.stdout.split()]

    protect, write, peak = benchmark.pedantic(run, rounds=1)
    text = (
        f"{side * side * 4 // 3 / 1e6:.1f} MP: {protect:.2f} s to read, detect and protect in "
        f"{STEPS} steps, {write:.2f} s to write PNG, peak memory {peak:.0f} MiB"
    )
    report(benchmark, text, protect=protect, write=write, peak_mib=peak)
