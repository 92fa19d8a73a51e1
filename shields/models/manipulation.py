"""What every manipulator and editor promises, and `wrap`, by which anybody's network becomes one.

Callers see images in [0, 1] and a condition chosen by name. Native ranges, legal sizes, label
vectors and train/eval mode are hidden here; the gradient reaches the image and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import ConfigError, ImageError, UnknownName
from shields.models.base import Frozen
from shields.registry import did_you_mean
from shields.types import Image

__all__ = ["Animator", "Condition", "Editor", "Manipulator", "resized", "wrap"]

ValueRange = Literal["unit", "signed"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What a manipulator is told to do to a batch."""

    #: as it was chosen, for reports
    name: str
    #: (1, N) or (B, N): label vector, relative vector or style code
    value: Tensor
    #: which part of the network acts, where it has several
    part: int = 0


class Manipulator(Frozen, ABC):
    """A frozen network that forges a face: attributes, or who it is."""

    #: what it can be asked for, by name; the first is what it does where nothing is asked
    conditions: tuple[str, ...] = ("default",)
    #: sides must be multiples of this, pixels
    multiple: int = 4
    #: side of the square that the network sees; None: the image as it is
    native_size: int | None = None
    HOT: ClassVar[tuple[str, ...]] = ("_run",)

    @abstractmethod
    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        """(B, 3, H, W), [0, 1], sides legal -> forgery of about [0, 1], and a feature map."""

    def _condition(self, name: str, labels: Tensor | None) -> Condition:
        """Build the condition of a known name."""
        return Condition(name=name, value=torch.zeros(1, 0))

    def condition(self, name: str = "", *, labels: Tensor | None = None) -> Condition:
        """Look up what to do by name.

        Args:
            name: One of `conditions`; the first where left empty.
            labels: (B, N) attributes of the photos themselves, 0 or 1, for manipulators that are
                told the whole wanted state; all zero where unknown.

        Raises:
            UnknownName: There is no such condition.
        """
        name = name or self.conditions[0]
        if name not in self.conditions:
            hint = did_you_mean(name, self.conditions)
            raise UnknownName(f"the manipulator {self.name!r} has no condition {name!r}; {hint}")
        return self._condition(name, labels)

    def outputs(self, image: Image, condition: Condition | str = "") -> tuple[Image, Tensor | None]:
        """Forge once, and return what ID-Guard looks at, too.

        Args:
            image: (B, 3, H, W), [0, 1].
            condition: A name, or what `condition` returned.

        Returns:
            The forgery, (B, 3, H, W), about [0, 1]: not clamped, so that gradients survive; and the
            feature map (B, C, h, w), None where the manipulator offers none.

        Raises:
            ImageError: A side is no multiple of `multiple`, where the network sees the image as is.
        """
        if isinstance(condition, str):
            condition = self.condition(condition)
        height, width = image.shape[2:]
        if self.native_size is not None:
            small = resized(image, (self.native_size, self.native_size))
            forged, features = self._run(small, condition)
            return resized(forged, (height, width)), features
        if height % self.multiple or width % self.multiple:
            legal = [
                max(1, round(side / self.multiple)) * self.multiple for side in (height, width)
            ]
            raise ImageError(
                f"the manipulator {self.name!r} needs sides that are multiples of {self.multiple}, "
                f"got {height}x{width}; the nearest such size is {legal[0]}x{legal[1]}"
            )
        return self._run(image, condition)

    def forward(self, image: Image, condition: Condition | str = "") -> Image:
        """Forge (B, 3, H, W), [0, 1]: same shape, about [0, 1], not clamped."""
        return self.outputs(image, condition)[0]

    def features(self, image: Image, condition: Condition | str = "") -> Tensor:
        """The feature map (B, C, h, w) that ID-Guard confuses.

        Raises:
            ConfigError: The manipulator offers none.
        """
        features = self.outputs(image, condition)[1]
        if features is None:
            raise ConfigError(f"the manipulator {self.name!r} offers no feature map")
        return features


class Editor(Frozen, ABC):
    """A manipulator that is driven by a text prompt; usually sampled, so it takes a seed."""

    #: side at which it works, pixels
    size: int = 512

    @abstractmethod
    def edit(self, image: Image, prompts: Sequence[str], *, seeds: Sequence[int]) -> Image:
        """Edit (B, 3, H, W), [0, 1], one prompt and one seed each: (B, 3, size, size), [0, 1].

        An equal photo, prompt and seed give an equal edit, whatever else is in the batch.
        """


class Animator(Frozen, ABC):
    """A talking head: photo and speech -> video."""

    @abstractmethod
    def animate(self, image: Image, audio: Path, *, seed: int = 0) -> Tensor:
        """Animate (1, 3, H, W), [0, 1], by a sound file: (T, 3, h, w), [0, 1], one per frame."""


