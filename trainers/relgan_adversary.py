"""RelGAN's discriminator: is it real, was this change made, how far was it gone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RelganDiscriminator"]


class RelganDiscriminator(nn.Module):
    """One trunk, three heads; pictures (B, 3, S, S) in [-1, 1].

    Args:
        attributes: N, entries of the relative vector.
        size: S, pixels.
        width: Channels of the trunk's first layer.
        depth: Its layers, each of half the resolution and twice the channels.
        degrees: Channels whose mean is the interpolation head's answer.
        widest: Most channels of a layer.

    Source:
        RelGAN (Wu et al., 2019), https://arxiv.org/abs/1908.07269.

    Differs:
        Matching answers once a pair, not once a patch: most patches show nothing of an attribute.
        To its answer comes the vector's product with a difference of the two pictures (a
        projection, as in Miyato and Koyama, 2018), which learns sooner than the layers beside it.
    """

    def __init__(
        self, attributes: int, size: int, width: int = 64, depth: int = 6, *,
        degrees: int = 16, widest: int = 2048,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 4, 2, 1), nn.LeakyReLU(0.01)]
            inputs, width = width, min(2 * width, widest)
        self.trunk = nn.Sequential(*layers)
        self.realness = nn.Conv2d(inputs, 1, 3, 1, 1)
        self.degree = nn.Conv2d(inputs, degrees, 1)
        self.pair = nn.Conv2d(2 * inputs + attributes, inputs, 1)
        self.verdict = nn.Conv2d(inputs, 1, size >> depth)
        self.shown = nn.Conv2d(inputs, attributes, size >> depth, bias=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Realness of every patch, (B, 1, s, s), and the features for the other heads."""
        features = self.trunk(image)
        return self.realness(features), features

    def interpolation(self, features: Tensor) -> Tensor:
        """How far from both ends of a change, (B,): about 0 at the ends, 0.5 half-way."""
        return self.degree(features).float().mean(dim=(1, 2, 3))

    def matching(self, before: Tensor, after: Tensor, vector: Tensor) -> Tensor:
        """Whether the relative vector (B, N) leads from one picture's features to the other's.

        Returns:
            Score (B,), 1 where it does, 0 where not.
        """
        planes = vector[:, :, None, None].expand(-1, -1, *before.shape[2:])
        hidden = self.pair(torch.cat([before, after, planes.to(before)], dim=1))
        score = self.verdict(functional.leaky_relu(hidden, 0.01))[:, 0, 0, 0].float()
        difference = (self.shown(after) - self.shown(before))[:, :, 0, 0].float()
        return score + (vector * difference).sum(dim=1)
