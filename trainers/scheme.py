"""How one kind of manipulator is trained: its two networks, and what each of them minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Scheme", "classification", "resized"]


@dataclass(frozen=True, kw_only=True)
class Scheme(ABC):
    """Generator against discriminator; images in [-1, 1], labels (B, N) of zeros and ones.

    Losses are smaller-is-better terms by name, weighted already; their sum is minimised and each is
    logged. Whatever is random is drawn from `rng`, a CPU generator.
    """

    #: names of the labels in the pack, in the order of the label vector
    attributes: tuple[str, ...] = ("Smiling",)
    #: side of the square that the networks see, pixels, divisible by 4
    size: int = 80
    #: generator's channels at full resolution
    width: int = 16

    def target(self, labels: Tensor) -> Tensor:
        """Labels to ask for: the other value where there is one attribute, else somebody else's."""
        return 1 - labels if labels.shape[1] == 1 else labels.roll(1, 0)

    @abstractmethod
    def generator(self) -> nn.Module:
        """Build the generator."""

    @abstractmethod
    def discriminator(self) -> nn.Module:
        """Build the discriminator."""

    @abstractmethod
    def forge(self, generator: nn.Module, face: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Turn faces with these labels into ones with the target labels: (B, 3, S, S)."""

    @abstractmethod
    def generator_losses(
        self, generator: nn.Module, discriminator: nn.Module, face: Tensor, labels: Tensor,
        target: Tensor, rng: torch.Generator,
    ) -> tuple[dict[str, Tensor], Any]:  # fmt: skip
        """Terms, and the forgeries in whatever form `discriminator_losses` wants them, detached."""

    @abstractmethod
    def discriminator_losses(
        self, discriminator: nn.Module, face: Tensor, forged: Any, labels: Tensor,  # noqa: ANN401
        rng: torch.Generator,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Terms on photos and on the same step's forgeries."""

    @abstractmethod
    def config(self) -> dict[str, object]:
        """What the card's `[config]` says, so that the exported network can be built again."""


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of attribute logits (B, N) against labels (B, N)."""
    return functional.binary_cross_entropy_with_logits(logits.float(), labels.float())


def resized(image: Tensor, side: int) -> Tensor:
    """Bring to a square of a side, bilinear, antialiased."""
    return functional.interpolate(image, size=(side, side), mode="bilinear", antialias=True)
