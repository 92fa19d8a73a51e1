"""HiSD: edits by tag and style, learned from attributes that are on or off.

Source:
    HiSD (Li et al., 2021), https://arxiv.org/abs/2103.01456.

Differs:
    Every label is a tag of two values, "with" and "without". The discriminator is not told the
    photo's other attributes, since the packs hold few. Reconstruction, and the bound on the
    gradient of the discriminator's score, are taken on a quarter of the batch, which has the same
    mean. One step trains both networks on the same forgeries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.models.hisd_network import HisdGenerator
from trainers.adversaries import gradient_at_photos
from trainers.hisd_adversary import HisdDiscriminator
from trainers.scheme import Scheme

__all__ = ["Forgeries", "HisdScheme"]


@dataclass(frozen=True, kw_only=True)
class Forgeries:
    """What the generator made of a batch, for the discriminator; without a graph."""

    #: the tag that was edited
    tag: int
    #: (B,) its value in the photos, and the one that was asked for
    own: Tensor
    asked: Tensor
    #: (B, S) style that the photos show, and the one that was asked for
    style: Tensor
    wanted: Tensor
    #: (B, 3, S, S) with the wanted style, and brought back to the photo's
    forged: Tensor
    back: Tensor


@dataclass(frozen=True, kw_only=True)
class HisdScheme(Scheme):
    """Adversarial, reconstruction, cycle and style losses, of one tag a step."""

    #: channels inside a translator, and its residual blocks
    inner: int = 32
    blocks: int = 7
    #: numbers of a style, and of the noise that becomes one
    style: int = 64
    noise: int = 16
    #: channels inside a mapper
    hidden: int = 64
    #: extractor's channels, at full resolution and after each halving
    extractor: tuple[int, ...] = (8, 16, 32, 64, 128)
    #: discriminator's channels at full resolution, and its halvings
    adversary_width: int = 16
    adversary_depth: int = 4
    #: logistic with a bounded gradient at photos (R1), or hinge with spectral norm
    adversarial: Literal["logistic", "hinge"] = "logistic"
    #: weight of the squared gradient norm, half of it as in the paper; logistic only
    penalty: float = 1.0
    #: weights of fooling the discriminator, of the style read from the forgery, L1, …
    fool: float = 1.0
    style_weight: float = 1.0
    #: … of the photo out of its own code, with and without its own style, L1, …
    reconstruction: float = 1.0
    #: … and of coming back to the photo, L1
    cycle: float = 1.0

    def generator(self) -> nn.Module:
        """The generator, begun so that signals keep their size where nothing normalises."""
        network = HisdGenerator(
            self._values, self.width, self.inner, self.blocks, self.style, self.noise, self.hidden,
            tuple(self.extractor),
        )  # fmt: skip
        network.apply(_begin)
        for name, value in network.named_parameters():
            if "style_to_params" in name:  # scales near 1: styles shall steer, not drown the face
                value.data.mul_(0.35)
        return network

    def discriminator(self) -> nn.Module:
        """A discriminator that is told tag, value and style."""
        network = HisdDiscriminator(
            self._values, self.size, self.style, self.adversary_width, self.adversary_depth,
            spectral=self.adversarial == "hinge",
        )  # fmt: skip
        # Spectral norm sets the size itself, and its weights are no plain parameters any more.
        return network if self.adversarial == "hinge" else network.apply(_begin)

    def target(self, labels: Tensor) -> Tensor:
        """The other value of every tag; a step turns one of them."""
        return 1 - labels

    @property
    def _values(self) -> tuple[int, ...]:
        return (2,) * len(self.attributes)

    def forge(self, generator: nn.Module, face: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Change, one after another, the tags that differ, by the style of the fixed noise.

        A face of which nothing is to change is encoded and decoded.
        """
        network = cast(HisdGenerator, generator)
        code = network.encode(face)
        for tag in range(labels.shape[1]):
            styles = network.imagine(network.fixed_noise(), tag)[0]
            changed = network.translate(code, styles[_value(target, tag)], tag)
            differs = (labels[:, tag] != target[:, tag])[:, None, None, None]
            code = torch.where(differs, changed, code)
        return network.decode(code)

    def generator_losses(
        self, generator: nn.Module, discriminator: nn.Module, face: Tensor, labels: Tensor,
        target: Tensor, rng: torch.Generator,
    ) -> tuple[dict[str, Tensor], Forgeries]:  # fmt: skip
        """Fool, keep, come back, show the style; for one random tag."""
        network = cast(HisdGenerator, generator)
        tag = int(torch.randint(len(self.attributes), (), generator=rng))
        own, asked = _value(labels, tag), _value(target, tag)
        noise = torch.randn(len(face), self.noise, generator=rng).to(face)
        code, style = network.encode(face), network.extract(face, tag)
        wanted = network.imagine(noise, tag)[torch.arange(len(face)), asked]
        few = max(1, len(face) // 4)
        codes, styles = torch.cat([code, code[:few]]), torch.cat([wanted, style[:few]])
        codes = torch.cat([network.translate(codes, styles, tag), code[:few]])
        forged, kept, plain = torch.split(network.decode(codes), [len(face), few, few])
        back = network.decode(network.translate(network.encode(forged), style, tag))
        score = discriminator(
            torch.cat([forged, back]), torch.cat([wanted, style]), tag, torch.cat([asked, own])
        )
        terms = {
            "fool": self.fool * self._fooling(score.float()),
            "plain": self.reconstruction * _distance(plain, face[:few]),
            "kept": self.reconstruction * _distance(kept, face[:few]),
            "cycle": self.cycle * _distance(back, face),
            "style": self.style_weight * _distance(network.extract(forged, tag), wanted),
        }
        style, wanted, forged, back = (
            part.detach().float() for part in (style, wanted, forged, back)
        )
        made = Forgeries(
            tag=tag, own=own, asked=asked, style=style, wanted=wanted, forged=forged, back=back
        )  # fmt: skip
        return terms, made

    def discriminator_losses(
        self, discriminator: nn.Module, face: Tensor, forged: Any, labels: Tensor,  # noqa: ANN401
        rng: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Tell photos with their own style from both kinds of forgeries with theirs."""
        made: Forgeries = forged
        score = discriminator(
            torch.cat([face, made.forged, made.back]),
            torch.cat([made.style, made.wanted, made.style]),
            made.tag,
            torch.cat([made.own, made.asked, made.own]),
        )
        real, fake = torch.split(score.float(), [len(face), 2 * len(face)])
        if self.adversarial == "hinge":
            margin = functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
            return {"adversarial": margin}
        told_apart = functional.softplus(-real).mean() + functional.softplus(fake).mean()
        few = max(1, len(face) // 4)
        # The second derivative wants more digits than a half-precision forward keeps.
        with torch.autocast(face.device.type, enabled=False):
            steepness = gradient_at_photos(
                lambda photo: discriminator(photo, made.style[:few], made.tag, made.own[:few]),
                face[:few],
            )
        return {"adversarial": told_apart, "penalty": self.penalty / 2 * steepness}

    def _fooling(self, score: Tensor) -> Tensor:
        return -score.mean() if self.adversarial == "hinge" else functional.softplus(-score).mean()

    def config(self) -> dict[str, object]:
        """Tags, their values and native size; the rest is in the tensors' shapes."""
        return {
            "tags": list(self.attributes),
            "attributes": [["with", "without"] for _ in self.attributes],
            "native_size": self.size,
        }


def _value(labels: Tensor, tag: int) -> Tensor:
    """Index (B,) of a tag's value: 0 is "with", as in the published networks."""
    return 1 - labels[:, tag].long()


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    return functional.l1_loss(ours.float(), theirs.float())


def _begin(module: nn.Module) -> None:
    """Begin a layer so that it keeps the size of signals: what is 1 x 1 follows no activation."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        nn.init.kaiming_normal_(module.weight, a=1.0 if pointwise else 0.2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
