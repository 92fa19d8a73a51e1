"""Two batches of a trainer by one or by two processes; what the optimizers saw goes to a file.

`python ddp_run.py KIND,KIND… PACK OUTPUT PROCESSES`, a kind is "ars" or "idguard:STRATEGY".
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.training import trainer
from trainers.ars import ArsTraining
from trainers.ars_perturbation import PerturbationModule
from trainers.data import FacePacks
from trainers.idguard import IdGuardTraining
from trainers.parallel import PlayersInTurn


class Watch(pl.Callback):
    """Notes the photos of every batch, and the gradients of every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append({"photos": batch["face"].clone()})

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        own = {id(value) for group in optimizer.param_groups for value in group["params"]}
        self.seen.append({
            name: value.grad.clone() for name, value in pl_module.named_parameters()
            if id(value) in own and value.grad is not None
        })  # fmt: skip


def module(kind: str) -> pl.LightningModule:
    """Networks without batch normalisation, whose statistics are a process's own."""
    pl.seed_everything(0, verbose=False)
    name, _, strategy = kind.partition(":")
    if name == "ars":
        training = ArsTraining(
            ("small-ae", "small-gan"), widths=(8, 8), channels=8, size=16, adversary_widths=(8, 8)
        )
        # Single pixels are drawn for every photo, so it matters how many a process has.
        training.perturbation = PerturbationModule(drop=None)
        return training
    return IdGuardTraining(
        manipulators=("small-gan", "small-ae"), recognizer="small-face", judge="small-face",
        surrogate="small-ae", network="transformer",
        settings={"width": 16, "depth": 1, "heads": 2}, heat="none", prior_batches=1, size=32,
        strategy=strategy,  # type: ignore[arg-type]
    )  # fmt: skip


def main(kind: str, pack: str, output: str, processes: int) -> None:
    """Train, and save what was seen."""
    warnings.simplefilter("ignore")
    watch = Watch()
    settings: dict[str, object] = {"devices": processes}
    if processes > 1:
        settings["strategy"] = "ddp"
    run = trainer(
        Path(output), max_epochs=1, limit_val_batches=0, enable_checkpointing=False,
        callbacks=[PlayersInTurn(), watch], **settings,
    )  # fmt: skip
    training = module(kind)
    run.fit(training, FacePacks([Path(pack)], batch=8 // processes, batches=2, share=0.4))
    torch.save(
        {"seen": watch.seen, "state": training.state_dict()},
        Path(output) / f"{kind.replace(':', '-')}-{processes}-{run.global_rank}.pt",
    )


if __name__ == "__main__":
    for each in sys.argv[1].split(","):
        main(each, sys.argv[2], sys.argv[3], int(sys.argv[4]))
