"""Lightning on a sliver of data: a silent trainer, and a power cut."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from trainers.data import batches_done

__all__ = ["PowerCut", "trainer"]


def trainer(folder: Path, **settings: object) -> pl.Trainer:
    """A CPU trainer that says nothing, validates one batch and keeps `last.ckpt` in a folder."""
    checkpoint = pl.callbacks.ModelCheckpoint(folder, save_last=True)
    defaults: dict[str, object] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "callbacks": [checkpoint],
        "limit_val_batches": 1,
    }  # fmt: skip
    return pl.Trainer(**(defaults | settings))  # type: ignore[arg-type]


class PowerCut(pl.Callback):
    """Ends the process's work at the third batch, without a goodbye."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        if batches_done(trainer) == 2:
            raise ConnectionError("power cut")
