"""How often forgeries are disrupted; and what all trainers share that are measured by that alone.

`disruption` is the measure: forgeries of protected photos against those of clean ones, once as they
are, and once after the same JPEG 75 and half size on both sides ("handled").
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from shields.budget import Budget
from shields.errors import ConfigError
from shields.models.round_trip import load_manipulator
from shields.transforms import CompressResize
from shields.types import Image, Perturbation
from shields.weights import WeightStore
from trainers.ars_targets import Task, conditions_of, distance, goals_of
from trainers.averaging import follow
from trainers.data import batches_done
from trainers.idguard_faces import cut_faces, plain_name
from trainers.scheme import resized
from trainers.sheets import show_sheets

__all__ = ["SUCCESS", "DisruptionTraining", "as_saved", "disruption", "share_done", "show_tasks",
           "whole_faces"]  # fmt: skip

Objective = Callable[[Image], Tensor]

#: from here on a forgery counts as disrupted: mean square in [-1, 1]
SUCCESS = 0.05


def whole_faces(packed: Tensor, side: int) -> Image:
    """Bring packed faces (B, 3, S, S), uint8, to a side and to whole levels, as files hold them."""
    face = resized(packed.float() / 255, side).clamp(0, 1)
    return (face * 255).round() / 255


def as_saved(face: Image, perturbation: Perturbation, levels: float) -> Image:
    """Protect whole-level photos by whole levels inside a budget, as they would be saved."""
    whole = Budget(levels=levels).whole_levels
    moved = (perturbation * 255).round().clamp(-whole, whole)
    return (face + moved / 255).clamp(0, 1)


@torch.no_grad()
def disruption(tasks: Sequence[Sequence[Task]], face: Image, protected: Image) -> dict[str, Tensor]:
    """Measure over all conditions, of each manipulator and in the mean, in float32.

    Args:
        tasks: For each manipulator, one task a condition.
        face: Clean photos (B, 3, H, W), [0, 1].
        protected: The same ones protected.

    Returns:
        `val_success`, the share of forgeries further than `SUCCESS` from the clean one, `val_mse`,
        both with `_handled` behind, all four with `_NAME` of each manipulator behind;
        `val_success_mean`, of `val_success` and the handled one; `val_progress`, by which
        checkpoints are chosen: how far forgeries are on their way to `SUCCESS`, 1 where all have
        arrived, which tells early ones apart too; and `val_psnr` of the protected photos.
    """
    handling = CompressResize()
    with torch.autocast(face.device.type, enabled=False):
        handled = [handling.apply(image, quality=75, scale=0.5) for image in (face, protected)]
        values = _distances(tasks, face, protected, "")
        values |= _distances(tasks, handled[0], handled[1], "_handled")
    values["val_success_mean"] = (values["val_success"] + values["val_success_handled"]) / 2
    values["val_progress"] = (values.pop("way") + values.pop("way_handled")) / 2
    error = distance(protected, face) / 4
    values["val_psnr"] = (-10 * error.clamp_min(1e-10).log10()).mean()
    return values


def _distances(
    tasks: Sequence[Sequence[Task]], face: Image, protected: Image, ending: str
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    reached, far, way = [], [], []
    for each in tasks:
        each[0].manipulator.to(face.device)
        found = [distance(task.forge_clean(protected), task.forge_clean(face)) for task in each]
        errors = torch.cat(found)
        name = f"{ending}_{plain_name(each[0].manipulator.name)}"
        reached.append((errors > SUCCESS).float().mean())
        far.append(errors.mean())
        way.append((errors / SUCCESS).clamp_max(1).mean())
        values |= {"val_success" + name: reached[-1], "val_mse" + name: far[-1]}
    values["val_success" + ending] = torch.stack(reached).mean()
    values["val_mse" + ending] = torch.stack(far).mean()
    values["way" + ending] = torch.stack(way).mean()
    return values


def share_done(trainer: pl.Trainer) -> float:
    """How much of a training is over, 0 to 1; `max_steps` counts the steps of each optimizer."""
    share = batches_done(trainer) / max(1.0, float(trainer.estimated_stepping_batches))
    return max(share, trainer.global_step / trainer.max_steps) if trainer.max_steps > 0 else share


def show_tasks(
    module: pl.LightningModule, tasks: Sequence[Sequence[Task]], pair: tuple[Image, Image]
) -> None:
    """Log a sheet of clean and protected photos for each manipulator."""
    manipulators = [each[0].manipulator for each in tasks]
    show_sheets(module, manipulators, [[each[0].condition] for each in tasks], pair)


class DisruptionTraining(pl.LightningModule):
    """Photos, manipulators that ask for their conditions by turns, validation and the card.

    A subclass sets `generator` and `averaged` where it trains a network, and says what it adds to a
    photo (`perturbation`), how a step goes and what ships.

    Args:
        manipulators: Cards, or addresses of code, of what is disrupted; autoencoders count.
        conditions: Manipulator -> what it is asked for, by turns; all it can do where left out.
        targets: Manipulator -> where its forgeries shall go, as for `trainers.ars`.
        levels: Budget, levels.
        size: Side of a training crop and of what is validated, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        average: Decay of the averaged weights.
        seed: Fixes crops and draws.
    """

    #: as the card's summary calls it
    METHOD: ClassVar[str]
    #: of the network that ships, a name in `shields.models.GENERATORS`
    ARCHITECTURE: ClassVar[str]
    generator: torch.nn.Module
    averaged: torch.nn.Module

    def __init__(
        self, manipulators: Sequence[str], conditions: Mapping[str, Sequence[str]] | None,
        targets: Mapping[str, str] | None = None, *, levels: float, size: int,
        region: tuple[float, float], average: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        if not levels > 0:
            raise ConfigError(f"`levels` must be above 0, got {levels}")
        self.levels, self.size, self.region = levels, size, region
        self.average, self.seed = average, seed
        # A list hides the manipulators from checkpoints and from the optimizers.
        store = WeightStore()
        self._manipulators = [load_manipulator(name, store) for name in manipulators]
        goals = goals_of(self._manipulators, targets or {})
        asked = conditions_of(self._manipulators, conditions or {})
        self._tasks = [
            [Task(manipulator=network, condition=name, goal=goals[network.name]) for name in names]
            for network, names in zip(self._manipulators, asked, strict=True)
        ]

    @abstractmethod
    def perturbation(self, face: Image) -> Perturbation:
        """What ships makes of whole photos: (B, 3, H, W), image units; bounded later."""

    @property
    def batches_done(self) -> int:
        """Batches trained on so far, those before a resumption included."""
        return batches_done(self.trainer)

    def cut(self, batch: dict[str, Tensor]) -> tuple[Image, torch.Generator]:
        """A batch's crops (B, 3, size, size), [0, 1], and the generator for its further draws."""
        rng = torch.Generator().manual_seed(self.seed + self.batches_done)
        face = cut_faces(batch, self.size, self.region, rng)[0]
        return face.contiguous(memory_format=torch.channels_last), rng

    def turn(self) -> list[Task]:
        """Every manipulator with the condition whose turn it is."""
        met = [each[self.batches_done % len(each)] for each in self._tasks]
        for task in met:
            task.manipulator.to(self.device)
        return met

    @staticmethod
    def shortfalls(tasks: Sequence[Task], face: Image) -> list[Objective]:
        """How far forgeries of a view are from the targets, one function a task."""
        forged = [task.forge_clean(face) if task.relative else None for task in tasks]
        pairs = zip(tasks, forged, strict=True)
        return [partial(task.shortfall, clean=clean) for task, clean in pairs]

    def descend(self, terms: dict[str, Tensor], optimizer: Any, *, falling: bool = True) -> None:  # noqa: ANN401
        """Minimise the terms' sum by one step, and log them; rates may fall in the second half."""
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        share = share_done(self.trainer)
        for group in optimizer.param_groups:
            part = min(1.0, max(0.02, 2 * (1 - share))) if falling else 1.0
            group["lr"] = group["peak"] * part
        optimizer.step()
        self.log_dict({name: value.detach() for name, value in terms.items()})

    def follow(self) -> None:
        """Move the averaged weights; last in a step: a checkpoint may be saved right behind it."""
        follow(self.averaged, self.generator, done=self.batches_done + 1, most=self.average)

    @torch.no_grad()
    def protect(self, face: Image) -> Image:
        """Protect whole-level photos as they would be saved."""
        with torch.autocast(face.device.type, enabled=False):
            return as_saved(face, self.perturbation(face), self.levels)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Whole held-out faces: `disruption` of what would be saved."""
        face = whole_faces(batch["face"], self.size)
        protected = self.protect(face)
        self.log_dict(disruption(self._tasks, face, protected), batch_size=len(face))
        if index == 0:
            show_tasks(self, self._tasks, (face, protected))

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        names = ", ".join(network.name for network in self._manipulators)
        return {
            "role": "generator",
            "architecture": self.ARCHITECTURE,
            "summary": f"{self.METHOD}, trained against {names}.",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "the packs that the recipe names; a tenth of the people, chosen by a hash of "
            f"the name, is held out; results on them at {self.size} pixels and {self.levels:g} "
            "levels",
            "teacher": "",
        }

    @abstractmethod
    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and card's settings of what ships."""
