"""The only projected-gradient loop: every iterative protector fills its holes.

Source:
    Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., 2018),
    https://arxiv.org/abs/1706.06083: sign steps, random start, projection.
    Boosting Adversarial Attacks with Momentum (Dong et al., 2018),
    https://arxiv.org/abs/1710.06081: `momentum`.
    Evading Defenses to Transferable Adversarial Examples by Translation-Invariant Attacks
    (Dong et al., 2019), https://arxiv.org/abs/1904.02884: `smooth`.
    Synthesizing Robust Adversarial Examples (Athalye et al., 2018),
    https://arxiv.org/abs/1707.07397: `transform` and `draws`.
    Raising the Cost of Malicious AI-Powered Image Editing (Salman et al., 2023),
    https://arxiv.org/abs/2302.06588 and its code: `decay="linear"`, the L2 ball and step.

Differs:
    The perturbation, its projection and its updates stay float32 whatever the networks run in.
    Draws are made for one sample and shared by the batch, so a batch equals its singles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from shields.budget import Budget, per_sample_norm
from shields.errors import ConfigError, ShieldsError
from shields.types import Image, Mask, Objective, Perturbation, Progress, Step

__all__ = ["PgdConfig", "pgd"]

Decay = Literal["constant", "linear"]
Start = Literal["uniform", "zero", "grey"]
Update = Literal["sign", "l2", "adam"]
Keep = Literal["last", "best"]
Precision = Literal["float32", "bfloat16", "float16"]
Space = Literal["pixel", "tanh"]

#: (view, rng) -> view of the same batch; drawn once for the whole batch
ViewTransform = Callable[[Image, torch.Generator], Image]

_CHOICES = {"decay": Decay, "start": Start, "update": Update, "keep": Keep,
            "precision": Precision, "space": Space}  # fmt: skip
#: fp16 gradients of late steps underflow without it; sign and normalised steps do not see it
_FP16_SCALE = 1024.0
#: a step that gains less than this share of the best value so far counts as flat
_FLAT = 1e-3


@dataclass(frozen=True, kw_only=True)
class PgdConfig:
    """How the loop walks; methods inherit these fields and add their own."""

    #: number of updates
    steps: int = 100
    #: length of one update, in levels (Euclidean levels for "l2"; Adam's learning rate, in levels
    #: for `space="pixel"`, in units of w for `space="tanh"`)
    step: float = 1.0
    #: "linear" shrinks the step from `step` to about a hundredth of it
    decay: Decay = "constant"
    #: where to begin: uniformly in the budget, at the photo, or ("tanh" only) at mid grey
    start: Start = "uniform"
    #: "sign" of the gradient, "l2"-normalised gradient, or "adam"
    update: Update = "sign"
    #: optimise the perturbation itself, or w with image = (tanh w + 1) / 2 (C&W)
    space: Space = "pixel"
    #: share of the accumulated gradient that is kept, [0, 1)
    momentum: float = 0.0
    #: width of a Gaussian that smooths the gradient, odd, pixels; 0 = off
    smooth: int = 0
    #: draws (of the transform, or of the noise of the objective itself) averaged in a step
    draws: int = 1
    #: return the last perturbation, or per sample the one with the best objective
    keep: Keep = "last"
    #: stop a sample after this many steps without gain; 0 = never
    patience: int = 0
    #: type in which the networks run
    precision: Precision = "float32"
    #: round the image to whole levels in every forward pass (straight-through gradient)
    rounding: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ConfigError(f"`{name}` must be one of {get_args(choices)}, got {value!r}")
        for name, least in (("steps", 1), ("draws", 1), ("patience", 0), ("smooth", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"`{name}` must be a whole number from {least} up, got {value}")
        if not (math.isfinite(self.step) and self.step > 0):
            raise ConfigError(f"`step` must be above 0 levels, got {self.step}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"`momentum` must lie in [0, 1), got {self.momentum}")
        if self.smooth and self.smooth % 2 == 0:
            raise ConfigError(f"`smooth` must be odd (a kernel width in pixels), got {self.smooth}")
        if self.start == "grey" and self.space != "tanh":
            raise ConfigError('`start="grey"` needs `space="tanh"`')
        if self.space == "tanh" and self.update != "adam":
            raise ConfigError('`space="tanh"` needs `update="adam"`')

    def step_at(self, index: int) -> float:
        """Step length in levels at update `index`, counted from 0.

        Example:
            >>> round(PgdConfig(step=1.0, steps=100, decay="linear").step_at(99), 4)
            0.0199
        """
        if self.decay == "constant":
            return self.step
        return self.step * (1 - 0.99 * index / self.steps)


class _Smoother:
    """A depthwise Gaussian of a given odd width, sigma a fifth of it."""

    def __init__(self, width: int, device: torch.device) -> None:
        positions = torch.arange(width, device=device) - width // 2
        line = torch.exp(-0.5 * (positions / (width / 5)) ** 2)
        self.kernel = torch.outer(line / line.sum(), line / line.sum()).expand(3, 1, -1, -1)

    def __call__(self, gradient: Tensor) -> Tensor:
        return functional.conv2d(gradient, self.kernel, padding="same", groups=3)


class _Walk:
    """The variable of one run: how it becomes a perturbation and how it is moved."""

    def __init__(
        self, image: Image, budget: Budget, mask: Mask, config: PgdConfig, start: Tensor
    ) -> None:
        self.image, self.budget, self.config = image, budget, config
        self.low, self.high = budget.bounds(image, mask)
        self.mask = mask
        if config.space == "tanh":
            grey = config.start == "grey"
            self.variable = torch.zeros_like(image) if grey else self._w(start)
        else:
            self.variable = start.clone()
        self.velocity = torch.zeros_like(image)
        self.moments = (torch.zeros_like(image), torch.zeros_like(image))
        self.smoother = _Smoother(config.smooth, image.device) if config.smooth else None

    def _w(self, perturbation: Perturbation) -> Tensor:
        return (((self.image + perturbation) * 2 - 1) * (1 - 1e-6)).atanh()

    def perturbation(self, variable: Tensor) -> Perturbation:
        if self.config.space == "pixel":
            return variable
        return ((variable.tanh() + 1) / 2 - self.image) * self.mask

    def enforced(self) -> Perturbation:
        """The perturbation that would be returned now, inside every bound."""
        perturbation = self.perturbation(self.variable)
        return self.budget.project(perturbation, self.low, self.high)

    def direction(self, gradient: Tensor, index: int) -> Tensor:
        """Turn a gradient into an update, in the variable's units."""
        config = self.config
        if self.smoother is not None:
            gradient = self.smoother(gradient)
        if config.momentum:
            size = gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-20)
            self.velocity = config.momentum * self.velocity + gradient / size
            gradient = self.velocity
        length = config.step_at(index) * (1.0 if config.space == "tanh" else 1 / 255)
        if config.update == "sign":
            return length * gradient.sign()
        if config.update == "l2":
            return length * gradient / per_sample_norm(gradient).clamp_min(1e-12)
        first, second = self.moments
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        corrected = (second / (1 - 0.999 ** (index + 1))).sqrt() + 1e-8
        return length * first / (1 - 0.9 ** (index + 1)) / corrected

    def move(self, update: Tensor) -> None:
        self.variable = self.variable + update
        if self.config.space == "pixel":
            self.variable = self.budget.project(self.variable, self.low, self.high)
        elif self.config.start != "grey":  # from mid grey on nothing could stay inside
            self.variable = self._w(self.enforced())


