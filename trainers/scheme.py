"""How one kind of manipulator is trained: its two networks, and what each of them minimises."""

from __future__ import annotations

import functools
import typing
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import ConfigError
from shields.models import load, manipulation
from shields.models.classifiers import AttributeClassifierModel
from shields.weights import WeightStore

__all__ = ["Scheme", "classification", "resized", "seen_attributes"]


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

    def __post_init__(self) -> None:
        if self.size < 4 or self.size % 4:
            raise ConfigError(f"`size` must be a multiple of 4 pixels, got {self.size}")
        for name, hint in typing.get_type_hints(type(self)).items():
            choices = typing.get_args(hint)
            if typing.get_origin(hint) is Literal and getattr(self, name) not in choices:
                raise ConfigError(
                    f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )

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


def seen_attributes(teacher: str, attributes: Sequence[str], face: Tensor) -> Tensor:
    """What a classifier that was trained before sees, at the size that it was trained at.

    Args:
        teacher: Its card.
        attributes: Which of its attributes are asked for.
        face: (B, 3, S, S) in [-1, 1], any S.

    Returns:
        Logits (B, N) of these attributes, in this order.

    Raises:
        ConfigError: It does not know one of them.
    """
    network = _teacher(teacher, str(face.device)).network
    absent = [name for name in attributes if name not in network.attributes]
    if absent:
        raise ConfigError(
            f"the teacher {teacher!r} does not know {', '.join(absent)} but "
            f"{', '.join(network.attributes)}; name another one, or none: teacher=''"
        )
    columns = [network.attributes.index(name) for name in attributes]
    logits: Tensor = network(resized(face.float(), network.size))
    return logits[:, columns]


@functools.cache
def _teacher(name: str, device: str) -> AttributeClassifierModel:
    found = load("classifier", name, store=WeightStore(), device=torch.device(device))
    assert isinstance(found, AttributeClassifierModel), "the registry of classifiers has no other"
    return found


def resized(image: Tensor, side: int) -> Tensor:
    """Bring to a square of a side, bilinear, antialiased."""
    return manipulation.resized(image, (side, side))
