"""How much each of several manipulators counts in a step: strategies behind one contract.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, Eqs. 11 to 13.
    DTP: Dynamic Task Prioritization for Multitask Learning (Guo et al., 2018).
    MGDA: Multiple-gradient descent algorithm (Desideri, 2012); Multi-Task Learning as
    Multi-Objective Optimization (Sener, Koltun, 2018), https://arxiv.org/abs/1810.04650.
    Frank-Wolfe with pairwise steps: Lacoste-Julien, Jaggi (2015),
    https://arxiv.org/abs/1511.05932.
    HMM: Defending Against Deepfakes with Ensemble Adversarial Perturbation (Guan et al., 2022).

Differs:
    All weights are brought to a sum of 1; the paper's are not, so its step fades once everything is
    disrupted. Where every weight is 0, all count the same.
    Eq. 11 weighs losses; MGDA is about gradients, and so is this.
    The indicator is cut off at 1e-4 and not at 1e-13, which bounds the urgency by about 9.
    HMM and DTP are named in the ID-Guard paper without formulae. HMM is read as: only the hardest
    count, equally. DTP is Guo et al.'s focal form, which is Eq. 13 without its prior.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shields.budget import Budget
from shields.errors import ConfigError, ShieldsError
from shields.models.manipulation import Manipulator
from shields.pgd import PgdConfig, pgd
from shields.types import Image, Step

__all__ = ["STRATEGIES", "DynamicPriority", "Equal", "HardestFirst", "IndicatorWeights",
           "MinimumNorm", "Prior", "TaskReport", "WeightStrategy", "estimate_prior",
           "minimum_norm", "orders_of_magnitude", "urgency"]  # fmt: skip

#: indicators below this count as this
_FLOOR = 1e-4


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """What is known of N tasks in one step; tensors without a graph."""

    #: (N,), how well each manipulator is disrupted, 0 or more; ID-Guard's K, of both branches
    indicators: Tensor
    #: (N, P) gradient of each task, flat, for strategies that ask for it
    gradients: Tensor | None = None


class WeightStrategy(nn.Module, ABC):
    """Report of a step -> weights (N,), none below 0, of sum 1; history lies in buffers."""

    #: whether the report must hold gradients
    needs_gradients: ClassVar[bool] = False

    @abstractmethod
    def forward(self, report: TaskReport) -> Tensor:
        """Weigh the tasks of this step and remember what the next one needs."""


class Equal(WeightStrategy):
    """Everybody counts the same."""

    def forward(self, report: TaskReport) -> Tensor:
        """(N,) of 1 / N."""
        return _simplex(torch.ones_like(report.indicators))


class Prior(WeightStrategy):
    """Weights fixed beforehand, such as `estimate_prior`'s.

    Args:
        prior: (N,), not all 0.
    """

    prior: Tensor

    def __init__(self, prior: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("prior", _checked_prior(prior))

    def forward(self, report: TaskReport) -> Tensor:
        """The prior, brought to a sum of 1."""
        _same_count(self.prior, report)
        return _simplex(self.prior)


class HardestFirst(WeightStrategy):
    """Hard model mining: the least disrupted count, all others do not.

    Args:
        hardest: How many count.
    """

    def __init__(self, hardest: int = 1) -> None:
        super().__init__()
        if hardest < 1:
            raise ConfigError(f"`hardest` must be 1 or more, got {hardest}")
        self.hardest = hardest

    def forward(self, report: TaskReport) -> Tensor:
        """Equal weights for the hardest."""
        count = min(self.hardest, len(report.indicators))
        order = report.indicators.argsort(stable=True)
        return _simplex(torch.zeros_like(report.indicators).index_fill(0, order[:count], 1.0))


class _History(nn.Module):
    """Running mean of the indicators, cut to [1e-4, 1]; the first step starts it."""

    average: Tensor
    begun: Tensor

    def __init__(self, tasks: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("average", torch.zeros(tasks))
        self.register_buffer("begun", torch.tensor(False))

    def add(self, indicators: Tensor) -> None:
        """Take in the indicators (N,) of a step."""
        now = indicators.detach().clamp(_FLOOR, 1)
        kept = self.momentum * self.average + (1 - self.momentum) * now
        self.average = torch.where(self.begun, kept, now)
        self.begun = torch.ones_like(self.begun)


class DynamicPriority(WeightStrategy):
    """Dynamic task prioritisation: -(1 - K)^focus log K of a running mean of the indicator.

    Args:
        tasks: N.
        momentum: Share of the mean that is kept, [0, 1).
        focus: Exponent, 0 or more; larger ones look harder at what is hard.
    """

    def __init__(self, tasks: int, momentum: float = 0.9, focus: float = 1.0) -> None:
        super().__init__()
        if not (0 <= momentum < 1 and focus >= 0):
            raise ConfigError(
                f"`momentum` must lie in [0, 1) and `focus` be 0 or more, got {momentum}, {focus}"
            )
        self.focus, self.history = focus, _History(tasks, momentum)

    def forward(self, report: TaskReport) -> Tensor:
        """Weigh by the mean that this step's indicators went into."""
        self.history.add(report.indicators)
        return _simplex(urgency(self.history.average, self.focus))


