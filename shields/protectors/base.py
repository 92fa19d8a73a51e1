"""What every protector promises, enforced in one place.

`Protector.__call__` is final: it checks the input, freezes the networks, calls `perturb`, and
brings the result inside budget, mask and valid range. A subclass writes `perturb`, or, for a
projected-gradient method, only `objective`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types as python_types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from shields.budget import Budget, Norm
from shields.errors import ConfigError, ImageError
from shields.pgd import PgdConfig, pgd
from shields.registry import did_you_mean
from shields.types import (
    Image,
    Mask,
    Objective,
    Perturbation,
    Progress,
    Step,
    check_image,
    check_mask,
)
from shields.visibility import just_noticeable

__all__ = ["IterativeConfig", "IterativeProtector", "Protector", "ProtectorConfig",
           "check_weights"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProtectorConfig:
    """What all methods share: the budget."""

    #: budget, in levels (1/255 of the range)
    levels: float = 8.0
    #: "linf", "l2" (levels = Euclidean length) or "none" (a penalty inside the objective only)
    norm: Norm = "linf"
    #: keep each pixel below what people notice there (just-noticeable difference) as well
    stealth: bool = False

    def __post_init__(self) -> None:
        _ = self.budget
        parent = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()

    @property
    def budget(self) -> Budget:
        """The budget as an object."""
        return Budget(levels=self.levels, norm=self.norm)

    @classmethod
    def presets(cls) -> dict[str, Callable[[], Self]]:
        """Named settings: every class method of the config without arguments that returns one."""
        return {
            name: method
            for name, method in inspect.getmembers(cls, inspect.ismethod)
            if name != "presets" and not inspect.signature(method).parameters
        }

    def with_settings(self, settings: Mapping[str, str]) -> Self:
        """Return a copy with fields replaced by values given as text (`--set name=value`).

        Raises:
            ConfigError: An unknown field, or a text that is not a value of its type.
        """
        hints = typing.get_type_hints(type(self))
        known = [field.name for field in dataclasses.fields(self)]
        values = {}
        for name, text in settings.items():
            if name not in known:
                raise ConfigError(f"no setting is called {name!r}; {did_you_mean(name, known)}")
            values[name] = _parse(name, text, hints[name])
        return dataclasses.replace(self, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `type(config)(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


def _parse(name: str, text: str, hint: object) -> Any:  # noqa: ANN401  the field's own type
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        if text not in options:
            raise ConfigError(f"`{name}` must be one of {', '.join(options)}, got {text!r}")
        return text
    if python_types.NoneType in options:
        if text.lower() == "none":
            return None
        hint = next(option for option in options if option is not python_types.NoneType)
    if hint is bool:
        if text.lower() not in {"true", "false"}:
            raise ConfigError(f"`{name}` must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return hint(text)  # type: ignore[operator]
    except (TypeError, ValueError):
        kind = getattr(hint, "__name__", str(hint))
        raise ConfigError(f"`{name}` must be a {kind}, got {text!r}") from None


def check_weights(config: object, weights: Sequence[str], others: Sequence[str] = ()) -> None:
    """Hold the weights of an objective's terms to what makes sense.

    Args:
        config: Where they stand.
        weights: Their names; one at least must be above 0.
        others: Further numbers that must be finite and 0 or more.

    Raises:
        ConfigError: One is negative or not finite, or all weights are 0.
    """
    for name in (*weights, *others):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"`{name}` must be 0 or more, got {value}")
    if not any(getattr(config, name) for name in weights):
        raise ConfigError(f"one of {', '.join(weights)} must be above 0")


@contextmanager
def _frozen(networks: tuple[nn.Module, ...]) -> Iterator[None]:
    """Take parameters out of the graph for the duration of a call, then restore them."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class Protector(ABC):
    """Image and mask in, perturbation out."""

    #: the method's config class
    Config: ClassVar[type[ProtectorConfig]]
    #: role -> name of the network that is used where the caller names none; a role is the
    #: keyword of the constructor that takes it ("autoencoder", "recognizer", …)
    NETWORKS: ClassVar[Mapping[str, str]] = {}
    #: where the method is described
    paper: ClassVar[str] = ""

    def __init__(self, config: ProtectorConfig | None = None) -> None:
        self.config = self.Config() if config is None else config

    @classmethod
    def roles(cls, config: ProtectorConfig) -> Mapping[str, str]:
        """Those of `NETWORKS` that a protector with this config runs; no other is loaded."""
        return cls.NETWORKS

    def _hold(self, **networks: nn.Module | None) -> None:
        """Keep the networks that were given, as attributes named like their roles.

        Raises:
            ConfigError: A network that the config needs was left out.
        """
        needed = self.roles(self.config)
        for role, network in networks.items():
            if network is not None:
                setattr(self, role, network)
            elif role in needed:
                raise ConfigError(
                    f"{type(self).__name__} with these settings needs a network for the role "
                    f"{role!r}; pass {role}=…"
                )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Every network that the protector holds."""
        return tuple(value for value in vars(self).values() if isinstance(value, nn.Module))

    @final
    def __call__(
        self,
        image: Image,
        mask: Mask | None = None,
        *,
        rng: torch.Generator,
        landmarks: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Perturbation:
        """Compute a perturbation that obeys the budget.

        Args:
            image: (B, 3, H, W), [0, 1].
            mask: (B, 1, H, W), [0, 1], scales each pixel's budget; everywhere 1 if left out.
            rng: A CPU generator; equal seeds give equal bits.
            landmarks: (B, 5, 2) x, y in pixels of `image`, for methods that look at the face; a row
                of NaN marks an image without one.
            progress: Called after every step with (done, in all, mean objective).

        Returns:
            (B, 3, H, W), inside the budget and zero where the mask is zero.

        Raises:
            ImageError: An input has the wrong shape, type or range.
        """
        check_image(image)
        if mask is None:
            mask = torch.ones_like(image[:, :1])
        check_mask(mask, image)
        if landmarks is not None and landmarks.shape != (len(image), 5, 2):
            raise ImageError(
                f"`landmarks` must be {(len(image), 5, 2)}, got {tuple(landmarks.shape)}"
            )
        image = image.detach()
        if self.config.stealth and self.config.levels:
            # The mask scales the budget's box, which is the whole range where the ball is no box.
            reach = self.config.levels if self.config.norm == "linf" else 255.0
            mask = mask * (just_noticeable(image) / reach).clamp_max(1)
        with _frozen(self.networks):
            perturbation = self.perturb(
                image, mask, rng=rng, landmarks=landmarks, progress=progress
            )
        budget = self.config.budget
        return budget.project(perturbation.detach().float(), *budget.bounds(image, mask))

    @abstractmethod
    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        """Compute the perturbation; the caller has checked the input and enforces the budget."""

    def evaluate(
        self, clean: Image, protected: Image, mask: Mask, *, landmarks: Tensor | None = None
    ) -> Tensor | None:
        """The method's own objective (B,) of protected images; None where it has none."""
        return None


