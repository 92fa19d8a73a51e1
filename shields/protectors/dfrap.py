"""DF-RAP: spoil what a manipulator makes of the photo after a platform has compressed it.

Source:
    DF-RAP: A Robust Adversarial Perturbation for Defending Against Deepfakes in Real-World Social
    Network Scenarios (Qu, Xi, Lu, Luo, Wang, Li, 2024),
    IEEE Transactions on Information Forensics and Security; code, from which the settings and the
    table come, https://github.com/ZOMIN28/DF_RAP.

With C the compression of a platform, c a condition and G the manipulator, the objective is

    mean (G(C(x'), c) - G(x, c))^2   in [-1, 1],

and C draws its JPEG quality from how often platforms were seen to use each (`PLATFORM_QUALITIES`).

Differs:
    The authors' C is ComGAN, a network trained on photos that went through platforms and back. Its
    weights are a pickled module under a licence for non-commercial use, so it is not shipped: by
    default its place is taken by the scaling of a photo (Lanczos, down and up again) and by the
    codec itself, whose forward pass is libjpeg and whose gradient is that of a soft one. ComGAN, or
    any other network that imitates compression, plugs in as `simulator`.
    The authors' attack is known to break when the photo is scaled; the scaling above is ours, and
    `paper` leaves it out. Quality 100 stands for "not compressed again", as in the code.
    Targets are StarGAN and SimSwap in the paper, any manipulator here; the mean is over all
    conditions asked for, where the code takes one. The paper's feed-forward generator, trained
    through C, is not here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from shields.codec import Jpeg, Resize, uniform
from shields.errors import ConfigError
from shields.models import imported
from shields.protectors.base import IterativeProtector
from shields.protectors.encoder import mean_square
from shields.protectors.manipulation import ManipulatorConfig, chosen_conditions, forgeries
from shields.types import Image, Mask, Objective, Step

if TYPE_CHECKING:
    from shields.models.manipulation import Manipulator

__all__ = ["PLATFORM_QUALITIES", "DfRap", "DfRapConfig", "load_simulator", "platform_quality"]

Compression = Literal["jpeg", "simulator", "both", "none"]
Gradient = Literal["soft", "straight"]

#: JPEG quality -> how often Facebook, Twitter, WeChat and Weibo used it on the uploads of DF-RAP's
#: authors (`data/qf.txt` of their repository, published 2024); 100 = left as it was
PLATFORM_QUALITIES: Mapping[int, float] = MappingProxyType(
    {
        71: 0.0132, 72: 0.0268, 75: 0.0127, 78: 0.0573, 79: 0.0156, 80: 0.2213, 84: 0.0107,
        85: 0.2193, 86: 0.0110, 88: 0.0107, 89: 0.0120, 90: 0.0120, 91: 0.0171, 92: 0.2272,
        100: 0.1331,
    }
)  # fmt: skip
_UNTOUCHED = 100
#: draws of the compression behind a reported value
_LOOKS = 8


def platform_quality(share: float) -> int:
    """The quality that lies at a share, [0, 1), of all uploads ordered by quality.

    Example:
        >>> platform_quality(0.0), platform_quality(0.2), platform_quality(0.99)
        (71, 80, 100)
    """
    qualities = list(PLATFORM_QUALITIES)
    ends = list(accumulate(PLATFORM_QUALITIES.values()))
    return qualities[min(bisect_right(ends, share * ends[-1]), len(ends) - 1)]


def load_simulator(address: str) -> nn.Module:
    """Import a network that imitates compression: (B, 3, H, W), [0, 1] -> the same.

    Args:
        address: `module:name` of an `nn.Module`, or of a class or function that builds one when
            called without arguments. It runs in the mode in which it comes; for one that takes
            [-1, 1] or a fixed size, return `shields.models.manipulation.wrap(network)`.

    Raises:
        ConfigError: Nothing of that name can be imported, or it is no network.
    """
    try:
        found = imported(address)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"`simulator` must be `module:name` of a network, {address!r} cannot be imported: "
            f"{error}"
        ) from error
    network = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"`simulator` {address!r} must be or build an nn.Module, got a {type(network).__name__}"
        )
    return network


@dataclass(frozen=True, kw_only=True)
class DfRapConfig(ManipulatorConfig):
    """DF-RAP; the class default is the setting at 8 levels, scaling included."""

    #: number of updates
    steps: int = 40
    #: draws of the compression that are averaged in a step
    draws: int = 2
    #: what stands between photo and manipulator: the codec, the simulator, that and then the
    #: codec, or nothing at all
    compression: Compression = "jpeg"
    #: gradient of the codec: that of a soft one, or as if it were not there
    gradient: Gradient = "soft"
    #: sides are scaled by a share drawn from here to 1, and back; 1 = not scaled
    least_scale: float = 0.5
    #: share of the forgery of the compressed photo; the rest is that of the photo before the codec
    balance: float = 1.0
    #: `module:name` of a network image -> image that imitates a platform, or of what builds one
    simulator: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("compression", Compression), ("gradient", Gradient)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ConfigError(f"`{name}` must be one of {get_args(choices)}, got {value!r}")
        if not 0 < self.least_scale <= 1:
            raise ConfigError(f"`least_scale` must lie in (0, 1], got {self.least_scale}")
        if not (math.isfinite(self.balance) and 0 <= self.balance <= 1):
            raise ConfigError(f"`balance` must lie in [0, 1], got {self.balance}")
        if self.simulator and not self.simulates:
            raise ConfigError(
                f"`simulator` is not used with compression={self.compression}; "
                "set compression=simulator or compression=both"
            )

    @property
    def simulates(self) -> bool:
        """Whether the simulator takes part."""
        return self.compression in ("simulator", "both")

    @property
    def codes(self) -> bool:
        """Whether the codec takes part."""
        return self.compression in ("jpeg", "both")

    @classmethod
    def paper(cls) -> Self:
        """The paper's walk: 0.05 and 0.01 in [-1, 1], 10 steps; the codec alone for ComGAN."""
        return cls(levels=6.375, step=1.275, steps=10, draws=1, least_scale=1.0)


