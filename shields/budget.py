"""How far a pixel may move: the ball, the mask and the valid range, folded into one projection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.types import Image, Mask, Perturbation

__all__ = ["Budget", "Norm", "per_sample_norm"]

Norm = Literal["linf", "l2", "none"]


def per_sample_norm(tensor: Tensor) -> Tensor:
    """Euclidean length of every sample, shaped (B, 1, 1, 1)."""
    length: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1)
    return length.view(-1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far an image may move, in levels (1/255 of the range).

    Example:
        >>> Budget(levels=8).epsilon
        0.03137254901960784
    """

    #: largest change of a value ("linf"), or Euclidean length of the whole change ("l2")
    levels: float = 8.0
    #: "none" bounds by the valid range and the mask alone (methods that only penalise)
    norm: Norm = "linf"

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ConfigError(f"`norm` must be one of {get_args(Norm)}, got {self.norm!r}")
        if not (math.isfinite(self.levels) and self.levels >= 0):
            raise ConfigError(f"`levels` must be 0 or more, got {self.levels}")

    @property
    def epsilon(self) -> float:
        """The radius in image units."""
        return self.levels / 255

    @property
    def whole_levels(self) -> int:
        """Largest change of a saved 8-bit value that obeys the budget."""
        if self.norm == "none":
            return 255
        # 6.375 / 255 * 255 may come out a hair under a whole number: forgive rounding, no more.
        return min(255, math.floor(self.levels + 1e-9))

    def bounds(self, image: Image, mask: Mask) -> tuple[Tensor, Tensor]:
        """Least and greatest perturbation, (B, 3, H, W) each: ball, mask and valid range at once.

        For "l2" the box holds the mask and the valid range only; `project` adds the ball.
        """
        reach = (self.epsilon if self.norm == "linf" else 1.0) * mask
        return torch.maximum(-reach, -image), torch.minimum(reach, 1 - image)

    def project(self, perturbation: Perturbation, low: Tensor, high: Tensor) -> Perturbation:
        """Bring a perturbation back: one clamp, for "l2" after shrinking each sample to the ball.

        Clamping last only shortens, because 0 lies in every box, so both bounds hold.
        """
        if self.norm == "l2":
            length = per_sample_norm(perturbation)
            scale = (self.epsilon / length.clamp_min(1e-12)).clamp_max(1)
            perturbation = perturbation * scale
        return torch.minimum(torch.maximum(perturbation, low), high)
