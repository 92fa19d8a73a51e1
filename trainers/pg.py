"""Train PG, the perturbation generator of Initiative Defense, against a surrogate in training.

Source:
    Initiative Defense against Facial Manipulation (Huang et al., 2021),
    https://arxiv.org/abs/2112.10098; code
    https://github.com/shikiw/initiative-defense-for-deepfake.

    By turns, the surrogate G and its discriminator D learn from clean photos what a manipulator
    learns; a critic learns to tell protected photos from clean ones; and P minimises
    -10 L1(G(x', c), G(x, c)) - 2.5 L1(G(G(x', c), c_0), x') + D(G(x', c)) + H(G(x', c), 1 - c)
    - 0.001 critic(x'), x' = x + epsilon tanh P(x), where L1 counts by how far an edit reaches,
    mean |G(x, c) - x|, and H is the classification loss. The first four terms are taken at the
    surrogate of this step and at that of the step before, in their mean.

Differs:
    The code adds the terms of the surrogate before to sums that were divided already, and goes on
    counting, so that both do not weigh the same; here they do.
    Networks that ship have no discriminator with them: it starts anew, alone for `head_start`
    batches, on which P does not go by it. How G and D learn is `trainers.star`'s way, not StarGAN's
    own; attributes are named by its teacher, where it has one.
    P is the U-Net of our ARS, so that it loads as one of one way; the learning rate falls linearly
    over the second half, and averaged weights are what is kept.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shields.errors import ConfigError
from shields.models import load
from shields.models.ars_network import ArsGenerator
from shields.models.base import unit_range_to_signed
from shields.models.manipulators import AGGANModel, FPGANModel, StarGANModel
from shields.types import Image, Perturbation
from shields.weights import WeightStore
from trainers.adversaries import StarDiscriminator, adversarial_loss, gradient_penalty
from trainers.ars_targets import gradient_of
from trainers.disruption_measure import DisruptionTraining
from trainers.scheme import classification, resized, seen_attributes
from trainers.star import StarScheme

__all__ = ["PgTraining", "weighted_difference"]

_KINDS = {StarGANModel: "stargan", AGGANModel: "aggan", FPGANModel: "fpgan"}


def weighted_difference(image: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of (B, 3, H, W), where places count by (B, 1, H, W): a number."""
    difference = (image.float() - reference.float()).abs().mean(dim=1, keepdim=True)
    return (difference * weight).sum() / weight.sum().clamp_min(1e-6)


