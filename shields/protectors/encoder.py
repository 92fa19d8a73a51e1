"""Two plain attacks on an autoencoder: push the latent away, or pull the reconstruction to grey.

Source:
    Edit Away and My Face Will not Stay: Personal Biometric Defense against Malicious Generative
    Editing (Wang et al., 2025), https://arxiv.org/abs/2411.16832, Algorithms 2 (untargeted encoder
    attack) and 3 (VAE attack); code https://github.com/taco-group/FaceLock.

    Encoder maximises mean (E(x') - E(x))^2; Vae minimises mean (Dec(E(x')) - target)^2.

Differs:
    The start is uniform in the budget (code), not N(0, 1) (paper).
    Means instead of sums (paper) and of an unsquared length (code, Vae): with one term and sign
    steps the direction is the same, and the value does not depend on the photo's size.
    The reconstruction is not clamped, so that no gradient is lost; the target is mid grey as in
    the code, and can be set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.base import Autoencoder
from shields.protectors.base import IterativeConfig, IterativeProtector
from shields.types import Image, Mask, Objective, Step

__all__ = ["Encoder", "EncoderConfig", "Vae", "VaeConfig", "mean_square"]


def mean_square(difference: Tensor) -> Tensor:
    """Mean of the squares of each sample, (B,), in float32."""
    return difference.float().square().flatten(1).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(IterativeConfig):
    """Untargeted encoder attack."""

    @classmethod
    def paper(cls) -> Self:
        """Table A1 (2.55 levels) with the decay of the code."""
        return cls(levels=2.55, step=0.3825, steps=100, decay="linear")

    @classmethod
    def code(cls) -> Self:
        """The defaults of the official command line (3.825 levels)."""
        return cls(levels=3.825, step=1.275, steps=100, decay="linear")


@dataclass(frozen=True, kw_only=True)
class VaeConfig(EncoderConfig):
    """VAE attack."""

    #: brightness of the uniform image that the reconstruction is pulled to, [0, 1]
    target: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target <= 1:
            raise ConfigError(f"`target` must lie in [0, 1], got {self.target}")


class Encoder(IterativeProtector):
    """Push the latent of the photo away from where it was."""

    Config = EncoderConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"autoencoder": "portrait-ae"}
    paper = "https://arxiv.org/abs/2411.16832"
    config: EncoderConfig
    autoencoder: Autoencoder

    def __init__(
        self, config: EncoderConfig | None = None, *, autoencoder: Autoencoder | None = None
    ) -> None:
        super().__init__(config)
        self._hold(autoencoder=autoencoder)

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Mean squared distance to the clean latent."""
        with torch.no_grad():
            clean = self.autoencoder.encode(image).float()

        def value(view: Image, step: Step) -> Tensor:
            return mean_square(self.autoencoder.encode(view) - clean)

        return value


class Vae(Encoder):
    """Pull what the autoencoder makes of the photo towards a uniform grey."""

    Config = VaeConfig
    config: VaeConfig

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Negative mean squared distance of the reconstruction to the target."""

        def value(view: Image, step: Step) -> Tensor:
            height, width = view.shape[2:]
            decoded = self.autoencoder.decode(self.autoencoder.encode(view))
            return -mean_square(decoded[..., :height, :width] - self.config.target)

        return value
