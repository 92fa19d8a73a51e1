"""Train attribute manipulators of our own: what protections are tested on without a download.

One module for all architectures; what tells them apart is their `Scheme`.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models import load
from shields.registry import Registry
from shields.weights import WeightStore
from trainers.averaging import follow
from trainers.data import batches_done, middle, random_crop
from trainers.scheme import Scheme, resized

__all__ = ["SCHEMES", "ManipulatorTraining"]

#: architecture -> its scheme
SCHEMES: Registry[type[Scheme]] = Registry(
    "manipulator to train",
    {
        "stargan": "trainers.star:StarScheme",
        "aggan": "trainers.star:StarScheme",
        "fpgan": "trainers.star:StarScheme",
        "relgan": "trainers.relgan:RelganScheme",
        "hisd": "trainers.hisd:HisdScheme",
    },
)


class ManipulatorTraining(pl.LightningModule):
    """A generator against a discriminator, one step of each per batch, on the same forgeries.

    Args:
        architecture: "stargan", "aggan", "fpgan", "relgan" or "hisd".
        attributes: Names of the labels in the pack, in the order of the label vector.
        size: Side of the square that the networks see, pixels, divisible by 4.
        width: Generator's channels at full resolution.
        settings: Further fields of the architecture's `Scheme`, above all the losses' weights.
        head_start: Batches in the beginning on which only the discriminator learns, for schemes in
            which it alone says what an edit is.
        region: Share of the packed face's side that is cut out.
        rate: Adam's peak learning rate, of both networks.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops, mirrors and whatever the scheme draws.
    """

    #: networks that took no part in the training and say what came of it
    JUDGES: ClassVar[dict[str, str]] = {
        "classifier": "expression-classifier",
        "recognizer": "mobilefacenet",
    }

    def __init__(
        self,
        architecture: str = "stargan",
        attributes: tuple[str, ...] = ("Smiling",),
        size: int = 80,
        width: int = 16,
        settings: dict[str, Any] | None = None,
        head_start: int = 0,
        region: float = 0.89,
        rate: float = 4e-4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.scheme = _scheme(architecture, attributes, size, width, settings or {})
        last = torch.channels_last
        self.generator = self.scheme.generator().to(memory_format=last)
        self.discriminator = self.scheme.discriminator().to(memory_format=last)
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.region, self.rate, self.average, self.seed = region, rate, average, seed
        self.head_start = head_start

    @property
    def batches_done(self) -> int:
        """Batches trained on so far, those before a resumption included."""
        return batches_done(self.trainer)

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step of each network."""
        rng = torch.Generator().manual_seed(self.seed + self.batches_done)
        side = round(batch["face"].shape[-1] * self.region * float(1 + 0.05 * _signed(rng)))
        cut = random_crop(batch["face"], min(side, batch["face"].shape[-1]), rng)
        face = resized(cut.float() / 127.5 - 1, self.scheme.size)
        labels = batch["labels"].float()
        target = self.scheme.target(labels)
        optimizers: Any = self.optimizers()
        self.discriminator.requires_grad_(False)
        terms, forged = self.scheme.generator_losses(
            self.generator, self.discriminator, face, labels, target, rng
        )
        if self.batches_done >= self.head_start:
            self._step("g", terms, optimizers[0])
        self.discriminator.requires_grad_(True)
        terms = self.scheme.discriminator_losses(self.discriminator, face, forged, labels, rng)
        self._step("d", terms, optimizers[1])
        schedules: Any = self.lr_schedulers()
        for schedule in schedules:
            schedule.step()

    def _step(self, player: str, terms: dict[str, Tensor], optimizer: Any) -> None:  # noqa: ANN401
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        optimizer.step()
        self.log_dict({f"{player}_{name}": value.detach() for name, value in terms.items()})

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Move the averaged weights; early on they follow faster."""
        done = max(0, self.batches_done - self.head_start)
        follow(self.averaged, self.generator, done=done, most=self.average)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Held-out people, in float32: how much an edit changes, and how little no edit does."""
        face = middle(batch["face"], self.region)[0].float() / 127.5 - 1
        face = resized(face, self.scheme.size)
        labels = batch["labels"].float()
        self.averaged.eval()
        with torch.autocast(self.device.type, enabled=False):
            forged = self.scheme.forge(self.averaged, face, labels, 1 - labels).clamp(-1, 1)
            same = self.scheme.forge(self.averaged, face, labels, labels).clamp(-1, 1)
        error = ((same - face) / 2).square().mean(dim=(1, 2, 3))
        values = {
            "val_psnr": (-10 * error.log10()).mean(),
            "val_change": (forged - face).abs().mean() / 2,
        }
        self.log_dict(values, prog_bar=True, batch_size=len(face))

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Adam for both; constant, then linear to zero over the second half."""
        total = max(1, int(self.trainer.estimated_stepping_batches))
        pairs = ((self.generator, self.rate), (self.discriminator, self.rate))
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(network.parameters(), lr=peak, betas=(0.5, 0.99))
            for network, peak in pairs
        ]

        def factor(step: int) -> float:
            return min(1.0, max(0.02, 2 * (total - step) / total))

        schedules = [torch.optim.lr_scheduler.LambdaLR(item, factor) for item in optimizers]
        return optimizers, schedules

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        names = " and ".join(self.scheme.attributes).lower()
        return {
            "role": "manipulator",
            "architecture": str(self.hparams["architecture"]),
            "summary": f"Small {self.hparams['architecture']} of our own: {names} on or off, "
            f"{self.scheme.size} pixels.",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "LFW faces with expression labels (happiness or neutral); a tenth of the "
            "people, chosen by a hash of the name, is held out; results on them",
            "teacher": str(getattr(self.scheme, "teacher", "")),
        }

    def measure(self, card: Path, pack: Path) -> dict[str, float]:
        """Measure the shipped file on held-out people, by networks that took no part."""
        from trainers.manipulator_measure import measure

        model = load("manipulator", str(card), store=WeightStore(), device=torch.device("cpu"))
        return measure(
            model, pack, self.scheme.attributes[0], size=self.scheme.size,
            classifier=self.JUDGES["classifier"], recognizer=self.JUDGES["recognizer"],
        )  # fmt: skip

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and card's settings of the network that is shipped."""
        return self.averaged.state_dict(), self.scheme.config()


def _signed(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng)) * 2 - 1


def _scheme(
    architecture: str, attributes: tuple[str, ...], size: int, width: int, settings: dict[str, Any]
) -> Scheme:
    kind = SCHEMES[architecture]
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = set(settings) - known
    if unknown:
        raise ConfigError(
            f"{architecture} has no setting {', '.join(sorted(unknown))}; there are: "
            f"{', '.join(sorted(known))}"
        )
    if "kind" in known:  # one scheme trains several architectures
        settings = {**settings, "kind": architecture}
    return kind(attributes=tuple(attributes), size=size, width=width, **settings)