def _gradient(
    walk: _Walk, objective: Objective, step: Step, transform: ViewTransform | None
) -> tuple[Tensor, Tensor]:
    """Objective (B,) and its gradient with respect to the variable, averaged over the draws."""
    config = walk.config
    dtype = getattr(torch, config.precision)
    scale = _FP16_SCALE if config.precision == "float16" else 1.0
    gain = torch.zeros(len(walk.image), device=walk.image.device)
    gradient = torch.zeros_like(walk.image)
    for _ in range(config.draws):
        variable = walk.variable.detach().requires_grad_(True)
        view = walk.image + walk.perturbation(variable)
        if config.rounding:
            view = view + ((view * 255).round() / 255 - view).detach()
        if transform is not None:
            view = transform(view, step.rng)
        with torch.autocast(view.device.type, dtype=dtype, enabled=dtype != torch.float32):
            value = objective(view, step)
        (part,) = torch.autograd.grad(value.float().sum() * scale, variable)
        gain += value.detach().float() / config.draws
        gradient += part.float() / (scale * config.draws)
    if not (gain.isfinite().all() and gradient.isfinite().all()):
        raise ShieldsError(
            f"the objective or its gradient is not finite at step {step.index}; "
            "try precision=float32 or a smaller step"
        )
    # What may not move must not share in a length, a mean or a blur of the gradient either.
    return gain, gradient * walk.mask


def _start(
    image: Image, budget: Budget, mask: Mask, config: PgdConfig, rng: torch.Generator
) -> Tensor:
    """Draw the first perturbation: one draw for one sample, shared by the batch."""
    low, high = budget.bounds(image, mask)
    if config.start != "uniform":
        return torch.zeros_like(image)
    noise = torch.rand(image.shape[1:], generator=rng).to(image) * 2 - 1
    # In a ball over the whole image, and where there is none, start near the photo: at one level.
    reach = budget.epsilon if budget.norm == "linf" else 1 / 255
    return budget.project((noise * reach * mask).expand_as(image), low, high)


