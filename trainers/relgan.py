"""RelGAN: the generator is told what changes, and a third head watches the way there.

Source:
    RelGAN (Wu et al., 2019), https://arxiv.org/abs/1908.07269; weights of the losses as in the
    authors' code, https://github.com/elvisyjlin/RelGAN-PyTorch.

Differs:
    A vector is target minus labels, so +1 adds an attribute, as the paper says and the authors'
    PyTorch code does not do. Of a triplet made up to be wrong, the labels say whether it is: with
    few attributes many happen to be right. On few photos the matching head alone teaches edits that
    only it sees; so it judges under noise, and a classifier that was trained before, on perturbed
    faces (`trainers.attribute_classifier`), must see the edit, too: `noise=0` and `teacher=""` are
    the paper's way. Identity and interpolation are trained on a quarter of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.models.relgan_network import RelganGenerator
from trainers.adversaries import adversarial_loss, gradient_penalty
from trainers.relgan_adversary import RelganDiscriminator
from trainers.scheme import Scheme, classification, seen_attributes

__all__ = ["Forgeries", "RelganScheme", "triplets"]


class Forgeries(NamedTuple):
    """What the generator made of a batch, detached; B faces, the first b of them for the rest."""

    #: (B, N) the change asked for
    vector: Tensor
    #: (B, 3, S, S) all of it
    full: Tensor
    #: (b, 3, S, S) none of it
    none: Tensor
    #: (b, 3, S, S) a share of it
    between: Tensor
    #: (b,) that share, [0, 1]
    share: Tensor


@dataclass(frozen=True, kw_only=True)
class RelganScheme(Scheme):
    """Adversarial, matching, cycle, identity and interpolation losses."""

    #: generator's residual blocks
    blocks: int = 6
    #: share of the norms' running statistics that each forward keeps
    decay: float = 0.99
    #: discriminator's channels in its first layer, and its layers
    adversary_width: int = 32
    adversary_depth: int = 4
    #: the authors', or one of the others' losses
    adversarial: Literal["lsgan", "wgan-gp", "hinge"] = "lsgan"
    #: gradient penalty of the discriminator; 0 saves its cost
    penalty: float = 10.0
    #: showing the change that was asked for
    matching: float = 1.0
    #: weight of forgeries among what the discriminator calls no match, the authors' is 1
    doubt: float = 1.0
    #: standard deviation of the noise, range 2, under which a change must be seen
    noise: float = 0.1
    #: card of the classifier that must see the change, too; empty: none
    teacher: str = "expression-teacher"
    classification: float = 1.0
    #: coming back to the photo, and leaving it alone where nothing is to change, L1
    cycle: float = 10.0
    identity: float = 10.0
    #: looking like an end of the change all the way
    interpolation: float = 1.0
    #: correlation of the generator's input channels
    orthogonal: float = 0.0

    def generator(self) -> nn.Module:
        """RelGAN's generator."""
        return RelganGenerator(len(self.attributes), self.width, self.blocks, self.decay)

    def discriminator(self) -> nn.Module:
        """RelGAN's discriminator with its three heads."""
        return RelganDiscriminator(
            len(self.attributes), self.size, self.adversary_width, self.adversary_depth
        )

    def forge(self, generator: nn.Module, face: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """The relative vector is what has to be added to the labels."""
        forged: Tensor = generator(face, target - labels)[0]
        return forged

    def generator_losses(
        self, generator: nn.Module, discriminator: nn.Module, face: Tensor, labels: Tensor,
        target: Tensor, rng: torch.Generator,
    ) -> tuple[dict[str, Tensor], Forgeries]:  # fmt: skip
        """Fool, show the change, come back, leave alone, go all the way smoothly."""
        adversary = cast(RelganDiscriminator, discriminator)
        vector = target - labels
        few = max(1, len(face) // 4)
        share = torch.rand(few, generator=rng).to(face)
        forged, _ = generator(face, vector)
        back, _ = generator(forged, -vector)
        none, _ = generator(face[:few], torch.zeros_like(vector[:few]))
        between, _ = generator(face[:few], share[:, None] * vector[:few])
        score, _ = adversary(forged)
        _, before = adversary(self._noisy(face, rng))
        _, after = adversary(self._noisy(forged, rng))
        _, way = adversary(between)
        terms = {
            "fool": self._fooled(score.float()),
            "match": self.matching
            * (adversary.matching(before, after, vector) - 1).square().mean(),
            "cycle": self.cycle * functional.l1_loss(back.float(), face),
            "identity": self.identity * functional.l1_loss(none.float(), face[:few]),
            "between": self.interpolation * adversary.interpolation(way).square().mean(),
        }
        if self.teacher:
            shown = seen_attributes(self.teacher, self.attributes, forged)
            terms["class"] = self.classification * classification(shown, target)
        if self.orthogonal:
            terms["orthogonal"] = self.orthogonal * _correlation(generator)
        full, none, between = (image.detach().float() for image in (forged, none, between))
        return terms, Forgeries(vector, full, none, between, share)

    def discriminator_losses(
        self, discriminator: nn.Module, face: Tensor, forged: Any, labels: Tensor,  # noqa: ANN401
        rng: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Tell photos from forgeries, right triplets from wrong, ends of a change from its way."""
        made = cast(Forgeries, forged)
        adversary = cast(RelganDiscriminator, discriminator)
        score, features = adversary(torch.cat([face, made.full]))
        real, fake = score.float().chunk(2)
        terms = {
            "adversarial": self._told_apart(real, fake),
            "match": self.matching * self._matching(adversary, face, made, labels, rng),
            "between": self.interpolation
            * self._between(adversary, made, features[len(face) : len(face) + len(made.share)]),
        }
        if self.penalty:
            # The second derivative wants more digits than a half-precision forward keeps.
            with torch.autocast(face.device.type, enabled=False):
                terms["penalty"] = self.penalty * gradient_penalty(
                    lambda picture: adversary(picture)[0], face, made.full, rng
                )
        return terms

    def config(self) -> dict[str, object]:
        """Names, sign and native size; the rest is in the tensors' shapes."""
        return {"attributes": list(self.attributes), "native_size": self.size, "sign": 1}

    def _fooled(self, fake: Tensor) -> Tensor:
        return (fake - 1).square().mean() if self.adversarial == "lsgan" else -fake.mean()

    def _told_apart(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.adversarial == "lsgan":
            return (real - 1).square().mean() + fake.square().mean()
        return adversarial_loss(self.adversarial, real, fake)

    def _matching(
        self, adversary: RelganDiscriminator, face: Tensor, made: Forgeries, labels: Tensor,
        rng: torch.Generator,
    ) -> Tensor:  # fmt: skip
        _, features = adversary(self._noisy(face, rng))
        first, second, vector, truth = triplets(labels)
        score = adversary.matching(features[first], features[second], vector)
        loss = (score - truth).square().mean()
        if self.doubt:
            _, after = adversary(self._noisy(made.full, rng))
            score = adversary.matching(features, after, made.vector)
            loss = loss + self.doubt * score.square().mean()
        return loss

    def _between(self, adversary: RelganDiscriminator, made: Forgeries, full: Tensor) -> Tensor:
        """Distance from the nearer end for what lies between; 0 for that end itself."""
        _, way = adversary(made.between)
        _, none = adversary(made.none)
        # Where nothing was to change, every point of the way is an end.
        changes = (made.vector[: len(made.share)] != 0).any(dim=1)
        distance = torch.minimum(made.share, 1 - made.share) * changes
        near = made.share < 0.5
        end = torch.where(near, adversary.interpolation(none), adversary.interpolation(full))
        return ((adversary.interpolation(way) - distance).square() + end.square()).mean()

    def _noisy(self, image: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(image.shape, generator=rng).to(image)
        return image + self.noise * noise


def triplets(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of a batch's photos with a vector each: right ones, and the paper's four wrong ones.

    Args:
        labels: (B, N), 0 or 1.

    Returns:
        Indices of the first and of the second photo, (5B,) each; relative vectors (5B, N); and
        whether a vector truly leads from the first photo's labels to the second's, (5B,), 0 or 1.
    """
    one = torch.arange(len(labels), device=labels.device)
    two, three = one.roll(1), one.roll(2)

    def change(first: Tensor, second: Tensor) -> Tensor:
        return labels[second] - labels[first]

    drawn = (
        (one, two, change(one, two)),
        (three, two, change(one, two)),
        (one, three, change(one, two)),
        (one, two, change(one, three)),
        (one, two, change(three, two)),
    )
    first, second, vector = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    truth = (change(first, second) == vector).all(dim=1)
    return first, second, vector, truth.to(labels.dtype)


def _correlation(network: nn.Module) -> Tensor:
    """Squared inner products of different input channels, over all positions of all kernels."""
    total = torch.zeros((), device=next(network.parameters()).device)
    for parameter in network.parameters():
        if parameter.ndim == 4 and parameter.shape[-1] > 1:
            channels = parameter.flatten(2).permute(2, 0, 1).float()
            products = channels.mT @ channels
            alone = torch.diagonal(products, dim1=1, dim2=2)
            total = total + products.square().sum() - alone.square().sum()
    return total