class DfRap(IterativeProtector):
    """Spoil what a manipulator makes of the photo, also once a platform has compressed it."""

    Config: ClassVar[type[DfRapConfig]] = DfRapConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"manipulator": "stargan-smile"}
    paper = "https://github.com/ZOMIN28/DF_RAP"
    config: DfRapConfig
    manipulator: Manipulator
    simulator: nn.Module

    def __init__(
        self,
        config: DfRapConfig | None = None,
        *,
        manipulator: Manipulator | None = None,
        simulator: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self._hold(manipulator=manipulator)
        if not self.config.simulates:
            return
        if simulator is None and self.config.simulator:
            simulator = load_simulator(self.config.simulator)
        if simulator is None:
            raise ConfigError(
                f"compression={self.config.compression} needs a network that imitates it: set "
                "simulator=module:name, or pass simulator=…"
            )
        for parameter in self.manipulator.parameters():
            simulator = simulator.to(parameter.device)
            break
        self.simulator = simulator

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """How far the forgeries of the compressed photo are from those of the clean one."""
        conditions = chosen_conditions(self.manipulator, self.config.conditions)
        clean = forgeries(self.manipulator, image, conditions)

        def value(view: Image, step: Step) -> Tensor:
            shares = [(sent, share) for sent, share in self._send(view, step.rng) if share]
            gains = []
            for condition, goal in zip(conditions, clean, strict=True):
                parts = [share * self.manipulator(sent, condition) for sent, share in shares]
                gains.append(mean_square(2 * (torch.stack(parts).sum(dim=0) - goal)))
            return torch.stack(gains).mean(dim=0)

        return value

    @torch.no_grad()
    def evaluate(
        self, clean: Image, protected: Image, mask: Mask, *, landmarks: Tensor | None = None
    ) -> Tensor:
        """The objective (B,) of protected images, averaged over draws from a fixed seed."""
        rng = torch.Generator().manual_seed(0)
        objective = self.objective(clean, mask, landmarks=landmarks, rng=rng)
        step = Step(index=self.config.steps - 1, total=self.config.steps, rng=rng)
        looks = _LOOKS if self.config.codes or self.config.least_scale < 1 else 1
        return torch.stack([objective(protected, step) for _ in range(looks)]).mean(dim=0)

    def _send(self, view: Image, rng: torch.Generator) -> list[tuple[Image, float]]:
        """Put a photo through a platform: what comes out, and its share of the forgery."""
        config = self.config
        if config.least_scale < 1:
            view = Resize().apply(view, scale=uniform((config.least_scale, 1.0), rng))
        if config.simulates:
            view = self._simulated(view)
        quality = platform_quality(uniform((0, 1), rng)) if config.codes else _UNTOUCHED
        if quality == _UNTOUCHED:
            return [(view, 1.0)]
        coded = Jpeg(gradient=config.gradient).apply(view, quality=quality)
        return [(coded, config.balance), (view, 1 - config.balance)]

    def _simulated(self, view: Image) -> Image:
        coded = self.simulator(view)
        if not isinstance(coded, Tensor) or coded.shape != view.shape:
            got = tuple(coded.shape) if isinstance(coded, Tensor) else type(coded).__name__
            raise ConfigError(
                f"the simulator must return an image of the size it is given, "
                f"{tuple(view.shape)}, got {got}"
            )
        return coded.clamp(0, 1)
