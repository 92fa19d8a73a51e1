"""How the weights between manipulators went while training: as a curve in a picture.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, figure 16.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image as PILImage
from torch import Tensor

from shields.errors import ConfigError, OutputError
from shields.files import aside
from shields.registry import Registry
from trainers.data import batches_done
from trainers.sheets import boards

__all__ = ["WeightHistory", "draw_history"]

#: what a trainer logs about each manipulator -> what the axis says
_PANELS: Mapping[str, str] = {
    "weight_": "weight in the sum",
    "indicator_": "indicator: how far it is disrupted",
    "loss_": "loss",
}
_FIGURES: Registry[Any] = Registry("figure", {"matplotlib": "matplotlib.figure:Figure"})
#: name -> (batches done, value), in order
History = Mapping[str, Sequence[tuple[int, float]]]


class WeightHistory(pl.Callback):
    """Collect `weight_NAME`, `indicator_NAME` and `loss_NAME`, and draw them after every epoch.

    The history is part of the checkpoint: after a resumption the picture shows all of the run. It
    goes to `weights.png` and to loggers that take pictures.

    Args:
        every: Batches from one point of a curve to the next.
        folder: Where the picture is written; the logger's own folder where left out.
    """

    def __init__(self, every: int = 10, folder: Path | None = None) -> None:
        if every < 1:
            raise ConfigError(f"`every` must be 1 batch or more, got {every}")
        self.every, self.folder = every, folder
        self._points: dict[str, list[tuple[int, float | Tensor]]] = {}

    @property
    def history(self) -> dict[str, list[tuple[int, float]]]:
        """Name -> (batches done, value), in order."""
        return {
            name: [(batch, float(value)) for batch, value in points]
            for name, points in self._points.items()
        }

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out before an hour of training whether there is anything to draw with."""
        _ = _FIGURES["matplotlib"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Note what was logged; kept as tensors, since reading them would hold up a GPU."""
        done = batches_done(trainer)
        if done % self.every and done != 1:
            return
        for name, value in trainer.callback_metrics.items():
            if name.startswith(tuple(_PANELS)):
                self._points.setdefault(name, []).append((done, value.detach().clone()))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw all that is known."""
        self._points = {name: list(points) for name, points in self.history.items()}
        # Asking for the folder is a word between all processes: it stands before any return.
        place = self.folder or (Path(trainer.log_dir or ".") if trainer.loggers else None)
        if not (trainer.is_global_zero and self._points):
            return
        picture = draw_history(self.history)
        if place is not None:
            _write(picture, place / "weights.png")
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        for board in boards(trainer):
            board.add_image("weights", pixels, batches_done(trainer))

    def state_dict(self) -> dict[str, Any]:
        """The history, in plain numbers."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._points = {
            str(name): [(int(batch), float(value)) for batch, value in points]
            for name, points in state_dict["history"].items()
        }


def draw_history(history: History) -> PILImage.Image:
    """Draw one panel for each kind of number and in it one line for each manipulator.

    Args:
        history: Name, with the kind before it such as "weight_", -> (batches done, value).

    Raises:
        MissingPackage: There is no matplotlib.
    """
    panels = {
        prefix: {name.removeprefix(prefix): points for name, points in history.items()
                 if name.startswith(prefix)}
        for prefix in _PANELS
    }  # fmt: skip
    panels = {prefix: lines for prefix, lines in panels.items() if lines}
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    figure = _FIGURES["matplotlib"](figsize=(9, 0.6 + 2.7 * len(panels)), dpi=110,
                                    layout="constrained")  # fmt: skip
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (prefix, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            batches, values = zip(*points, strict=True)
            # One colour a manipulator, in all panels.
            colour = f"C{names.index(name)}"
            axis.plot(batches, values, color=colour, linewidth=1.4, label=name,
                      marker="." if len(points) == 1 else "")  # fmt: skip
        axis.set_ylabel(_PANELS[prefix])
        axis.set_ylim(bottom=0)
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("batches")
    # Beside the curves, never on them.
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return PILImage.open(drawn).convert("RGB")


def _write(picture: PILImage.Image, path: Path) -> None:
    try:
        with aside(path) as part:
            picture.save(part, format="PNG")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
