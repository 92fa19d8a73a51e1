"""Adversarial training of a manipulator, with a trained generator of perturbations as the attacker.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, section III-E, Eq. 15: the
    generator goes on learning to disrupt the manipulator, and the manipulator is trained by its own
    losses on what the generator has protected.

Differs:
    The inner maximum is taken over this one manipulator, so there is nothing to weigh; the
    universal perturbation is an input of the generator that no longer changes.
    The generator's batch norms keep the statistics that it came with. Both learn from the same
    perturbation: it is not made anew after the generator's step.
    Discriminators are not shipped: a new one starts, and learns alone for `head_start` batches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.masks import components
from shields.models import load
from shields.models.base import signed_range_to_unit, unit_range_to_signed
from shields.models.generators import Generator
from shields.models.manipulation import Condition, Manipulator
from shields.models.manipulators import AGGANModel, FPGANModel, StarGANModel
from shields.types import Image
from shields.weights import WeightStore
from trainers.data import middle
from trainers.identity_destruction import DestructionConfig, compare, gain, look
from trainers.idguard_faces import Heat, Photos, face_distance, photos_of
from trainers.manipulator import ManipulatorTraining
from trainers.manipulator_measure import held_out_faces
from trainers.robust_measure import measure_robustness
from trainers.scheme import resized

__all__ = ["RobustManipulatorTraining"]

_KINDS: Mapping[type[Manipulator], str] = {
    StarGANModel: "stargan", AGGANModel: "aggan", FPGANModel: "fpgan",
}  # fmt: skip
#: faces on which attacks are measured
_MEASURED = 64


class RobustManipulatorTraining(ManipulatorTraining):
    """A manipulator of this project's StarGAN family against a generator of perturbations.

    Args:
        manipulator: Card of what is hardened: a StarGAN, AttentionGAN or Fixed-Point GAN that was
            trained here.
        generator: Card of the attacker, such as an ID-Guard generator.
        attributes: Names of the labels in the pack; those of the manipulator's card.
        tune: Whether the attacker learns on, as in the paper, or stays as it is.
        preset: What the attacker maximises: ID-Guard's "paper" or "code".
        heat: Heat map of the recognizer: "grad-cam++", "grad-cam", or "none".
        recognizer: Card of the network whose view of a face the attacker changes.
        levels: Budget of the attacker, levels.
        settings: Fields of the manipulator's `Scheme`, above all the losses' weights.
        head_start: Batches in the beginning on which the manipulator does not learn.
        region: Share of the packed face's side that is cut out, in the middle of its range.
        rate: Adam's peak learning rate of the manipulator and of its discriminator.
        attacker_rate: And of the attacker.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops, mirrors and whatever the scheme draws.
    """

    def __init__(
        self,
        manipulator: str = "stargan-smile",
        generator: str = "idguard-faces",
        attributes: tuple[str, ...] = ("Smiling",),
        tune: bool = True,
        preset: Literal["paper", "code"] = "code",
        heat: Heat = "grad-cam++",
        recognizer: str = "face-embedder",
        levels: float = 6.375,
        settings: dict[str, Any] | None = None,
        head_start: int = 100,
        region: float = 0.89,
        rate: float = 1e-4,
        attacker_rate: float = 1e-4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        store, cpu = WeightStore(), torch.device("cpu")
        model = load("manipulator", manipulator, store=store, device=cpu)
        if not isinstance(model, StarGANModel) or model.native_size is None:
            raise ConfigError(
                f"{manipulator!r} cannot be hardened: needed is a StarGAN, AttentionGAN or "
                "Fixed-Point GAN whose card says at which `native_size` it was trained"
            )
        if tuple(attributes) != model.attributes:
            raise ConfigError(
                f"`attributes` must be those of {manipulator!r}, {', '.join(model.attributes)}; "
                f"got {', '.join(attributes)}"
            )
        super().__init__(
            _KINDS[type(model)], attributes, model.native_size, settings=settings,
            head_start=head_start, region=region, rate=rate, average=average, seed=seed,
        )  # fmt: skip
        self._architecture = _KINDS[type(model)]
        self.generator = model.network.requires_grad_(True)
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.attacker: Generator = load("generator", generator, store=store, device=cpu)
        self.attacker.requires_grad_(tune)
        self.tune, self.levels, self.attacker_rate = tune, levels, attacker_rate
        self.heat: Heat = heat
        paper = preset == "paper"
        self.config = DestructionConfig.paper() if paper else DestructionConfig.code()
        # A list hides from checkpoints and optimizers what is frozen, or there already.
        self._model: list[Manipulator] = [model]
        self._recognizer = [load("recognizer", recognizer, store=store, device=cpu)]

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step of the attacker, then one of the manipulator and of its discriminator."""
        rng = torch.Generator().manual_seed(self.seed + self.batches_done)
        optimizers: Any = self.optimizers()
        span = (0.95 * self.region, min(1.0, 1.05 * self.region))
        photos = photos_of(
            batch, self.scheme.size, span, self._recognizer[0].to(self.device),
            self.heat if self.tune else "none", rng=rng,
        )  # fmt: skip
        labels = batch["labels"].float()
        target = self.scheme.target(labels)
        attacked = unit_range_to_signed(self._attack(photos, target, rng))
        face = unit_range_to_signed(photos.face)
        self.discriminator.requires_grad_(False)
        terms, forged = self.scheme.generator_losses(
            self.generator, self.discriminator, attacked, labels, target, rng
        )
        if self.batches_done >= self.head_start:
            self._step("g", terms, optimizers[0])
        self.discriminator.requires_grad_(True)
        terms = self.scheme.discriminator_losses(self.discriminator, face, forged, labels, rng)
        self._step("d", terms, optimizers[1])
        schedules: Any = self.lr_schedulers()
        for schedule in schedules:
            schedule.step()

    def _attack(self, photos: Photos, target: Tensor, rng: torch.Generator) -> Image:
        """Protect photos; where the attacker learns, by one step towards disrupting more."""
        with torch.set_grad_enabled(self.tune):
            protected = self._protected(photos.face, rng)
        if self.tune:
            self.generator.requires_grad_(False)
            value = self._disruption(photos, protected, target)
            optimizers: Any = self.optimizers()
            self._step("attacker", {"gain": -value}, optimizers[2])
            self.generator.requires_grad_(True)
        return protected.detach()

    def _protected(self, face: Image, rng: torch.Generator) -> Image:
        return (face + self.attacker.perturb(face, levels=self.levels, rng=rng)).clamp(0, 1)

    def _disruption(self, photos: Photos, protected: Image, target: Tensor) -> Tensor:
        """ID-Guard's gain, in the mean over the batch."""
        recognizer = self._recognizer[0]
        see = partial(
            look, self._model[0], condition=Condition(name="target", value=target),
            config=self.config, recognizer=recognizer,
            matrix=recognizer.matrix(photos.landmarks, photos.face),
        )  # fmt: skip
        with torch.no_grad():
            clean = see(photos.face)
        terms = compare(clean, see(protected), photos.binary, photos.heat, self.config)
        return gain(terms, self.config).mean()

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Held-out people: edits of clean photos, and how far the attacker moves them."""
        super().validation_step(batch, index)
        side = self.scheme.size
        cut, start = middle(batch["face"], self.region)
        face = resized(cut.float() / 255, side).clamp(0, 1)
        landmarks = (batch["landmarks"] - start + 0.5) * (side / cut.shape[-1]) - 0.5
        labels = batch["labels"].float()
        with torch.autocast(self.device.type, enabled=False):
            protected = self._protected(face, torch.Generator().manual_seed(index))
            forged = [self._edited(image, labels) for image in (face, protected)]
        mask = components(landmarks, (side, side), ["face"])
        self.log("val_l2_attacked", face_distance(forged[0], forged[1], mask).mean(),
                 prog_bar=True, batch_size=len(face))  # fmt: skip

    def _edited(self, face: Image, labels: Tensor) -> Image:
        """Forge by the averaged weights what the labels do not say yet."""
        signed = unit_range_to_signed(face)
        forged = self.scheme.forge(self.averaged, signed, labels, 1 - labels)
        return signed_range_to_unit(forged).clamp(0, 1)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """The manipulator's two, and the attacker's, of a constant rate."""
        optimizers, schedules = super().configure_optimizers()
        if self.tune:
            parameters = self.attacker.parameters()
            optimizers.append(
                torch.optim.Adam(parameters, lr=self.attacker_rate, betas=(0.5, 0.999))
            )
        return optimizers, schedules

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        model = self._model[0]
        how = "that learnt on meanwhile" if self.tune else "that stayed as it was"
        return {
            "role": "manipulator",
            "architecture": self._architecture,
            "summary": f"{model.name}, hardened against the generator {self.attacker.name}, {how}.",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "LFW faces with expression labels (happiness or neutral); a tenth of the "
            "people, chosen by a hash of the name, is held out; results on them; `before_` is "
            f"{model.name} itself; attacks of {self.levels:g} levels",
            "teacher": str(getattr(self.scheme, "teacher", "")),
        }

    def measure(self, card: Path, pack: Path) -> dict[str, float]:
        """Measure the shipped file, and under attacks what it was before as well."""
        store, cpu = WeightStore(), torch.device("cpu")
        judge = load("recognizer", self.JUDGES["recognizer"], store=store, device=cpu)
        faces, landmarks, _ = held_out_faces(
            pack, self.scheme.attributes, count=_MEASURED, size=self.scheme.size
        )
        values = super().measure(card, pack)
        for before, name in (("", str(card)), ("before_", str(self.hparams["manipulator"]))):
            model = load("manipulator", name, store=store, device=cpu)
            found = measure_robustness(
                model, faces, landmarks, judge=judge, rng=torch.Generator().manual_seed(0)
            )
            values |= {before + key: value for key, value in found.items()}
        return values
