"""Disrupting Deepfakes: move what a manipulator makes of the photo away from a clean forgery.

Source:
    Disrupting Deepfakes: Adversarial Attacks Against Conditional Image Translation Networks and
    Facial Manipulation Systems (Ruiz, Bargal, Sclaroff, 2020), https://arxiv.org/abs/2003.01279;
    code https://github.com/natanielruiz/disrupting-deepfakes.
    Disrupting Image-Translation-Based DeepFake Algorithms with Adversarial Attacks (Yeh, Chen,
    Tsai, Wang, 2020): the names of the two aims, nullify and distort.

    Maximise mean (G(B(x'), c) - G(x, c))^2 over conditions c, B a blur or nothing, by FGSM (preset
    `fgsm`), I-FGSM (`ifgsm`) or PGD (`paper`). `classes` and `blur` say which c and B a step sees.

Differs:
    Each condition has a clean forgery of its own, computed once; in the code the joint variant
    compares all with the forgery of one.
    All nine blurs of the bank take their turn. In the code the counter runs ahead of the mean
    filters, so that the smallest of them never comes up.
    Blurs are of the image reflected at its border, so that none darkens a rim.
    Where conditions and blurs both take turns, the turns are staggered until all pairs were met.
    From the photo itself (`fgsm`, `ifgsm`) the gradient is 0; the loop nudges it first.
    The paper's constants are presets; the class's own settings are 8 levels and 40 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from shields.errors import ConfigError
from shields.models.manipulation import Condition, Manipulator
from shields.protectors.base import IterativeProtector
from shields.protectors.encoder import mean_square
from shields.protectors.manipulation import ManipulatorConfig, chosen_conditions, forgeries
from shields.transforms import GaussianBlur, Identity, Transform
from shields.types import Image, Mask, Objective, Step

__all__ = ["SPREAD", "Disrupting", "DisruptingConfig", "MeanBlur"]

Aim = Literal["distort", "nullify", "white"]
Classes = Literal["iterative", "joint"]
Blur = Literal["none", "fixed", "spread", "eot"]


@dataclass(frozen=True, kw_only=True)
class MeanBlur(Transform):
    """The mean of a square window over the reflected image."""

    #: side of the window, odd, pixels
    window: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.window) is not int or self.window < 1 or self.window % 2 == 0:
            raise ConfigError(f"`window` must be odd (pixels), got {self.window!r}")

    def apply(self, image: Image) -> Image:
        """Blur (B, 3, H, W)."""
        padded = functional.pad(image, (self.window // 2,) * 4, mode="reflect")
        return functional.avg_pool2d(padded, self.window, stride=1)


#: the spread-spectrum bank: five Gaussians of 11 pixels, then four mean filters
SPREAD: tuple[Transform, ...] = (
    *(GaussianBlur(sigma=sigma, window=11) for sigma in (1.0, 1.5, 2.0, 2.5, 3.0)),
    *(MeanBlur(window=window) for window in (3, 5, 7, 9)),
)
_BANKS: Mapping[str, tuple[Transform, ...]] = {
    "none": (Identity(),),
    "fixed": (GaussianBlur(sigma=1.5, window=11),),
    "spread": SPREAD,
    "eot": SPREAD,
}


@dataclass(frozen=True, kw_only=True)
class DisruptingConfig(ManipulatorConfig):
    """Disrupting Deepfakes."""

    #: number of updates
    steps: int = 40
    #: away from the clean forgery ("distort"), to the photo so that nothing happens ("nullify"), or
    #: to a white picture
    aim: Aim = "distort"
    #: one condition a step, by turns, or the mean over all of them in every step
    classes: Classes = "iterative"
    #: what the manipulator sees: the image, one known blur, one of nine a step, or all nine
    blur: Blur = "none"
    #: compute forgeries again in the backward pass: memory of one instead of `classes` x `blur`
    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("aim", Aim), ("classes", Classes), ("blur", Blur)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"`{name}` must be one of {', '.join(get_args(choices))}, "
                    f"got {getattr(self, name)!r}"
                )
        turns = self.classes == "iterative" or self.blur == "spread"
        if turns and (self.keep == "best" or self.patience):
            raise ConfigError(
                '`keep="best"` and `patience` compare the steps with each other, which needs steps '
                'that ask the same: `classes="joint"`, and a `blur` other than "spread"'
            )

    @classmethod
    def paper(cls) -> Self:
        """PGD as the paper runs it: 0.05 and 0.01 in [-1, 1], 10 steps."""
        return cls(levels=6.375, step=1.275, steps=10)

    @classmethod
    def fgsm(cls) -> Self:
        """One step as far as the paper's budget goes."""
        return cls(levels=6.375, step=255.0, steps=1, start="zero", classes="joint")

    @classmethod
    def ifgsm(cls) -> Self:
        """The paper's steps from the photo on."""
        return cls(levels=6.375, step=1.275, steps=10, start="zero")

    @classmethod
    def joint(cls) -> Self:
        """The paper's PGD, all conditions in every step."""
        return cls(levels=6.375, step=1.275, steps=10, classes="joint")

    @classmethod
    def spread(cls) -> Self:
        """The paper's PGD against unknown blurs, one of nine a step."""
        return cls(levels=6.375, step=1.275, steps=10, blur="spread")

    @classmethod
    def eot(cls) -> Self:
        """The paper's PGD against unknown blurs, all nine in every step."""
        return cls(levels=6.375, step=1.275, steps=10, blur="eot")

    @classmethod
    def ars(cls) -> Self:
        """As the ARS paper compares itself with it: 0.1 in [-1, 1], 12.75 levels."""
        return cls(levels=12.75, blur="spread")


