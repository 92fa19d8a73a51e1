"""`make bench`: a training step of ARS and of ID-Guard against the bare passes of its networks.

The bare step is every forward and backward pass through a network that the method asks for, on
tensors that are there already. What the trainer adds is all the rest: Lightning, the data, cutting
faces, ARS's perturbation module, masks, the optimizer, averaged weights. Manipulators are the
shipped ones, generators are random; speed does not depend on weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from tests.bench.test_speed import CUDA, report
from trainers.ars import ArsTraining
from trainers.data import FacePacks
from trainers.idguard import IdGuardTraining

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WARM, ROUNDS, BATCH, SIZE = 1, 5, 8, 96
Bare = Callable[[Any, Tensor, Tensor], None]


def slope(run: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Forward and backward of a frozen network: the gradient at its image."""
    leaf = image.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(run(leaf).float().square().mean(), leaf)
    return gradient


def bare_ars(module: Any, face: Tensor, landmarks: Tensor) -> None:
    """The passes of Eqs. 2, 8 and 10, one condition a manipulator."""
    generator, adversary, epsilon = module.generator, module.adversary, module.levels / 255
    networks = [tasks[0].forge for tasks in module._tasks]
    with torch.no_grad():
        for forge in networks:
            forge(face)
    basic = generator.shape(face, module.levels)
    first = (face + basic * epsilon).clamp(0, 1)
    final = generator.robust(face, basic.detach(), module.levels)
    view = (face + final * epsilon).clamp(0, 1)
    cleaned = adversary(view.detach())
    pull = sum(slope(forge, cleaned) for forge in networks)
    torch.autograd.grad(cleaned, list(adversary.parameters()), pull)
    adversary.requires_grad_(False)
    again = adversary(view)
    pulls = [sum(slope(forge, image) for forge in networks) for image in (first, view, again)]
    torch.autograd.grad([first, view, again], list(generator.parameters()), pulls)
    adversary.requires_grad_(True)


def bare_idguard(module: Any, face: Tensor, landmarks: Tensor) -> None:
    """The passes of algorithm 1: both branches, one condition a manipulator, and the heat map."""
    recognizer = module._watching[0]
    matrix = recognizer.matrix(landmarks, face)
    slope(lambda image: recognizer(image, matrix), face)
    views = module.views(face)
    pulls = [torch.zeros_like(face) for _ in views]
    for number, manipulator in enumerate(module._manipulators):
        name = module._asked[number][0]

        def see(image: Tensor, manipulator: Any = manipulator, name: str = name) -> Tensor:
            forged, features = manipulator.outputs(image, name)
            seen = recognizer.features(recognizer.align(forged, matrix))[-1]
            parts = [forged, seen] if features is None else [forged, seen, features]
            return torch.cat([part.flatten() for part in parts])

        with torch.no_grad():
            see(face)
        for place, view in enumerate(views):
            pulls[place] += slope(see, view)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    torch.autograd.grad(views, learning, pulls)


class Beside(pl.Callback):
    """Times whole steps, the fetching of their batch included, and after each one the bare one."""

    def __init__(self, bare: Bare) -> None:
        self.bare, self.rounds = bare, []
        self.began = (0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = _clocks()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: object, batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:  # fmt: skip
        step = _since(self.began)
        face = batch["face"][..., :SIZE, :SIZE].float() / 255
        began = _clocks()
        self.bare(pl_module, face.contiguous(), batch["landmarks"])
        bare = _since(began)
        if batch_idx >= WARM:
            self.rounds.append((step, bare))
        self.began = _clocks()


def _clocks() -> tuple[float, float]:
    """Wall clock, and the clock that ratios go by: on CPUs that of this process alone."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter(), time.perf_counter() if CUDA else time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    now = _clocks()
    return now[0] - began[0], now[1] - began[1]


def _ars() -> ArsTraining:
    return ArsTraining(("stargan-smile",), size=SIZE)


def _idguard() -> IdGuardTraining:
    return IdGuardTraining(
        ("stargan-smile", "aggan-smile", "fpgan-smile"), judge="face-embedder",
        settings={"width": 32}, prior="random", alpha=(1.0, 1.0, 1.0), size=SIZE,
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], Any], Bare]] = {
    "ars": (_ars, bare_ars),
    "idguard": (_idguard, bare_idguard),
}


@pytest.mark.parametrize("name", CASES)
def test_overhead_of_a_step(benchmark: Any, name: str, tmp_path: Path) -> None:
    build, bare = CASES[name]
    save_file(
        {
            "faces": (tiny.faces_image(40, 112) * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(40, 112),
            "identity": torch.arange(40) // 2,
        },
        tmp_path / "pack.safetensors",
        metadata={"identities": json.dumps([f"person {i}" for i in range(20)])},
    )
    with tiny.seeded(0):
        module = build()
    beside = Beside(bare)
    packs = FacePacks([tmp_path / "pack.safetensors"], batch=BATCH, batches=WARM + ROUNDS)
    run = pl.Trainer(
        accelerator="gpu" if CUDA else "cpu", devices=1, max_epochs=1, limit_val_batches=0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[beside],
    )  # fmt: skip
    benchmark.pedantic(lambda: run.fit(module, packs), rounds=1)
    ratios = sorted(step[1] / networks[1] for step, networks in beside.rounds)
    ratio = ratios[len(ratios) // 2]
    fastest = min(step[0] for step, _ in beside.rounds)
    text = (
        f"{name}: {BATCH / fastest:.1f} images/s at {SIZE} pixels, batch {BATCH}; "
        f"{100 * (ratio - 1):.0f} % beyond its networks' passes"
    )
    report(benchmark, text, overhead=ratio - 1, ratios=ratios, seconds=fastest)
