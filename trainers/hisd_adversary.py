"""HiSD's discriminator: is this a photo, of that value of a tag, with that style?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from shields.models.hisd_network import DownBlock

__all__ = ["HisdDiscriminator"]


class HisdDiscriminator(nn.Module):
    """Residual blocks, then an end for each tag that sees the style: one score per value.

    Args:
        attributes: Number of values of each tag.
        size: Side of the square that it sees, pixels.
        style: Numbers of a style.
        width: Channels at full resolution.
        depth: Residual blocks, each of half the resolution and twice the channels.
        widest: Most channels of a block.
        spectral: Whether to bound the layers' norms, as the hinge loss wants it.
    """

    def __init__(
        self, attributes: Sequence[int], size: int, style: int, width: int = 16, depth: int = 4,
        widest: int = 128, *, spectral: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 1)]
        for _ in range(depth):
            layers.append(DownBlock(width, min(2 * width, widest)))
            width = min(2 * width, widest)
        # Over the whole map: where a face is cut out the same way, places mean something.
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, width, size >> depth), nn.Flatten()]
        self.trunk = nn.Sequential(*layers)
        self.ends = nn.ModuleList(
            nn.Sequential(
                nn.LeakyReLU(0.2), nn.Linear(width + style, width), nn.LeakyReLU(0.2),
                nn.Linear(width, values),
            )
            for values in attributes
        )  # fmt: skip
        if spectral:
            self.apply(_bounded)

    def forward(self, image: Tensor, style: Tensor, tag: int, value: Tensor) -> Tensor:
        """Scores (B,) of images in [-1, 1], styles (B, S) and values (B,) of one tag."""
        features = self.trunk(image)
        scores: Tensor = self.ends[tag](torch.cat([features, style.to(features)], dim=1))
        return scores.gather(1, value[:, None])[:, 0]


def _bounded(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        spectral_norm(module)
