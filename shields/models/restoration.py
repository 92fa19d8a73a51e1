"""Restoration: small networks that take a photo's damage away, or a perturbation's.

Source:
    SRVGG, the "Compact" layout: Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure
    Synthetic Data (Wang, Xie, Dong, Shan, 2021), https://arxiv.org/abs/2107.10833, in the form of
    its code's small general model: a plain chain of convolutions, pixel shuffle at its end, and the
    photo itself added. The keys of the weights are that layout's, so that other programs load them.
    U-Net as a purifier that knows its opponent: LightShed (Foerster et al., 2025),
    https://www.usenix.org/conference/usenixsecurity25/presentation/foerster.

Differs:
    Compact: a photo of any size runs in tiles that overlap by what a pixel depends on, which gives
    what the whole would give.
    LightShed adds attention and judges whether there is a perturbation at all; here it is
    subtracted in any case.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.models.ars_network import UNet
from shields.models.base import Frozen, unit_range_to_signed
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["Compact", "CompactRestorer", "PerturbationUNet", "Restorer", "UNetRestorer"]


class Compact(nn.Module):
    """(B, 3, H, W), [0, 1] -> (B, 3, scale H, scale W), not clamped.

    Args:
        scale: How many times larger the result is, 1 or 2.
        features: Channels between the convolutions.
        convolutions: How many there are between the first and the last.
    """

    def __init__(self, scale: int = 2, features: int = 48, convolutions: int = 12) -> None:
        super().__init__()
        if scale not in (1, 2):
            raise ValueError(f"`scale` must be 1 or 2, got {scale}")
        self.scale = scale
        #: how far away a pixel of the input may lie from one that it changes, pixels
        self.reach = convolutions + 2
        layers: list[nn.Module] = []
        for inputs in (3, *[features] * convolutions):
            convolution = nn.Conv2d(inputs, features, 3, padding=1)
            # As loud behind as before; torch's own start fades in so many layers.
            nn.init.kaiming_normal_(convolution.weight, a=0.25)
            layers += [convolution, nn.PReLU(features)]
        last = nn.Conv2d(features, 3 * scale**2, 3, padding=1)
        _quiet(last)
        self.body = nn.Sequential(*layers, last)

    def forward(self, image: Image) -> Image:
        """Add what the convolutions make of a photo to its nearest-neighbour enlargement."""
        change = functional.pixel_shuffle(self.body(image), self.scale)
        return (
            functional.interpolate(image, scale_factor=float(self.scale), mode="nearest") + change
        )


def _quiet(layer: nn.Conv2d) -> None:
    """Let training begin where a network changes next to nothing, yet every layer hears of it."""
    nn.init.normal_(layer.weight, std=1e-3)
    assert layer.bias is not None, "it has one"
    nn.init.zeros_(layer.bias)


class PerturbationUNet(nn.Module):
    """(B, 3, H, W), [0, 1] -> the same without what was added to it, not clamped.

    Args:
        widths: Channels of the U-Net at each resolution; sides are multiples of `multiple`.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.unet = UNet(3, 3, widths)
        self.multiple = self.unet.multiple
        # Training begins where nothing is taken for a perturbation.
        for value in self.unet.last.parameters():
            nn.init.zeros_(value)

    def forward(self, image: Image) -> Image:
        """Predict the perturbation and subtract it."""
        return image - self.unet(unit_range_to_signed(image))


class Restorer(Frozen, ABC):
    """A network that takes away what was done to a photo."""

    #: how many times larger the result is
    scale: int = 1
    HOT: ClassVar[tuple[str, ...]] = ("_restore",)

    @abstractmethod
    def _restore(self, image: Image) -> Image:
        """(B, 3, H, W), [0, 1], any size -> (B, 3, scale H, scale W), about [0, 1]."""

    def restore(self, image: Image) -> Image:
        """Restore (B, 3, H, W), [0, 1], any size: (B, 3, scale H, scale W), [0, 1]."""
        return self._restore(image).float().clamp(0, 1)


class CompactRestorer(Restorer):
    """A chain of convolutions, over photos of any size."""

    #: side of what runs at once, pixels of the input, its neighbourhood left out
    tile: int = 512

    def __init__(self, network: Compact) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.scale = network.scale
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build the network from the card's `[config]` and fill it from a weights file."""
        network = build(Compact, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network)

    def _restore(self, image: Image) -> Image:
        height, width = image.shape[2:]
        rows = []
        for top, bottom in _spans(height, self.tile):
            row = [self._tile(image, top, bottom, *span) for span in _spans(width, self.tile)]
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)

    def _tile(self, image: Image, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Restore one tile, told what lies around it."""
        reach, scale = self.network.reach, self.scale
        above, before = max(top - reach, 0), max(left - reach, 0)
        made = self.network(image[..., above : bottom + reach, before : right + reach])
        down, across = (top - above) * scale, (left - before) * scale
        tall, wide = (bottom - top) * scale, (right - left) * scale
        return made[..., down : down + tall, across : across + wide]


def _spans(length: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, length)) for start in range(0, length, size))


class UNetRestorer(Restorer):
    """A U-Net that learned one protector's perturbations."""

    def __init__(self, network: PerturbationUNet) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build the network from the card's `[config]` and fill it from a weights file."""
        network = build(PerturbationUNet, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network)

    def _restore(self, image: Image) -> Image:
        height, width = image.shape[2:]
        bottom, right = (-side % self.network.multiple for side in (height, width))
        padded = functional.pad(image, (0, right, 0, bottom), mode="replicate")
        return self.network(padded)[..., :height, :width]
