"""ID-Guard's generators: image and prior perturbation in, a raw perturbation in [-1, 1] out.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349: the ResNet, of 7,850,819
    parameters at width 64, and the sizes of its rivals in Table IV. U-Net: Ronneberger et al.
    (2015), https://arxiv.org/abs/1505.04597, in the shape of pix2pix (Isola et al., 2017),
    https://arxiv.org/abs/1611.07004.

Differs:
    The paper names a U-Net of 54,414,595 parameters and gives no layers. Ours has that number with
    eight levels, biased convolutions and one scale and shift for all layers of a width; that it is
    the authors' network is a guess. Statistics are each layer's own: shared ones would be wrong in
    evaluation mode.
    The paper's transformer has 179,348,843 parameters and is not described. Ours is small, and a
    plain one over patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETWORKS", "GeneratorNetwork", "ResNetGenerator", "TransformerGenerator",
           "UNetGenerator"]  # fmt: skip


class GeneratorNetwork(nn.Module):
    """(B, channels, H, W), about [-1, 1] -> (B, 3, H, W) in [-1, 1], not bounded by a budget."""

    #: what comes in: 6 is an image and a perturbation, 3 an image alone
    channels: int
    #: sides must be multiples of this, pixels
    multiple: int

    def initialise(self) -> None:
        """Draw convolutions from N(0, 0.02) and scales from N(1, 0.02), as the authors do."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                nn.init.normal_(module.weight, 1.0, 0.02)


class _Residual(nn.Module):
    """Two normalised convolutions over reflected borders, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + self.main(features)


class ResNetGenerator(GeneratorNetwork):
    """Two halvings, residual blocks, two doublings; `main` is numbered as in the released file.

    Args:
        width: Channels at full resolution.
        blocks: Residual blocks.
        channels: Of the input.
    """

    def __init__(self, width: int = 64, blocks: int = 6, channels: int = 6) -> None:
        super().__init__()
        self.channels, self.multiple = channels, 4
        stem: list[nn.Module] = [
            nn.ReflectionPad2d(3), nn.Conv2d(channels, width, 7, bias=False),
            nn.BatchNorm2d(width), nn.SELU(),
        ]  # fmt: skip
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for wide in (width, 2 * width):
            half = nn.Conv2d(wide, 2 * wide, 3, 2, 1, bias=False)
            down += [half, nn.BatchNorm2d(2 * wide), nn.SELU()]
        for wide in (2 * width, width):
            double = nn.ConvTranspose2d(2 * wide, wide, 3, 2, 1, output_padding=1, bias=False)
            up += [double, nn.BatchNorm2d(wide), nn.SELU()]
        middle = [_Residual(4 * width) for _ in range(blocks)]
        end = [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
        self.main = nn.Sequential(*stem, *down, *middle, *up, *end)
        self.initialise()

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, 3, H, W) in [-1, 1]."""
        raw: Tensor = self.main(features)
        return raw


class UNetGenerator(GeneratorNetwork):
    """Halvings down to `depth` levels and back, each level joined with its twin.

    Args:
        width: Channels of the first level; they double up to eight times that.
        depth: Levels, two or more.
        channels: Of the input.
    """

    def __init__(self, width: int = 64, depth: int = 8, channels: int = 6) -> None:
        super().__init__()
        self.channels, self.multiple, self.depth = channels, 2**depth, depth
        wide = [width * min(2**level, 8) for level in range(depth)]
        inputs = [channels, *wide[:-1]]
        pairs = zip(inputs, wide, strict=True)
        self.down = nn.ModuleList(nn.Conv2d(few, many, 4, 2, 1) for few, many in pairs)
        # Every way up but the innermost also takes what its twin made.
        fed = [2 * many for many in wide[:-1]] + wide[-1:]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(many, few, 4, 2, 1)
            for many, few in zip(fed, [3, *wide[:-1]], strict=True)
        )
        self.down_norms = nn.ModuleList(nn.BatchNorm2d(many, affine=False) for many in wide[1:-1])
        self.up_norms = nn.ModuleList(nn.BatchNorm2d(many, affine=False) for many in wide[:-1])
        widths = {str(many): many for many in (*wide[1:-1], *wide[:-1])}
        self.scale = nn.ParameterDict(
            {key: nn.Parameter(torch.empty(many).normal_(1, 0.02)) for key, many in widths.items()}
        )
        self.shift = nn.ParameterDict(
            {key: nn.Parameter(torch.zeros(many)) for key, many in widths.items()}
        )
        self.initialise()

    def _normalised(self, norm: nn.Module, features: Tensor) -> Tensor:
        key = str(features.shape[1])
        scaled: Tensor = norm(features) * self.scale[key].view(-1, 1, 1)
        return scaled + self.shift[key].view(-1, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, 3, H, W) in [-1, 1]."""
        twins: list[Tensor] = []
        for level, halve in enumerate(self.down):
            features = halve(functional.leaky_relu(features, 0.2) if level else features)
            if 0 < level < self.depth - 1:
                features = self._normalised(self.down_norms[level - 1], features)
            twins.append(features)
        features = twins.pop()
        for level in reversed(range(1, self.depth)):
            features = self.up[level](functional.relu(features))
            features = self._normalised(self.up_norms[level - 1], features)
            features = torch.cat([features, twins.pop()], dim=1)
        raw: Tensor = self.up[0](functional.relu(features))
        return raw.tanh()


class TransformerGenerator(GeneratorNetwork):
    """Attention among all patches; a last convolution over the joined patches hides the seams.

    Args:
        width: Channels of a patch, a multiple of 4 and of `heads`.
        depth: Layers of attention.
        heads: Heads of each.
        patch: Side of a patch, pixels.
        channels: Of the input.
    """

    #: channels at full resolution
    FINE: ClassVar[int] = 16

    def __init__(
        self, width: int = 192, depth: int = 6, heads: int = 6, patch: int = 8, channels: int = 6
    ) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"width must be a multiple of 4 and of {heads} heads, got {width}")
        self.channels, self.multiple, self.width = channels, patch, width
        self.cut = nn.Conv2d(channels, width, patch, patch)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.grow = nn.Linear(width, self.FINE * patch**2)
        self.join = nn.Sequential(nn.GELU(), nn.Conv2d(self.FINE + channels, 3, 3, padding=1))

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, 3, H, W) in [-1, 1]."""
        patches = self.cut(features)
        rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = self.layers(tokens + _places(rows, columns, self.width).to(tokens))
        grown = self.grow(tokens).transpose(1, 2).unflatten(2, (rows, columns))
        fine = functional.pixel_shuffle(grown, self.multiple)
        raw: Tensor = self.join(torch.cat([fine, features], dim=1))
        return raw.tanh()


def _places(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of row and column: (rows * columns, width), for grids of any size."""
    rates = torch.exp(torch.arange(width // 4) * (-math.log(10_000.0) / (width // 4)))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    turns = [place.reshape(-1, 1) * rates for place in (y, x)]
    return torch.cat([wave for turn in turns for wave in (turn.sin(), turn.cos())], dim=1)


#: name in a card's `[config]` -> network
NETWORKS: Mapping[str, type[GeneratorNetwork]] = {
    "resnet": ResNetGenerator,
    "unet": UNetGenerator,
    "transformer": TransformerGenerator,
}
