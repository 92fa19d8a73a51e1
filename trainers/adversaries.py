"""Discriminators: they judge whether a picture is real, and which attributes it shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ["StarDiscriminator", "adversarial_loss", "gradient_penalty"]


class StarDiscriminator(nn.Module):
    """StarGAN's: (B, 3, S, S) in [-1, 1] -> realness (B, 1 + N, s, s) and attribute logits (B, N).

    The first plane says whether the picture is real. The others say whether each attribute is, and
    count with the sign of the label that the picture claims (`score`).

    Args:
        attributes: N, entries of the label vector.
        size: S, pixels.
        width: Channels of the first layer.
        depth: Layers, each of half the resolution and twice the channels.
        spectral: Whether to bound the layers' norms, as the hinge loss wants it.
        widest: Most channels of a layer.
    """

    def __init__(
        self, attributes: int, size: int, width: int = 64, depth: int = 5, *,
        spectral: bool = False, widest: int = 2048,
    ) -> None:  # fmt: skip
        super().__init__()
        wrap = spectral_norm if spectral else (lambda module: module)
        layers: list[nn.Module] = []
        inputs = 3
        for _ in range(depth):
            layers += [wrap(nn.Conv2d(inputs, width, 4, 2, 1)), nn.LeakyReLU(0.01)]
            inputs, width = width, min(2 * width, widest)
        self.main = nn.Sequential(*layers)
        self.realness = wrap(nn.Conv2d(inputs, 1 + attributes, 3, 1, 1, bias=False))
        # Bounding this one too would keep the logits, and so the gradient of an edit, near zero.
        self.attributes = nn.Conv2d(inputs, attributes, size >> depth, bias=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Realness of every patch, and attribute logits."""
        features = self.main(image)
        return self.realness(features), self.attributes(features)[:, :, 0, 0]

    @staticmethod
    def score(realness: Tensor, labels: Tensor) -> Tensor:
        """How real each patch is, given the labels (B, N) that it claims: (B, s, s), float32."""
        signs = (2 * labels.float() - 1)[:, :, None, None]
        return realness[:, 0].float() + (signs * realness[:, 1:].float()).sum(1)


def adversarial_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on scores; the generator's is `-fake.mean()` for both.

    Args:
        kind: "hinge", or "wgan-gp", to which the penalty is added outside.
        real: Scores of photographs.
        fake: Scores of manipulated ones.
    """
    if kind == "hinge":
        return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def gradient_penalty(
    score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, rng: torch.Generator
) -> Tensor:
    """Squared distance from 1 of a score's gradient norm, between photo and forgery.

    Source:
        WGAN-GP (Gulrajani et al., 2017), https://arxiv.org/abs/1704.00028.
    """
    share = torch.rand(len(real), 1, 1, 1, generator=rng).to(real)
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(score(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
