"""Stop training at a SIGTERM so that it can go on as if nothing had happened.

Machines that are lent, queues and service managers send SIGTERM some seconds before they end a
process. Lightning then stops as well, but saves nothing.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.exceptions import SIGTERMException

__all__ = ["SaveOnSigterm"]

#: what shells report of a process that SIGTERM ended
_STATUS = 128 + signal.SIGTERM


class SaveOnSigterm(pl.Callback):
    """Save `last.ckpt` between two batches, say how to go on, and end with status 143.

    It lies where `ModelCheckpoint` saves, so `--ckpt_path last` finds it. A validation that runs is
    finished first. All processes stop at the same batch, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self._asked = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signal over; Lightning gives it back when it is done."""
        self._asked = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stop before the batch; only here the last one is over, averaged weights included."""
        asked = self._asked
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked:
            return
        _take_back(trainer)
        path = _place(trainer)
        trainer.save_checkpoint(path)
        rank_zero_info(f"stopped by SIGTERM; to go on, add --ckpt_path {path}")
        raise SIGTERMException(_STATUS)


def _take_back(trainer: pl.Trainer) -> None:
    """Undo the count of the batch that is not trained on any more."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for count in (progress.total, progress.current):
        count.ready = count.completed
    progress.is_last_batch = False


def _place(trainer: pl.Trainer) -> Path:
    checkpoint: Any = trainer.checkpoint_callback
    folder = getattr(checkpoint, "dirpath", None) or trainer.default_root_dir
    return Path(folder) / "last.ckpt"
