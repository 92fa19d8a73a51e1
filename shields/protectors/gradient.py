"""FGSM, I-FGSM and PGD on the objective of another protector, chosen by name.

Source:
    Explaining and Harnessing Adversarial Examples (Goodfellow, Shlens, Szegedy, 2015),
    https://arxiv.org/abs/1412.6572: FGSM.
    Adversarial Examples in the Physical World (Kurakin, Goodfellow, Bengio, 2017),
    https://arxiv.org/abs/1607.02533: I-FGSM.
    Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., 2018),
    https://arxiv.org/abs/1706.06083: PGD.

Differs:
    The papers attack classifiers; here the objective is that of a protector of this package, with
    that protector's own settings apart from the walk.
    A distance to the clean output has gradient 0 at the photo, where FGSM and I-FGSM start: the
    loop then takes one random nudge of half the budget before it looks at the gradient.
    One step of FGSM goes as far as the budget lets it, whatever the budget.
    FaceLock's objective runs without its schedule, whose first steps one step would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.base import Autoencoder, Recognizer
from shields.pgd import Start
from shields.protectors.base import IterativeConfig, IterativeProtector, ProtectorConfig
from shields.types import Image, Mask, Objective

if TYPE_CHECKING:
    from shields.models.diffusion import LatentDiffusion

__all__ = ["Fgsm", "FgsmConfig", "Ifgsm", "IfgsmConfig", "Pgd", "PgdProtectorConfig"]

ObjectiveName = Literal[
    "encoder", "reconstruction", "zero-latent", "identity", "round-trip", "facelock", "diffusion"
]
#: objective -> the protector whose objective it is
_OWNERS: Mapping[str, str] = {
    "encoder": "encoder",
    "reconstruction": "vae",
    "zero-latent": "photoguard",
    "identity": "cvl",
    "round-trip": "cvl-d",
    "facelock": "facelock",
    "diffusion": "advdm",
}


def _owner(config: ProtectorConfig) -> tuple[type[IterativeProtector], IterativeConfig]:
    """The protector whose objective is climbed, and its settings."""
    from shields.protectors import PROTECTORS

    name = config.objective if isinstance(config, _GradientConfig) else "encoder"
    owner = PROTECTORS[_OWNERS[name]]
    if not issubclass(owner, IterativeProtector):
        raise ConfigError(f"{_OWNERS[name]!r} has no objective to climb")
    steps = config.steps if isinstance(config, _GradientConfig) else 1
    return owner, owner.Config(steps=steps)


@dataclass(frozen=True, kw_only=True)
class _GradientConfig(IterativeConfig):
    #: which objective to climb: distance of latents, grey reconstruction, zero latent, face of the
    #: photo, face after the autoencoder, FaceLock's sum, or a denoiser's loss
    objective: ObjectiveName = "encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in get_args(ObjectiveName):
            names = ", ".join(get_args(ObjectiveName))
            raise ConfigError(f"`objective` must be one of {names}, got {self.objective!r}")

    @classmethod
    def ars(cls) -> Self:
        """As the ARS paper compares itself with it: 0.1 in [-1, 1], 12.75 levels."""
        return cls(levels=12.75)

    @classmethod
    def idguard(cls) -> Self:
        """As the ID-Guard paper compares itself with it: 0.05 in [-1, 1], 6.375 levels."""
        return cls(levels=6.375)


@dataclass(frozen=True, kw_only=True)
class FgsmConfig(_GradientConfig):
    """One step of the sign of the gradient."""

    #: one look at the gradient
    steps: int = 1
    #: more than any budget: the projection makes it the budget
    step: float = 255.0
    #: at the photo
    start: Start = "zero"

    @classmethod
    def paper(cls) -> Self:
        """The paper's example on photos: 0.007 of the range, 1.785 levels."""
        return cls(levels=1.785)


@dataclass(frozen=True, kw_only=True)
class IfgsmConfig(_GradientConfig):
    """Steps of the sign of the gradient from the photo on."""

    #: number of updates
    steps: int = 10
    #: length of one update, in levels
    step: float = 1.275
    #: at the photo
    start: Start = "zero"

    @classmethod
    def paper(cls) -> Self:
        """Steps of one level, min(levels + 4, 1.25 levels) of them: 10 at 8 levels."""
        return cls(levels=8, step=1.0, steps=10)


@dataclass(frozen=True, kw_only=True)
class PgdProtectorConfig(_GradientConfig):
    """Steps of the sign of the gradient from a random point of the budget on."""

    #: number of updates
    steps: int = 40

    @classmethod
    def idguard(cls) -> Self:
        """As the ID-Guard paper compares itself with it: 6.375 levels, 10 steps of 1.275."""
        return cls(levels=6.375, step=1.275, steps=10)

    @classmethod
    def paper(cls) -> Self:
        """The paper's training attack on small photos: 8 levels, 7 steps of 2."""
        return cls(levels=8, step=2.0, steps=7)


class _Gradient(IterativeProtector):
    """Another protector's objective under a walk of its own."""

    Config: ClassVar[type[_GradientConfig]] = _GradientConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {
        "autoencoder": "portrait-ae",
        "recognizer": "face-embedder",
        "diffusion": "stable-diffusion-1-5",
    }
    config: _GradientConfig

    def __init__(
        self,
        config: _GradientConfig | None = None,
        *,
        autoencoder: Autoencoder | None = None,
        recognizer: Recognizer | None = None,
        diffusion: LatentDiffusion | None = None,
    ) -> None:
        super().__init__(config)
        given = {"autoencoder": autoencoder, "recognizer": recognizer, "diffusion": diffusion}
        self._hold(**given)
        owner, settings = _owner(self.config)
        self._owner = owner(settings, **{role: given[role] for role in owner.roles(settings)})

    @classmethod
    def roles(cls, config: ProtectorConfig) -> Mapping[str, str]:
        """The networks that the objective's owner runs."""
        owner, settings = _owner(config)
        return owner.roles(settings)

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """The owner's objective."""
        return self._owner.objective(image, mask, landmarks=landmarks, rng=rng)


class Fgsm(_Gradient):
    """One step of the sign of an objective's gradient, as far as the budget goes."""

    Config = FgsmConfig
    paper = "https://arxiv.org/abs/1412.6572"


class Ifgsm(_Gradient):
    """Several steps of the sign of an objective's gradient, from the photo on."""

    Config = IfgsmConfig
    paper = "https://arxiv.org/abs/1607.02533"


class Pgd(_Gradient):
    """Several steps of the sign of an objective's gradient, from a random point on."""

    Config = PgdProtectorConfig
    paper = "https://arxiv.org/abs/1706.06083"