def _nudge(walk: _Walk, still: Tensor, rng: torch.Generator) -> None:
    """Leave a point where the gradient is exactly zero, as a distance to the clean output has."""
    noise = torch.rand(walk.image.shape[1:], generator=rng).to(walk.image) * 2 - 1
    reach = max(walk.budget.epsilon / 2, 1e-3) if walk.budget.norm == "linf" else 1 / 255
    walk.move(noise * still.view(-1, 1, 1, 1) * walk.mask * reach)


def _first_gradient(
    walk: _Walk, objective: Objective, step: Step, transform: ViewTransform | None
) -> tuple[Tensor, Tensor]:
    """Objective and gradient at the start, after a nudge where the gradient is exactly zero.

    The nudge draws from a copy of the generator and the second look repeats the draws of the
    first, so that a sample which was not still goes the way it goes without its neighbours.
    """
    state = step.rng.get_state()
    gain, gradient = _gradient(walk, objective, step, transform)
    still = ~gradient.flatten(1).any(dim=1) & walk.mask.flatten(1).any(dim=1)
    if not still.any():
        return gain, gradient
    aside = torch.Generator()
    aside.set_state(state)
    _nudge(walk, still, aside)
    step.rng.set_state(state)
    gain, gradient = _gradient(walk, objective, step, transform)
    if (~gradient.flatten(1).any(dim=1) & still).any():
        raise ShieldsError(
            "the objective does not depend on what the mask lets change: its gradient is zero"
        )
    return gain, gradient


def pgd(
    image: Image,
    objective: Objective,
    budget: Budget,
    config: PgdConfig,
    *,
    mask: Mask,
    rng: torch.Generator,
    transform: ViewTransform | None = None,
    start: Perturbation | None = None,
    progress: Progress | None = None,
) -> Perturbation:
    """Climb `objective` inside `budget` and return the perturbation.

    Args:
        image: (B, 3, H, W), [0, 1], the clean images.
        objective: (view, step) -> (B,), larger is better, samples independent.
        budget: The ball; the mask and the valid range are added here.
        config: Steps, step length and all that shapes the walk.
        mask: (B, 1, H, W), [0, 1]; scales the budget of each pixel.
        rng: A CPU generator; every draw comes from it.
        transform: Applied to the perturbed image before the objective, redrawn for every draw.
        start: The first perturbation instead of `config.start`.
        progress: Called after every step with (done, in all, mean objective).

    Returns:
        (B, 3, H, W), inside the budget, the mask and the valid range.

    Raises:
        ShieldsError: The gradient is not finite, or zero everywhere even off the starting point.
    """
    if budget.levels == 0 or not mask.any():
        return torch.zeros_like(image)
    image = image.detach()
    if start is None:
        first = _start(image, budget, mask, config, rng)
    else:
        first = budget.project(start.detach().float(), *budget.bounds(image, mask))
    walk = _Walk(image, budget, mask, config, first)
    best, best_gain = walk.enforced(), torch.full((len(image),), -math.inf, device=image.device)
    since_gain = torch.zeros(len(image), device=image.device)
    active = torch.ones(len(image), dtype=torch.bool, device=image.device)
    for index in range(config.steps):
        step = Step(index=index, total=config.steps, rng=rng)
        evaluate = _gradient if index else _first_gradient
        gain, gradient = evaluate(walk, objective, step, transform)
        better = gain > best_gain + _FLAT * best_gain.abs().nan_to_num(posinf=0.0)
        since_gain = torch.where(better, 0, since_gain + 1)
        if config.keep == "best":
            chosen = active & (gain > best_gain)
            best = torch.where(chosen.view(-1, 1, 1, 1), walk.enforced(), best)
        best_gain = torch.where(active, torch.maximum(best_gain, gain), best_gain)
        if config.patience:  # who has stopped stays stopped, or a batch would differ from singles
            active = active & (since_gain < config.patience)
        walk.move(walk.direction(gradient, index) * active.view(-1, 1, 1, 1))
        if progress is not None:
            progress(index + 1, config.steps, float(gain.mean()))
        if not active.any():
            break
    if config.keep == "best" and active.any():
        gain, _ = _gradient(walk, objective, step, transform)
        chosen = active & (gain > best_gain)
        best = torch.where(chosen.view(-1, 1, 1, 1), walk.enforced(), best)
    return best if config.keep == "best" else walk.enforced()