class Disrupting(IterativeProtector):
    """Push the forgery of the protected photo away from that of the clean one."""

    Config: ClassVar[type[DisruptingConfig]] = DisruptingConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"manipulator": "stargan-smile"}
    paper = "https://arxiv.org/abs/2003.01279"
    config: DisruptingConfig
    manipulator: Manipulator

    def __init__(
        self, config: DisruptingConfig | None = None, *, manipulator: Manipulator | None = None
    ) -> None:
        super().__init__(config)
        self._hold(manipulator=manipulator)

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Mean over the step's conditions and blurs of the distance, in [-1, 1], from the goal."""
        terms = self._terms(image)
        bank = _BANKS[self.config.blur]

        def value(view: Image, step: Step) -> Tensor:
            conditions, blurs = range(len(terms)), range(len(bank))
            blur, condition = _turn(step.index, len(bank), len(terms))
            if self.config.classes == "iterative":
                conditions = range(condition, condition + 1)
            if self.config.blur != "eot":
                blurs = range(blur, blur + 1)
            views = [bank[index](view, step.rng) for index in blurs]
            gains = [self._run(terms[index], seen) for seen in views for index in conditions]
            return torch.stack(gains).mean(dim=0)

        return value

    def _run(self, term: Callable[[Image], Tensor], view: Image) -> Tensor:
        if self.config.checkpoint and torch.is_grad_enabled():
            gain: Tensor = checkpoint(term, view, use_reentrant=False)
            return gain
        return term(view)

    def _terms(self, image: Image) -> list[Callable[[Image], Tensor]]:
        """One objective a condition, (B, 3, H, W) -> (B,)."""
        conditions = chosen_conditions(self.manipulator, self.config.conditions)
        if self.config.aim == "distort":
            goals = forgeries(self.manipulator, image, conditions)
        elif self.config.aim == "nullify":
            goals = [image] * len(conditions)
        else:
            goals = [torch.ones_like(image)] * len(conditions)
        return [self._term(*pair) for pair in zip(conditions, goals, strict=True)]

    def _term(self, condition: Condition, goal: Image) -> Callable[[Image], Tensor]:
        sign = 1 if self.config.aim == "distort" else -1

        def gain(view: Image) -> Tensor:
            return sign * mean_square(2 * (self.manipulator(view, condition) - goal))

        return gain

    @torch.no_grad()
    def evaluate(
        self, clean: Image, protected: Image, mask: Mask, *, landmarks: Tensor | None = None
    ) -> Tensor:
        """Mean objective (B,) over all conditions, without a blur.

        A single step sees but one condition, so the last one is no measure of the whole. The paper
        counts a forgery as disrupted from a distance of 0.05 on.
        """
        return torch.stack([term(protected) for term in self._terms(clean)]).mean(dim=0)


def _turn(index: int, blurs: int, conditions: int) -> tuple[int, int]:
    """Whose turn it is: both change every step, and all pairs come up in blurs x conditions steps.

    Example:
        >>> [_turn(index, 2, 2) for index in range(4)]
        [(0, 0), (1, 1), (0, 1), (1, 0)]
    """
    stagger = index // math.lcm(blurs, conditions) % math.gcd(blurs, conditions)
    return index % blurs, (index + stagger) % conditions
