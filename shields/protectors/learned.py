"""Protectors that are trained networks: one forward pass, no manipulator at hand.

Source:
    Adversarial Robust Safeguard for Evading Deep Facial Manipulation (Guan et al., 2024),
    https://ojs.aaai.org/index.php/AAAI/article/view/27762: ARS. Trained by `trainers.ars`.

Differs:
    The paper trains a network for each budget, 0.1 or 0.3 in [-1, 1], that is 12.75 or 38.25
    levels; here one network serves any budget: it is told it, or its result is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.generators import Generator
from shields.protectors.base import Protector, ProtectorConfig
from shields.types import Image, Mask, Perturbation, Progress

__all__ = ["Ars", "ArsConfig", "LearnedConfig", "LearnedProtector"]


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(ProtectorConfig):
    """Budget of a trained network; all else was settled when it was trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "linf":
            raise ConfigError(
                f'a trained network keeps a largest change per pixel: `norm` must be "linf", '
                f"got {self.norm!r}"
            )


class LearnedProtector(Protector):
    """A protector that is a trained network.

    What it was trained to disrupt is not loaded with it, so it has no objective to report.
    """

    generator: Generator

    def __init__(
        self, config: LearnedConfig | None = None, *, generator: Generator | None = None
    ) -> None:
        super().__init__(config)
        self._hold(generator=generator)

    @torch.no_grad()
    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        """Run the network once."""
        return self.generator.perturb(image, levels=self.config.levels, rng=rng)


@dataclass(frozen=True, kw_only=True)
class ArsConfig(LearnedConfig):
    """Adversarial Robust Safeguard."""

    #: budget, in levels (1/255 of the range)
    levels: float = 12.75

    @classmethod
    def paper(cls) -> Self:
        """As in the paper's first tables: 0.1 in [-1, 1]."""
        return cls(levels=12.75)

    @classmethod
    def visible(cls) -> Self:
        """As in the paper's tables 3 and 6: 0.3 in [-1, 1], which everybody sees."""
        return cls(levels=38.25)


class Ars(LearnedProtector):
    """One forward pass of a network that was trained against manipulators and information loss."""

    Config: ClassVar[type[ArsConfig]] = ArsConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"generator": "ars-latent"}
    paper = "https://ojs.aaai.org/index.php/AAAI/article/view/27762"
