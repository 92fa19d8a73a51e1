"""StarGAN, AttentionGAN and Fixed-Point GAN: one scheme, whose weights make it one or another.

Source:
    StarGAN (Choi et al., 2018), https://arxiv.org/abs/1711.09020; AttentionGAN (Tang et al., 2019),
    https://arxiv.org/abs/1903.12296; Fixed-Point GAN (Siddiquee et al., 2019),
    https://arxiv.org/abs/1908.06965.

Differs:
    Attributes are judged by a classifier that was trained before, at half the size and under noise
    (`trainers.attribute_classifier`), and not by the discriminator's second head: on few photos
    that head teaches edits that only it sees. `teacher=""` is the papers' way. One discriminator
    step a step, under R1, not five under WGAN-GP, which is an option. All three kinds get the
    identity term of Fixed-Point GAN, on a quarter of the batch, since a manipulator that blurs
    whatever it is given is disrupted by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.models.star_networks import AttentionGenerator, FixedPointGenerator, StarGenerator
from trainers.adversaries import (
    StarDiscriminator,
    adversarial_loss,
    fooling_loss,
    gradient_at_photos,
    gradient_penalty,
)
from trainers.scheme import Scheme, classification, seen_attributes

__all__ = ["StarScheme"]

_GENERATORS: dict[str, type[StarGenerator]] = {
    "stargan": StarGenerator,
    "aggan": AttentionGenerator,
    "fpgan": FixedPointGenerator,
}


@dataclass(frozen=True, kw_only=True)
class StarScheme(Scheme):
    """Adversarial, domain classification, cycle and identity losses."""

    #: "stargan", "aggan" or "fpgan"
    kind: str = "stargan"
    #: generator's residual blocks
    blocks: int = 6
    #: discriminator's channels in its first layer, and its layers
    adversary_width: int = 32
    adversary_depth: int = 3
    #: logistic with R1; hinge with spectral norm; or the papers', which wants a slower generator
    adversarial: Literal["logistic", "hinge", "wgan-gp"] = "logistic"
    #: weight of R1, or of the papers' gradient penalty
    penalty: float = 1.0
    #: card of the classifier that says whether an edit shows; empty: the discriminator's own head
    teacher: str = "expression-teacher"
    #: standard deviation of the noise, range 2, through which it looks
    noise: float = 0.3
    classification: float = 1.0
    #: coming back to the photo, L1
    cycle: float = 10.0
    #: leaving the photo alone where nothing is to change, L1
    identity: float = 10.0
    #: L1 distance from the photo, and total variation of the attention: AttentionGAN's
    change: float = 0.0
    smoothness: float = 0.0

    def generator(self) -> nn.Module:
        """The generator that `kind` names."""
        return _GENERATORS[self.kind](len(self.attributes), self.width, self.blocks)

    def discriminator(self) -> nn.Module:
        """StarGAN's discriminator."""
        return StarDiscriminator(
            len(self.attributes), self.size, self.adversary_width, self.adversary_depth,
            spectral=self.adversarial == "hinge",
        )  # fmt: skip

    def forge(self, generator: nn.Module, face: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Label vectors are absolute: the photo's own labels do not matter."""
        forged: Tensor = generator(face, target)[0]
        return forged

    def generator_losses(
        self, generator: nn.Module, discriminator: nn.Module, face: Tensor, labels: Tensor,
        target: Tensor, rng: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
        """Fool, show the target, come back, leave alone."""
        attention = None
        if self.kind == "aggan":
            forged, _, attention = cast(AttentionGenerator, generator).compose(face, target)
        else:
            forged, _ = generator(face, target)
        realness, shown = discriminator(forged)
        back, _ = generator(forged, labels)
        few = max(1, len(face) // 4)
        same, _ = generator(face[:few], labels[:few])
        if self.teacher:
            noise = self.noise * torch.randn(face.shape, generator=rng).to(face)
            shown = seen_attributes(self.teacher, self.attributes, forged.float() + noise)
        terms = {
            "fool": fooling_loss(self.adversarial, realness),
            "class": self.classification * classification(shown, target),
            "cycle": self.cycle * functional.l1_loss(back.float(), face),
            "identity": self.identity * functional.l1_loss(same.float(), face[:few]),
        }
        if self.change:
            terms["change"] = self.change * functional.l1_loss(forged.float(), face)
        if self.smoothness and attention is not None:
            terms["smooth"] = self.smoothness * _total_variation(attention.float())
        return terms, forged.detach().float()

    def discriminator_losses(
        self, discriminator: nn.Module, face: Tensor, forged: Tensor, labels: Tensor,
        rng: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Tell photos from forgeries, and name the photos' attributes."""
        realness, shown = discriminator(torch.cat([face, forged]))
        real, fake = realness.chunk(2)
        terms = {"adversarial": adversarial_loss(self.adversarial, real, fake)}
        if not self.teacher:
            named = classification(shown[: len(face)], labels)
            terms["class"] = self.classification * named
        if self.adversarial != "hinge":
            terms["penalty"] = self.penalty * self._steepness(discriminator, face, forged, rng)
        return terms

    def _steepness(
        self, discriminator: nn.Module, face: Tensor, forged: Tensor, rng: torch.Generator
    ) -> Tensor:
        # The second derivative wants more digits than a half-precision forward keeps.
        with torch.autocast(face.device.type, enabled=False):
            if self.adversarial == "logistic":
                return gradient_at_photos(lambda image: discriminator(image)[0].mean((1, 2)), face)
            return gradient_penalty(
                lambda image: discriminator(image)[0].sum((1, 2)), face, forged, rng
            )

    def config(self) -> dict[str, object]:
        """Names and native size; the rest is in the tensors' shapes."""
        return {"attributes": list(self.attributes), "native_size": self.size}


def _total_variation(planes: Tensor) -> Tensor:
    down = (planes[..., 1:, :] - planes[..., :-1, :]).abs().mean()
    return down + (planes[..., 1:] - planes[..., :-1]).abs().mean()
