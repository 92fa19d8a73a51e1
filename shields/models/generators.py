"""Generators: trained networks that make a perturbation in one forward pass, behind a contract.

Callers see images in [0, 1] and a budget in levels; native ranges, legal sizes and how a network
was told its budget are hidden here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch.nn import functional

from shields.models.ars_network import ArsGenerator
from shields.models.base import Frozen
from shields.types import Image, Perturbation
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["ArsModel", "Generator"]


class Generator(Frozen, ABC):
    """A trained network that makes a perturbation in one forward pass."""

    #: sides of what the network sees are multiples of this, pixels
    multiple: int = 32
    #: budget that it was trained at, levels; the largest where there were several
    levels: float
    HOT: ClassVar[tuple[str, ...]] = ("_generate",)

    @abstractmethod
    def _generate(self, image: Image, levels: float, rng: torch.Generator) -> Perturbation:
        """(B, 3, H, W), [0, 1], sides legal -> (B, 3, H, W), image units, made for `levels`."""

    def perturb(self, image: Image, *, levels: float, rng: torch.Generator) -> Perturbation:
        """Make a perturbation.

        Args:
            image: (B, 3, H, W), [0, 1], any size.
            levels: How far a pixel may move. A network that was trained at one budget is scaled to
                any other, above it as below; what it was measured at is `levels` of the object.
            rng: A CPU generator, for networks that draw.

        Returns:
            (B, 3, H, W), nowhere further from zero than `levels`; it may leave [0, 1] once added.
        """
        height, width = image.shape[2:]
        bottom, right = (-side % self.multiple for side in (height, width))
        if bottom or right:
            image = functional.pad(image, (0, right, 0, bottom), mode="replicate")
        made = self._generate(image, levels, rng).float()[..., :height, :width]
        return made.clamp(-levels / 255, levels / 255)


class ArsModel(Generator):
    """The two-way generator of ARS, or only its basic way; draws nothing.

    Source:
        Adversarial Robust Safeguard for Evading Deep Facial Manipulation (Guan et al., 2024),
        https://ojs.aaai.org/index.php/AAAI/article/view/27762.
    """

    def __init__(self, network: ArsGenerator) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.levels = network.levels
        self.multiple = max(Generator.multiple, network.multiple)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build the network from the card's `[config]` and fill it from a weights file."""
        network = build(ArsGenerator, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network)

    def _generate(self, image: Image, levels: float, rng: torch.Generator) -> Perturbation:
        return self.network(image, levels)[1]
