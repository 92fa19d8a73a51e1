"""The learned methods that ARS and ID-Guard are compared with; the user trains their networks.

Source:
    TAFIM: Targeted Adversarial Attacks against Facial Image Manipulations (Aneja, Markhasin,
    Niessner, 2022), https://arxiv.org/abs/2112.09151.
    PG: Initiative Defense against Facial Manipulation (Huang et al., 2021),
    https://arxiv.org/abs/2112.10098.
    IAP: Information-containing Adversarial Perturbation for Combating Facial Manipulation Systems
    (Zhu et al., 2023), https://arxiv.org/abs/2303.11625.
    CMUA-Watermark: A Cross-Model Universal Adversarial Watermark for Combating Deepfakes (Huang et
    al., 2022), https://arxiv.org/abs/2105.10872.
    Trained by `trainers.tafim`, `trainers.pg`, `trainers.iap` and `trainers.cmua`.

Differs:
    TAFIM keeps its perturbation small by a penalty alone; here it is cut off at the budget, as the
    paper of ARS does where it compares with it.
    There is no code of IAP, and its message is left out: hence "iap-like".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from shields.errors import ConfigError
from shields.models.generators import Generator
from shields.protectors.learned import LearnedConfig, LearnedProtector

__all__ = ["BaselineConfig", "Cmua", "IapLike", "Pg", "Tafim", "TafimConfig"]


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(LearnedConfig):
    """PG, IAP-like and the CMUA watermark."""

    #: budget, in levels (1/255 of the range)
    levels: float = 6.375

    @classmethod
    def paper(cls) -> Self:
        """0.05 in [-1, 1]."""
        return cls(levels=6.375)


@dataclass(frozen=True, kw_only=True)
class TafimConfig(LearnedConfig):
    """TAFIM."""

    #: budget, in levels (1/255 of the range), at which the perturbation is cut off
    levels: float = 12.75

    @classmethod
    def paper(cls) -> Self:
        """No bound: whatever the penalty of the training left."""
        return cls(levels=255.0)

    @classmethod
    def ars(cls) -> Self:
        """As the paper of ARS compares with it: 0.1 in [-1, 1]."""
        return cls(levels=12.75)


class _Baseline(LearnedProtector):
    """A trained network that does not come with the package."""

    #: under which it is trained
    TRAINER: ClassVar[str]

    def __init__(
        self, config: LearnedConfig | None = None, *, generator: Generator | None = None
    ) -> None:
        if generator is None:
            raise ConfigError(
                f"no trained generator of {self.TRAINER} comes with the package; name the card of "
                f"one with --generator (generator=…); `shields train {self.TRAINER} fit --config "
                f"trainers/configs/{self.TRAINER}-smile.yaml` trains one, "
                f"`shields train {self.TRAINER} export …` writes its card"
            )
        super().__init__(config, generator=generator)


class Tafim(_Baseline):
    """One forward pass of a network that pushes forgeries to white, kept small by a penalty."""

    Config: ClassVar[type[TafimConfig]] = TafimConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"generator": "tafim-smile"}
    TRAINER = "tafim"
    paper = "https://arxiv.org/abs/2112.09151"


class Pg(_Baseline):
    """One forward pass of a network that was trained against a surrogate in training itself."""

    Config: ClassVar[type[BaselineConfig]] = BaselineConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"generator": "pg-smile"}
    TRAINER = "pg"
    paper = "https://arxiv.org/abs/2112.10098"


class IapLike(_Baseline):
    """One forward pass of a network that takes the likeness of deep features out of forgeries."""

    Config: ClassVar[type[BaselineConfig]] = BaselineConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"generator": "iap-like-smile"}
    TRAINER = "iap-like"
    paper = "https://arxiv.org/abs/2303.11625"


class Cmua(_Baseline):
    """Add one watermark to every photo, against several manipulators; no network runs."""

    Config: ClassVar[type[BaselineConfig]] = BaselineConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"generator": "cmua-smile"}
    TRAINER = "cmua"
    paper = "https://arxiv.org/abs/2105.10872"