class IndicatorWeights(WeightStrategy):
    """ID-Guard's strategy II: prior times urgency of the indicator.

    Args:
        prior: (N,), Eq. 12's alpha.
        delayed: Use the step before, as the paper does (then the first step has the prior alone);
            or this step, as the code does.
        momentum: Share of the indicator's running mean that is kept, [0, 1); 0 is the paper's.
    """

    prior: Tensor

    def __init__(
        self, prior: Sequence[float], *, delayed: bool = True, momentum: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ConfigError(f"`momentum` must lie in [0, 1), got {momentum}")
        self.delayed, self.history = delayed, _History(len(prior), momentum)
        self.register_buffer("prior", _checked_prior(prior))

    def forward(self, report: TaskReport) -> Tensor:
        """Prior times urgency, brought to a sum of 1."""
        _same_count(self.prior, report)
        begun, before = bool(self.history.begun), self.history.average
        self.history.add(report.indicators)
        if not self.delayed:
            return _simplex(self.prior * urgency(self.history.average))
        return _simplex(self.prior * urgency(before) if begun else self.prior)


class MinimumNorm(WeightStrategy):
    """ID-Guard's strategy I, MGDA: the shortest convex combination of the tasks' gradients.

    Going along it makes no task worse, to first order.

    Args:
        normalised: Bring every gradient to length 1 first, which the paper does not.
    """

    needs_gradients = True

    def __init__(self, *, normalised: bool = False) -> None:
        super().__init__()
        self.normalised = normalised

    def forward(self, report: TaskReport) -> Tensor:
        """Solve for the weights.

        Raises:
            ConfigError: The report holds no gradients.
            ShieldsError: A gradient is not finite.
        """
        if report.gradients is None:
            raise ConfigError("MGDA weighs gradients: the report must hold them, (N, P)")
        # Products of many small numbers: the small matrix is worth double precision.
        rows = report.gradients.detach().double()
        if self.normalised:
            rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        products = rows @ rows.T
        if not bool(products.isfinite().all()):
            raise ShieldsError("a task's gradient is not finite; lower the rate, or use float32")
        return minimum_norm(products).to(report.indicators)


def minimum_norm(products: Tensor, *, steps: int = 1000, tolerance: float = 1e-9) -> Tensor:
    """Weights w (N,) on the simplex with the least w' P w.

    Frank-Wolfe with pairwise steps and exact line search: for two tasks its one step is the closed
    form, for more it converges linearly.

    Args:
        products: (N, N) inner products of the gradients.
        steps: At most so many steps.
        tolerance: Stop where the gap is below this share of the mean squared length.
    """
    matrix = products.detach().double().cpu()
    count = len(matrix)
    weights = torch.zeros(count, dtype=torch.float64)
    weights[matrix.diagonal().argmin()] = 1
    bound = tolerance * float(matrix.diagonal().mean())
    for _ in range(1 if count == 2 else steps):
        slope = matrix @ weights
        best = int(slope.argmin())
        worst = int(slope.masked_fill(weights <= 0, -torch.inf).argmax())
        gap = float(slope[worst] - slope[best])
        bend = float(matrix[best, best] + matrix[worst, worst] - 2 * matrix[best, worst])
        if gap <= bound or bend <= 0:
            break
        moved = min(gap / bend, float(weights[worst]))
        weights[best] += moved
        weights[worst] = max(0.0, float(weights[worst]) - moved)
    return weights / weights.sum()


def urgency(indicators: Tensor, focus: float = 1.0) -> Tensor:
    """-(1 - K)^focus log K of indicators cut to [1e-4, 1]: falls from about 9 to 0.

    Example:
        >>> urgency(torch.tensor([0.5, 1.0, 7.0])).tolist()
        [0.3465735912322998, 0.0, 0.0]
    """
    cut = indicators.clamp(_FLOOR, 1)
    return (1 - cut) ** focus * cut.log().abs()


def orders_of_magnitude(distances: Tensor, most: int = 4) -> Tensor:
    """Prior 10^n (N,) of distances that equal attacks reached: 1 for the easiest manipulator.

    n is the rounded number of orders of magnitude to the largest distance, `most` at most; one that
    did not move at all gets that, too.

    Example:
        >>> orders_of_magnitude(torch.tensor([0.5, 0.4, 0.06, 0.004])).tolist()
        [1.0, 1.0, 10.0, 100.0]
    """
    if not len(distances) or not bool((distances > 0).any()):
        raise ConfigError("no manipulator moved under the attack; try more levels or steps")
    ratio = distances.double().max() / distances.double()
    return (10.0 ** ratio.log10().round().clamp(0, most)).float()


def estimate_prior(
    manipulators: Sequence[Manipulator],
    images: Image,
    *,
    rng: torch.Generator,
    levels: float = 6.375,
    step: float = 1.275,
    steps: int = 10,
) -> Tensor:
    """Measure how hard each manipulator is to disrupt, by one slight attack on a few photos.

    Args:
        manipulators: N of them; each is asked for the first of its conditions.
        images: (B, 3, H, W), [0, 1], a small sample.
        rng: A CPU generator; every manipulator is attacked from the same start.
        levels: Budget.
        step: Of one update, levels.
        steps: Updates.

    Returns:
        (N,) powers of ten, for `Prior` and `IndicatorWeights`.
    """
    walk = PgdConfig(steps=steps, step=step)
    seed = int(torch.randint(2**31, (), generator=rng))
    reached = []
    for manipulator in manipulators:
        objective = _distance(manipulator, images)
        same = torch.Generator().manual_seed(seed)
        mask = torch.ones_like(images[:, :1])
        moved = pgd(images, objective, Budget(levels=levels), walk, mask=mask, rng=same)
        with torch.no_grad():
            last = Step(index=steps - 1, total=steps, rng=same)
            reached.append(objective(images + moved, last).mean())
    return orders_of_magnitude(torch.stack(reached))


def _distance(manipulator: Manipulator, images: Image) -> Callable[[Image, Step], Tensor]:
    """Mean square (B,), in [-1, 1] units, between forgeries of an image and of the clean one."""
    with torch.no_grad():
        clean = manipulator(images)

    def value(view: Image, _: Step) -> Tensor:
        return (2 * (manipulator(view) - clean)).square().mean(dim=(1, 2, 3))

    return value


def _simplex(weights: Tensor) -> Tensor:
    total = weights.sum()
    return torch.where(total > 0, weights / total, torch.full_like(weights, 1 / len(weights)))


def _checked_prior(prior: Sequence[float]) -> Tensor:
    values = torch.tensor([float(value) for value in prior], dtype=torch.float32)
    if not len(values) or not bool(values.isfinite().all()) or float(values.min()) <= 0:
        raise ConfigError(f"`prior` must be one number above 0 for each task, got {list(prior)}")
    return values


def _same_count(prior: Tensor, report: TaskReport) -> None:
    if len(prior) != len(report.indicators):
        raise ConfigError(
            f"`prior` is for {len(prior)} tasks, there are {len(report.indicators)}; name one "
            "number per manipulator"
        )


#: name in a trainer's config -> strategy
STRATEGIES: Mapping[str, type[WeightStrategy]] = {
    "equal": Equal,
    "prior": Prior,
    "hmm": HardestFirst,
    "dtp": DynamicPriority,
    "mgda": MinimumNorm,
    "kpi": IndicatorWeights,
}
