"""Classifiers of facial attributes: they judge whether an edit shows."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from shields.models.base import Frozen, unit_range_to_signed
from shields.models.manipulation import resized
from shields.models.networks import ConvBlock, NormResidual
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["AttributeClassifier", "AttributeClassifierModel"]


class AttributeClassifier(nn.Module):
    """Plain convolutions: (B, 3, S, S) in [-1, 1] -> logits (B, N).

    Args:
        attributes: Names of the attributes, N.
        size: S, pixels.
        widths: Channels of the stages, each of half the resolution of the one before.
    """

    def __init__(
        self, attributes: tuple[str, ...], size: int = 80,
        widths: tuple[int, ...] = (24, 48, 96, 128),
    ) -> None:  # fmt: skip
        super().__init__()
        self.attributes, self.size = tuple(attributes), size
        layers: list[nn.Module] = []
        inputs = 3
        for width in widths:
            layers += [ConvBlock(inputs, width, 3, stride=2, padding=1), NormResidual(width)]
            inputs = width
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, len(self.attributes))

    def forward(self, face: Tensor) -> Tensor:
        """Logits of every attribute."""
        return self.head(self.stages(face).mean(dim=(2, 3)))


class AttributeClassifierModel(Frozen):
    """Says how likely each attribute is; takes the square region around a face."""

    HOT = ("forward",)

    def __init__(self, network: AttributeClassifier) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.attributes = network.attributes
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build the network from the card's `[config]` and fill it from a weights file."""
        network = build(AttributeClassifier, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network)

    def forward(self, image: Image) -> Tensor:
        """Probabilities (B, N) of the attributes in (B, 3, H, W), [0, 1]."""
        small = resized(image, (self.network.size, self.network.size))
        return self.network(unit_range_to_signed(small)).sigmoid()