def resized(image: Image, size: tuple[int, int]) -> Image:
    """Bring to (height, width), bilinear, antialiased; an image of that size comes back as is."""
    if tuple(image.shape[2:]) == size:
        return image
    # On CPUs this is not there for half precision.
    wide = image if image.dtype == torch.float64 else image.float()
    small = functional.interpolate(
        wide, size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return small.to(image.dtype)


class _Wrapped(Manipulator):
    """Anybody's callable behind the contract."""

    def __init__(
        self,
        network: Callable[..., object],
        conditions: tuple[str, ...],
        ranges: tuple[ValueRange, ValueRange],
        native_size: int | None,
        multiple: int,
        *,
        named: bool,
        features: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        # Modules register themselves, and so move to the device; a function brings its own.
        self.network, self._behind = network, nn.ModuleList(_behind(network) + _behind(features))
        self.conditions, self.multiple = conditions, multiple
        self.native_size, self._ranges, self._named = native_size, ranges, named
        self._features = features
        own = set(network.modules()) if isinstance(network, nn.Module) else set()
        inside = isinstance(features, nn.Module) and features in own
        self._inside = cast(nn.Module, features) if inside else None
        self.freeze()

    def _condition(self, name: str, labels: Tensor | None) -> Condition:
        return Condition(name=name, value=torch.zeros(1, 0) if labels is None else labels)

    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        given, returned = self._ranges
        native = image * 2 - 1 if given == "signed" else image
        caught: list[Tensor] = []
        hook = None
        if self._inside is not None:
            hook = self._inside.register_forward_hook(
                lambda module, given, made: caught.append(made)
            )
        try:
            result = self.network(native, condition.name) if self._named else self.network(native)
        finally:
            if hook is not None:
                hook.remove()
        forged = _first_image(result, image)
        if returned == "signed":
            forged = (forged + 1) / 2
        if self._inside is not None:
            features = caught[-1] if caught else None
        else:
            features = None if self._features is None else self._features(native)
        return resized(forged, (image.shape[2], image.shape[3])), features


def _behind(network: Callable[..., object] | None) -> list[nn.Module]:
    """The networks that a method belongs to, or that a function was made around."""
    cells = getattr(network, "__closure__", None) or ()
    held = [getattr(network, "__self__", None), *(cell.cell_contents for cell in cells)]
    return [part for part in held if isinstance(part, nn.Module)]


def _first_image(result: object, image: Image) -> Image:
    """Take the picture out of what a network returned: a tensor, or the first of a tuple."""
    while isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor) or result.ndim != 4 or result.shape[:2] != image.shape[:2]:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ImageError(
            f"a manipulator must return an image ({len(image)}, 3, H, W), alone or first in a "
            f"tuple; got {got}"
        )
    return result


def wrap(
    network: Callable[..., object],
    *,
    conditions: Sequence[str] = (),
    native_range: ValueRange = "signed",
    output_range: ValueRange | None = None,
    native_size: int | None = None,
    multiple: int = 1,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Manipulator:
    """Turn a module or a function into a manipulator: resizes, converts, freezes, pins the mode.

    Args:
        network: `network(image)`, or `network(image, name)` where `conditions` are given; returns
            an image, or a tuple or list whose first element is one. Put it into the mode in which
            it shall run before.
        conditions: What it can be asked for; it is called with the chosen name.
        native_range: Range of the image that it takes: "unit" is [0, 1], "signed" is [-1, 1].
        output_range: Range of what it returns; as `native_range` where left out.
        native_size: Side of the square that it takes, pixels; None for any.
        multiple: Sides must be multiples of this, where it takes any.
        features: The layer of `network` whose output is the feature map for ID-Guard's feature
            confusion; or a function, native image -> that map, which runs besides.

    Example:
        >>> invert = wrap(lambda image: -image)
        >>> invert(torch.full((1, 3, 8, 8), 0.25))[0, 0, 0, 0].item()
        0.75
    """
    given = (network, features, *_behind(network), *_behind(features))
    parts = [module for part in given if isinstance(part, nn.Module) for module in part.modules()]
    modes = [module.training for module in parts]
    wrapped = _Wrapped(
        network,
        tuple(conditions) or ("default",),
        (native_range, output_range or native_range),
        native_size,
        multiple,
        named=bool(conditions),
        features=features,
    )
    # Freezing set evaluation mode; its owner knows better in which mode it works.
    for module, mode in zip(parts, modes, strict=True):
        module.training = mode
    wrapped.name = getattr(network, "__name__", type(network).__name__)
    return wrapped
