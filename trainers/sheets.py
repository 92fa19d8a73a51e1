"""Sample sheets: what a protector in training does to held-out photos, and to their forgeries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from shields.models.manipulation import Manipulator
from shields.types import Image
from trainers.data import batches_done

__all__ = ["boards", "sample_sheet", "show_sheets"]


def boards(trainer: pl.Trainer) -> list[Any]:
    """What the loggers have that takes pictures, such as TensorBoard's; in the first process."""
    if not trainer.is_global_zero:
        return []
    found = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [board for board in found if hasattr(board, "add_image")]


def sample_sheet(
    clean: Image, protected: Image, forged_clean: Image, forged_protected: Image
) -> Tensor:
    """Rows: clean, protected, perturbation x10 about grey, and both forgeries: (3, 5 S, n S)."""
    change = (0.5 + 10 * (protected - clean)).clamp(0, 1)
    rows = (clean, protected, change, forged_clean, forged_protected)
    drawn = [torch.cat(list(row.clamp(0, 1)), dim=2) for row in rows]
    return torch.cat(drawn, dim=1).cpu()


@torch.no_grad()
def show_sheets(
    module: pl.LightningModule,
    manipulators: Sequence[Manipulator],
    asked: Sequence[Sequence[str]],
    pair: tuple[Image, Image],
    *,
    kind: str = "",
    most: int = 4,
) -> None:
    """Draw one sheet a manipulator and log it as `sheet/NAME`; without a board nothing is forged.

    Args:
        module: Whose validation it is.
        manipulators: N of them, on the device of the photos.
        asked: For each, its conditions; the first is drawn.
        pair: Clean and protected photos, (B, 3, H, W), [0, 1].
        kind: Before "sheet", where photos are protected in several ways.
        most: Photos on a sheet.
    """
    places = boards(module.trainer)
    if not places:
        return
    face, protected = (image[:most].float() for image in pair)
    for manipulator, names in zip(manipulators, asked, strict=True):
        before, after = (manipulator(image, names[0]).float() for image in (face, protected))
        sheet = sample_sheet(face, protected, before, after)
        for board in places:
            board.add_image(f"{kind}sheet/{manipulator.name}", sheet, batches_done(module.trainer))