class PgTraining(DisruptionTraining):
    """P, its critic, the surrogate and the surrogate's discriminator, a step of each per batch.

    Batches need the labels that the surrogate was trained on: `--data.attributes [Smiling]`.

    Args:
        surrogate: Card of a StarGAN, an AttentionGAN or a Fixed-Point GAN that is trained on.
        manipulators: Cards of what is measured at validation; the surrogate as it ships where left
            out. They take no part in the training.
        conditions: Manipulator -> what it is asked for there; all it can do where left out.
        settings: Fields of `trainers.star.StarScheme`, above all weights and the teacher.
        widths: Channels of P at each resolution.
        critic_width: Channels of the critic's first layer.
        edit: Weight of the difference between forgeries.
        back: Weight of the difference between a forgery that was turned back and the photo.
        confusion: Weight of what the discriminator and the classifier are to see in forgeries.
        natural: Weight of what the critic says of protected photos.
        head_start: Batches in the beginning on which the discriminator learns and G does not.
        levels: Budget, levels.
        size: Side of a training crop and of what is validated, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        rate: Adam's learning rate of P.
        critic_rate: And of the critic.
        surrogate_rate: And of G and D.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops and draws.
    """

    METHOD = "PG of Initiative Defense"
    ARCHITECTURE = "ars"
    generator: ArsGenerator
    averaged: ArsGenerator

    def __init__(
        self,
        surrogate: str = "stargan-smile",
        manipulators: tuple[str, ...] = (),
        conditions: dict[str, list[str]] | None = None,
        settings: dict[str, Any] | None = None,
        widths: tuple[int, ...] = (16, 32, 64, 96, 128),
        critic_width: int = 16,
        edit: float = 10.0,
        back: float = 2.5,
        confusion: float = 1.0,
        natural: float = 0.001,
        head_start: int = 100,
        levels: float = 6.375,
        size: int = 96,
        region: tuple[float, float] = (0.85, 0.95),
        rate: float = 1e-4,
        critic_rate: float = 1e-5,
        surrogate_rate: float = 1e-4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__(
            manipulators or (surrogate,), conditions, levels=levels, size=size, region=region,
            average=average, seed=seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self._settings: dict[str, Any] = {
            "widths": list(widths), "encoder": [], "two_way": False, "levels": levels,
        }  # fmt: skip
        self.generator = ArsGenerator(**self._settings).to(memory_format=torch.channels_last)
        if size % self.generator.multiple:
            raise ConfigError(f"`size` must be a multiple of {self.generator.multiple}, got {size}")
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.scheme, network = _surrogate(surrogate, settings or {}, size)
        self.surrogate = network
        self.before = copy.deepcopy(network).requires_grad_(False)
        self.discriminator = self.scheme.discriminator()
        judge = StarDiscriminator(1, size, critic_width, depth=3)
        # Without its second head, which would name attributes.
        self.critic = nn.Sequential(judge.main, judge.realness)
        self.weights = {"edit": edit, "back": back, "confusion": confusion}
        self.natural, self.head_start = natural, head_start
        self.rates = (rate, critic_rate, surrogate_rate, surrogate_rate)

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """The surrogate and its discriminator, the critic, then P."""
        if "labels" not in batch:
            raise ConfigError(
                "PG trains a manipulator, which needs labels: --data.attributes "
                f"[{', '.join(self.scheme.attributes)}], and a pack that was made with them"
            )
        face, rng = self.cut(batch)
        labels = batch["labels"].float()
        target = self.scheme.target(labels)
        optimizers: Any = self.optimizers()
        self._learn(face, labels, target, optimizers[2:], rng)
        protected = (face + self.generator.shape(face, self.levels) * (self.levels / 255)).clamp(
            0, 1
        )
        self.descend(self.critic_terms(face, protected.detach(), rng), optimizers[1], falling=False)
        terms = self.terms(face, protected, labels, target)
        self.descend(terms, optimizers[0])
        self.follow()

    def _learn(
        self, face: Image, labels: Tensor, target: Tensor, optimizers: Any,  # noqa: ANN401
        rng: torch.Generator,
    ) -> None:  # fmt: skip
        """One step of the surrogate, once it may, and one of its discriminator."""
        small = unit_range_to_signed(resized(face, self.scheme.size))
        self.before.load_state_dict(self.surrogate.state_dict())
        self.discriminator.requires_grad_(False)
        terms, forged = self.scheme.generator_losses(
            self.surrogate, self.discriminator, small, labels, target, rng
        )
        if self.batches_done >= self.head_start:
            named = {f"surrogate_{name}": value for name, value in terms.items()}
            self.descend(named, optimizers[0], falling=False)
        self.discriminator.requires_grad_(True)
        terms = self.scheme.discriminator_losses(self.discriminator, small, forged, labels, rng)
        named = {f"discriminator_{name}": value for name, value in terms.items()}
        self.descend(named, optimizers[1], falling=False)

    def critic_terms(
        self, face: Image, protected: Image, rng: torch.Generator
    ) -> dict[str, Tensor]:
        """WGAN-GP on clean and protected photos."""
        real, fake = unit_range_to_signed(face), unit_range_to_signed(protected)
        wasserstein = adversarial_loss("wgan-gp", self.critic(real), self.critic(fake))
        # The second derivative wants more digits than a half-precision forward keeps.
        with torch.autocast(face.device.type, enabled=False):
            steep = gradient_penalty(lambda view: self.critic(view).sum((1, 2, 3)), real, fake, rng)
        return {"critic": wasserstein.float(), "critic_penalty": 10 * steep}

    def terms(
        self, face: Image, protected: Image, labels: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """What P minimises: what surrogates make of protected photos, and what the critic says."""
        look = partial(self._gain, face=face, labels=labels, target=target)
        objectives = [partial(look, network=net) for net in (self.surrogate, self.before)]
        found = {"surrogates": gradient_of(protected, objectives)}
        if self.natural:
            self.critic.requires_grad_(False)
            score = self.critic(unit_range_to_signed(protected)).float().mean()
            self.critic.requires_grad_(True)
            found["natural"] = -self.natural * score
        return found

    def _gain(
        self, view: Image, *, network: nn.Module, face: Image, labels: Tensor, target: Tensor
    ) -> Tensor:
        parts = self.parts(view, network, face, labels, target)
        total = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        for name, value in parts.items():
            self.log(f"{'now' if network is self.surrogate else 'before'}_{name}", value.detach())
        return total

    def parts(
        self, view: Image, network: nn.Module, face: Image, labels: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """The unweighted terms at one surrogate, smaller is better."""
        clean, seen = (
            unit_range_to_signed(resized(image, self.scheme.size)) for image in (face, view)
        )
        with torch.no_grad():
            wanted = network(clean, target)[0].float()
            reach = (wanted - clean).abs().mean(dim=1, keepdim=True)
        forged = network(seen, target)[0]
        back = network(forged, labels)[0]
        found = {
            "edit": -weighted_difference(forged, wanted, reach),
            "back": -weighted_difference(back, seen, reach),
        }
        if self.weights["confusion"] and self.batches_done >= self.head_start:
            realness, shown = self.discriminator(forged)
            if self.scheme.teacher:
                shown = seen_attributes(self.scheme.teacher, self.scheme.attributes, forged)
            found["confusion"] = realness.mean() + classification(shown, 1 - target)
        return found

    def perturbation(self, face: Image) -> Perturbation:
        """The averaged network's answer."""
        return self.averaged(face, self.levels)[1]

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Adam for P, the critic, the surrogate and its discriminator."""
        networks = (self.generator, self.critic, self.surrogate, self.discriminator)
        return [
            torch.optim.Adam(
                [{"params": list(network.parameters()), "peak": rate}], lr=rate, betas=(0.5, 0.999)
            )
            for network, rate in zip(networks, self.rates, strict=True)
        ], []

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        facts, name = super().CARD, self.hparams["surrogate"]
        summary = f"{self.METHOD}, trained against {name} as it was trained on."
        return {**facts, "summary": summary, "teacher": self.scheme.teacher}

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor's arguments of the network that is shipped."""
        return self.averaged.state_dict(), dict(self._settings)


def _surrogate(name: str, settings: dict[str, Any], size: int) -> tuple[StarScheme, nn.Module]:
    """The way in which a card's network is trained on, and that network, trainable."""
    model = load("manipulator", name, store=WeightStore(), device=torch.device("cpu"))
    if not isinstance(model, StarGANModel):
        raise ConfigError(
            f"`surrogate` must be one of {', '.join(_KINDS.values())}, {name!r} is a "
            f"{type(model).__name__}"
        )
    known = {field.name for field in dataclasses.fields(StarScheme)}
    known -= {"kind", "attributes", "size", "width", "blocks"}  # the network's own
    unknown = set(settings) - known
    if unknown:
        raise ConfigError(
            f"the surrogate has no setting {', '.join(sorted(unknown))}; there are: "
            f"{', '.join(sorted(known))}"
        )
    scheme = StarScheme(
        kind=_KINDS[type(model)], attributes=model.attributes, size=model.native_size or size,
        **settings,
    )  # fmt: skip
    return scheme, copy.deepcopy(model.network).requires_grad_(True)
