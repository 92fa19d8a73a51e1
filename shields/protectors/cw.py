"""CW-L2 on an autoencoder's encoder: trade the size of the change against the latent's shift.

Source:
    Towards Evaluating the Robustness of Neural Networks (Carlini, Wagner, 2017),
    https://arxiv.org/abs/1608.04644, in the form of Algorithm 4 of Edit Away and My Face Will not
    Stay (Wang et al., 2025), https://arxiv.org/abs/2411.16832; code
    https://github.com/taco-group/FaceLock.

    Minimise ||x' - x||^2 - c ||E(x') - E(x)||^2 over w with x' = (tanh w + 1) / 2, then clip.

Differs:
    Ours starts at the photo (w = atanh(2x - 1), a hair inside) plus uniform noise within the
    budget, as both terms have gradient zero at the photo itself and the first step of Adam would
    follow rounding errors; paper and code start at w = 0, mid grey, and spend most of their steps
    on drawing the photo anew.
    Ours stays inside the budget on the way and keeps the best iterate of each photo; paper and code
    clip at the end, which undoes the more the longer they walk.
    The paper descends plainly with step 0.003 and names no c; the code uses Adam with 0.03 and
    c = 0.03, and so does the preset `paper`, on the paper's formula.
    `faithful` is the code: an image in [0, 1] goes to a network that wants [-1, 1], and the latent
    term is a sum of lengths along the last axis only.
    The code's batch script also halves the contrast of the result; that is not reproduced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.base import Autoencoder
from shields.pgd import Keep, Space, Start, Update
from shields.protectors.base import IterativeConfig, IterativeProtector
from shields.types import Image, Mask, Objective, Step

__all__ = ["Cw", "CwConfig"]


@dataclass(frozen=True, kw_only=True)
class CwConfig(IterativeConfig):
    """CW-L2; the budget is applied to the result."""

    #: Adam's learning rate, in units of w
    step: float = 0.03
    #: where to begin: about the photo ("uniform"), at the photo or at mid grey
    start: Start = "uniform"
    #: Adam, as the code has it
    update: Update = "adam"
    #: w with image = (tanh w + 1) / 2
    space: Space = "tanh"
    #: the best iterate of each photo, or the last
    keep: Keep = "best"
    #: weight c of the latent's shift against the squared length of the change (image units)
    weight: float = 1.0
    #: do as the official code does, with its wrong range and its sum of lengths
    as_coded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ConfigError(f"`weight` must be above 0, got {self.weight}")

    def hardened(self) -> Self:
        """The same under transforms (`--robust`); the best of unlike draws is but the luckiest."""
        return dataclasses.replace(super().hardened(), keep="last")

    @classmethod
    def paper(cls) -> Self:
        """Algorithm 4 with the constants of the code; 0.02 in [0, 1] is 5.1 levels."""
        return cls(levels=5.1, steps=100, start="grey", keep="last", weight=0.03)

    @classmethod
    def faithful(cls) -> Self:
        """What the official code computes, flaws included."""
        return cls(levels=5.1, steps=100, start="grey", keep="last", weight=0.03, as_coded=True)


class Cw(IterativeProtector):
    """Shift the latent as far as a small change can, with a penalty instead of a bound."""

    Config = CwConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"autoencoder": "portrait-ae"}
    paper = "https://arxiv.org/abs/1608.04644"
    config: CwConfig
    autoencoder: Autoencoder

    def __init__(
        self, config: CwConfig | None = None, *, autoencoder: Autoencoder | None = None
    ) -> None:
        super().__init__(config)
        self._hold(autoencoder=autoencoder)

    def transform(self) -> None:
        """None: `--robust` transforms what the encoder sees; the penalty must not see it."""
        return

    def _latent(self, image: Image) -> Tensor:
        # A network that maps [0, 1] to [-1, 1] itself sees [0, 1] when it is given (v + 1) / 2.
        return self.autoencoder.encode((image + 1) / 2 if self.config.as_coded else image).float()

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Shift of the latent, weighted, less the squared length of the change."""
        from shields.transforms import Identity

        handle = self.handled() if self.config.robust else Identity()
        with torch.no_grad():
            clean = self._latent(image)

        def value(view: Image, step: Step) -> Tensor:
            change = (view - image).float().square().flatten(1).sum(dim=1)
            shift = (self._latent(handle(view, step.rng)) - clean).square()
            if self.config.as_coded:
                # The offset keeps the gradient of a length finite where a row has not moved.
                latent = (shift.sum(dim=-1) + 1e-12).sqrt().flatten(1).sum(dim=1)
            else:
                latent = shift.flatten(1).sum(dim=1)
            return self.config.weight * latent - change

        return value
