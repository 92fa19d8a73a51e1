"""ID-Guard: its generator, and its P-Pert, one stored perturbation for every photo.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, section III-D. Trained by
    `trainers.idguard`.

Differs:
    P-Pert is resized bilinearly to the photo; both are scaled where the budget is not the trained
    one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.generators import Generator
from shields.models.idguard import IdGuardModel
from shields.protectors.learned import LearnedConfig, LearnedProtector
from shields.types import Image, Mask, Perturbation, Progress

__all__ = ["IdGuard", "IdGuardConfig", "IdGuardUniversal"]


@dataclass(frozen=True, kw_only=True)
class IdGuardConfig(LearnedConfig):
    """ID-Guard."""

    #: budget, in levels (1/255 of the range)
    levels: float = 6.375

    @classmethod
    def paper(cls) -> Self:
        """0.05 in [-1, 1]."""
        return cls(levels=6.375)


class IdGuard(LearnedProtector):
    """One forward pass of a network that was trained against several manipulators."""

    Config: ClassVar[type[IdGuardConfig]] = IdGuardConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"generator": "idguard-faces"}
    paper = "https://arxiv.org/abs/2409.13349"
    generator: IdGuardModel

    def __init__(
        self, config: LearnedConfig | None = None, *, generator: Generator | None = None
    ) -> None:
        if generator is not None and not isinstance(generator, IdGuardModel):
            raise ConfigError(f"ID-Guard needs its own generator, {generator.name!r} is another")
        super().__init__(config, generator=generator)


class IdGuardUniversal(IdGuard):
    """Add what was trained along with ID-Guard's generator; no network runs."""

    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        """Resize and repeat the stored perturbation."""
        size = (image.shape[2], image.shape[3])
        found = self.generator.universal_perturbation(size, levels=self.config.levels)
        return found.to(image).expand_as(image)