@dataclass(frozen=True, kw_only=True)
class IterativeConfig(ProtectorConfig, PgdConfig):
    """Budget and loop of a projected-gradient protector."""

    #: average over the transforms of everyday handling (JPEG, half size, blur, …)
    robust: bool = False
    #: compile the networks (`torch.compile`): a minute or two first, then faster; for many photos
    compile: bool = False

    def hardened(self) -> Self:
        """The same settings made robust to handling and to networks not seen (`--robust`)."""
        return dataclasses.replace(self, robust=True, draws=max(2, self.draws))


class IterativeProtector(Protector):
    """A protector that is an objective and the shared loop."""

    Config: ClassVar[type[IterativeConfig]]
    config: IterativeConfig
    #: what `robust` averages over instead of everyday handling, for a defender who knows more
    handling: Callable[[Image, torch.Generator], Image] | None = None

    @abstractmethod
    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Build the objective; whatever depends on the clean image alone is computed here, once."""

    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        """Climb the objective with `shields.pgd.pgd`."""
        objective = self.objective(image, mask, landmarks=landmarks, rng=rng)
        return pgd(
            image,
            objective,
            self.config.budget,
            self.config,
            mask=mask,
            rng=rng,
            transform=self.transform(),
            progress=progress,
        )

    def transform(self) -> Callable[[Image, torch.Generator], Image] | None:
        """What the loop averages over; None for the image as it is."""
        return self.handled() if self.config.robust else None

    def handled(self) -> Callable[[Image, torch.Generator], Image]:
        """What happens to photos, as far as this protector expects it."""
        from shields.transforms import ROBUST

        return self.handling or ROBUST

    @torch.no_grad()
    def evaluate(
        self, clean: Image, protected: Image, mask: Mask, *, landmarks: Tensor | None = None
    ) -> Tensor:
        """The objective (B,) of protected images as the last step sees it, from a fixed seed.

        What the loop averages over is left out; what an objective draws itself is drawn.
        """
        rng = torch.Generator().manual_seed(0)
        with _frozen(self.networks):
            objective = self.objective(clean, mask, landmarks=landmarks, rng=rng)
            total = self.config.steps
            return objective(protected, Step(index=total - 1, total=total, rng=rng)).float()
