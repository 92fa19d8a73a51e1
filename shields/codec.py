"""What a transform is, alone and composed, and those that sending brings: JPEG, resizing, cropping.

All public names of transforms stand in `shields.transforms`; import them from there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError
from shields.jpeg import TO_YCC, Subsampling, carry, real_jpeg, soft_jpeg
from shields.types import Image, Mask

__all__ = ["TO_YCC", "CompressResize", "Crop", "Identity", "Jpeg", "Kernel", "OneOf", "Range",
           "Resize", "Seeded", "Sequence", "Subsampling", "Transform", "carry", "real_jpeg",
           "resize", "soft_jpeg", "uniform"]  # fmt: skip

#: one strength, or the lowest and the highest to draw from
Range = float | tuple[float, float]
Kernel = Literal["bilinear", "bicubic", "lanczos"]
Gradient = Literal["straight", "soft"]

#: no side is made shorter than this, pixels
_LEAST_SIDE = 16


def uniform(span: Range, rng: torch.Generator) -> float:
    """Draw one number from a range; a single number stays what it is."""
    low, high = span if isinstance(span, tuple) else (span, span)
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """A differentiable map of images with strengths that are drawn or given."""

    #: field that is a strength -> smallest and largest value that makes sense
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}
    #: field that is a choice -> its `Literal`
    choices: ClassVar[Mapping[str, object]] = {}
    #: whether places change, so that a mask has to go the same way
    moves: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, (least, most) in self.limits.items():
            value = getattr(self, name)
            span = value if isinstance(value, tuple) else (value, value)
            numbers = all(isinstance(end, int | float) and type(end) is not bool for end in span)
            if len(span) != 2 or not numbers or not least <= span[0] <= span[1] <= most:
                raise ConfigError(
                    f"`{name}` of {type(self).__name__} must be a number in [{least:g}, {most:g}] "
                    f"or a range (low, high) inside it, got {value!r}"
                )
        for name, choice in self.choices.items():
            if getattr(self, name) not in get_args(choice):
                raise ConfigError(
                    f"`{name}` of {type(self).__name__} must be one of {get_args(choice)}, "
                    f"got {getattr(self, name)!r}"
                )

    def draw(self, rng: torch.Generator) -> dict[str, float]:
        """Draw what `apply` needs, once for the whole batch, from a CPU generator."""
        return {name: uniform(getattr(self, name), rng) for name in self.limits}

    # Each subclass names its strengths; to mypy such a signature admits them all.
    @abstractmethod
    def apply(self, image: Image, *args: Any, **strengths: Any) -> Image:  # noqa: ANN401
        """Transform (B, 3, H, W), [0, 1] at the given strengths: same shape, same range."""

    def __call__(self, image: Image, rng: torch.Generator) -> Image:
        """Transform (B, 3, H, W), [0, 1] at strengths drawn from `rng`."""
        return self.apply(image, **self.draw(rng))

    def apply_mask(self, mask: Mask, *args: Any, **strengths: Any) -> Mask:  # noqa: ANN401
        """Move a mask (B, 1, H, W), [0, 1] to where `apply` moves an image at these strengths."""
        return self.apply(mask, *args, **strengths) if self.moves else mask

    def with_mask(self, image: Image, mask: Mask, rng: torch.Generator) -> tuple[Image, Mask]:
        """Transform an image, and its mask along with it, at the same drawn strengths."""
        strengths = self.draw(rng)
        return self.apply(image, **strengths), self.apply_mask(mask, **strengths)


@dataclass(frozen=True, kw_only=True)
class Seeded(Transform):
    """A transform that draws a field: its seed is one more strength, so `apply` repeats it."""

    def draw(self, rng: torch.Generator) -> dict[str, float]:
        """Draw the strength, and the seed of the field."""
        return {**super().draw(rng), "seed": int(torch.randint(2**31 - 1, (), generator=rng))}


@dataclass(frozen=True, kw_only=True)
class Identity(Transform):
    """The image as it is."""

    def apply(self, image: Image) -> Image:
        """Return (B, 3, H, W) itself."""
        return image


@dataclass(frozen=True, kw_only=True)
class Jpeg(Transform):
    """JPEG: the forward pass is the real codec on the image rounded to 8 bits, bit for bit.

    The gradient is an approximation: "straight" passes it on unchanged, as if nothing had
    happened; "soft" is the gradient of `shields.jpeg.soft_jpeg` at the unrounded image.
    """

    #: libjpeg's scale, whole numbers
    quality: Range = 75
    #: whether the colour planes are halved
    subsampling: Subsampling = "4:2:0"
    gradient: Gradient = "straight"

    limits: ClassVar = {"quality": (1, 100)}
    choices: ClassVar = {"subsampling": Subsampling, "gradient": Gradient}

    def draw(self, rng: torch.Generator) -> dict[str, float]:
        """Draw a whole quality, both ends as likely as any other."""
        low, high = self.quality if isinstance(self.quality, tuple) else (self.quality,) * 2
        return {"quality": math.floor(uniform((round(low), round(high) + 1 - 1e-9), rng))}

    def apply(self, image: Image, *, quality: float) -> Image:
        """Encode and decode (B, 3, H, W) at a quality."""
        whole = round(quality)
        value = real_jpeg(image.detach(), whole, self.subsampling)
        if not (image.requires_grad and torch.is_grad_enabled()):
            return value
        soft = self.gradient == "soft"
        return carry(value, soft_jpeg(image, whole, self.subsampling) if soft else image)


@lru_cache(maxsize=32)
def _lanczos_matrix(length: int, wanted: int) -> Tensor:
    """Lanczos-3 weights (wanted, length), widened when shrinking, each row summing to 1."""
    ratio = length / wanted
    centres = (torch.arange(wanted, dtype=torch.float64) + 0.5) * ratio
    distance = torch.arange(length, dtype=torch.float64) + 0.5 - centres[:, None]
    distance = distance / max(ratio, 1)
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


@lru_cache(maxsize=8)
def _has_lanczos(device: str) -> bool:
    """Whether this torch resamples by Lanczos itself on such a device."""
    try:
        probe = torch.zeros(1, 3, 2, 2, device=device)
        functional.interpolate(probe, size=(1, 1), mode="lanczos", antialias=True)
    except (RuntimeError, ValueError):
        return False
    return True


def resize(image: Image, size: tuple[int, int], kernel: Kernel = "lanczos") -> Image:
    """Resample with antialiasing; bicubic and Lanczos overshoot, nothing is clamped here.

    Lanczos is Pillow's up to its 8-bit rounding between the two passes. Where a gradient is wanted
    it runs as two matrix products: the same values to 1e-6 and a backward pass eight times faster.

    Args:
        image: (B, C, H, W).
        size: Height and width wanted, pixels.
        kernel: "bilinear", "bicubic" or "lanczos".

    Returns:
        (B, C, *size).
    """
    height, width = image.shape[2:]
    if (height, width) == tuple(size):
        return image
    wants_gradient = image.requires_grad and torch.is_grad_enabled()
    if kernel == "lanczos" and (wants_gradient or not _has_lanczos(image.device.type)):
        across = _lanczos_matrix(width, size[1]).to(image)
        down = _lanczos_matrix(height, size[0]).to(image)
        return down @ (image @ across.T)
    return functional.interpolate(image, size=tuple(size), mode=kernel, antialias=True)


def _scaled(side: int, scale: float) -> int:
    """Scale a side in pixels: rounded down, but not below 16 unless it is shorter already."""
    # A scale of 1/3 must not lose a pixel to binary fractions.
    return max(math.floor(side * scale + 1e-6), min(side, _LEAST_SIDE))


@dataclass(frozen=True, kw_only=True)
class Resize(Transform):
    """Resize both sides, and back to the old size unless `restore` is off.

    Sizes are rounded down, and no side falls below 16 pixels.
    """

    #: new side as a share of the old
    scale: Range = 0.5
    kernel: Kernel = "lanczos"
    #: back to the old size by the same kernel; off is for attacks, it changes the shape
    restore: bool = True

    limits: ClassVar = {"scale": (0.01, 16)}
    choices: ClassVar = {"kernel": Kernel, "restore": Literal[True, False]}

    def apply(self, image: Image, *, scale: float) -> Image:
        """Resize (B, 3, H, W) by a factor."""
        height, width = image.shape[2:]
        size = (_scaled(height, scale), _scaled(width, scale))
        small = resize(image, size, self.kernel).clamp(0, 1)
        return resize(small, (height, width), self.kernel).clamp(0, 1) if self.restore else small

    def apply_mask(self, mask: Mask, *, scale: float) -> Mask:
        """Bring a mask to the image's new size, where it gets one."""
        return mask if self.restore else self.apply(mask, scale=scale)


@dataclass(frozen=True, kw_only=True)
class CompressResize(Transform):
    """C&R: JPEG, then half size; in this order, which matters.

    The gradient of the JPEG is straight-through.

    Source:
        TIP-RSR's "C&R": JPEG at quality 75, then half-size Lanczos.

    Differs:
        Enlarged again by Lanczos unless `restore` is off; the half-size image is not rounded.
    """

    #: libjpeg's scale
    quality: Range = 75
    #: new side as a share of the old
    scale: Range = 0.5
    #: back to the old size; off is for attacks, it changes the shape
    restore: bool = True

    limits: ClassVar = {"quality": (1, 100), "scale": (0.01, 16)}
    choices: ClassVar = {"restore": Literal[True, False]}

    def apply(self, image: Image, *, quality: float, scale: float) -> Image:
        """Compress (B, 3, H, W), then resize it."""
        coded = Jpeg().apply(image, quality=quality)
        return Resize(restore=self.restore).apply(coded, scale=scale)

    def apply_mask(self, mask: Mask, *, quality: float, scale: float) -> Mask:
        """Bring a mask to the image's new size, where it gets one."""
        return Resize(restore=self.restore).apply_mask(mask, scale=scale)


@dataclass(frozen=True, kw_only=True)
class Crop(Transform):
    """Cut a window out of the image and enlarge it bilinearly to the old size."""

    #: sides of the window as a share of the image's
    share: Range = (0.8, 1.0)

    limits: ClassVar = {"share": (0.05, 1)}
    moves: ClassVar = True

    def draw(self, rng: torch.Generator) -> dict[str, float]:
        """Draw the size of the window and where it lies."""
        place = {name: uniform((0, 1), rng) for name in ("left", "top")}
        return {**super().draw(rng), **place}

    def apply(self, image: Image, *, share: float, left: float = 0.5, top: float = 0.5) -> Image:
        """Crop (B, 3, H, W); `left` and `top` run from 0, at the edge, to 1, at the other."""
        height, width = image.shape[2:]
        rows, columns = _scaled(height, share), _scaled(width, share)
        first, begin = round(top * (height - rows)), round(left * (width - columns))
        window = image[..., first : first + rows, begin : begin + columns]
        return resize(window, (height, width), "bilinear").clamp(0, 1)


@dataclass(frozen=True, init=False)
class Sequence(Transform):
    """One transform after another: `Sequence(Jpeg(), Resize())`.

    Strengths carry the place of their member: `apply(image, **{"0.quality": 75, "1.scale": 0.5})`.
    """

    members: tuple[Transform, ...]

    def __init__(self, *members: Transform) -> None:
        object.__setattr__(self, "members", members)

    def draw(self, rng: torch.Generator) -> dict[str, float]:
        """Draw for every member, in order."""
        return {
            f"{place}.{name}": value
            for place, member in enumerate(self.members)
            for name, value in member.draw(rng).items()
        }

    def apply(self, image: Image, **strengths: float) -> Image:
        """Apply every member to (B, 3, H, W)."""
        for place, member in enumerate(self.members):
            image = member.apply(image, **_of_member(strengths, place))
        return image

    def apply_mask(self, mask: Mask, **strengths: float) -> Mask:
        """Move a mask through every member."""
        for place, member in enumerate(self.members):
            mask = member.apply_mask(mask, **_of_member(strengths, place))
        return mask


def _of_member(strengths: Mapping[str, float], place: int) -> dict[str, float]:
    start = f"{place}."
    return {key[len(start) :]: strengths[key] for key in strengths if key.startswith(start)}


@dataclass(frozen=True, init=False)
class OneOf(Transform):
    """One of several transforms, drawn by weight: `OneOf(Identity(), Jpeg(), weights=(1, 3))`."""

    members: tuple[Transform, ...]
    #: how often each is drawn, of any sum
    weights: tuple[float, ...]

    def __init__(self, *members: Transform, weights: tuple[float, ...] | None = None) -> None:
        weights = tuple(weights) if weights is not None else (1.0,) * len(members)
        if len(weights) != len(members) or not sum(weights) > 0 or min(weights) < 0:
            raise ConfigError(
                f"`weights` must be {len(members)} numbers of at least 0, not all 0, got {weights}"
            )
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "weights", weights)

    def _at(self, share: float) -> int:
        """The member that lies at a share, [0, 1), of the summed weights."""
        ends = list(accumulate(self.weights))
        return min(bisect_right(ends, share * ends[-1]), len(ends) - 1)

    def draw(self, rng: torch.Generator) -> dict[str, float]:
        """Draw a member, then its strengths."""
        place = self._at(uniform((0, 1), rng))
        strengths = self.members[place].draw(rng)
        return {"member": place, **{f"{place}.{name}": strengths[name] for name in strengths}}

    def apply(self, image: Image, *, member: float, **strengths: float) -> Image:
        """Apply one member, by its place, to (B, 3, H, W)."""
        place = int(member)
        return self.members[place].apply(image, **_of_member(strengths, place))

    def apply_mask(self, mask: Mask, *, member: float, **strengths: float) -> Mask:
        """Move a mask through one member, by its place."""
        place = int(member)
        return self.members[place].apply_mask(mask, **_of_member(strengths, place))

    def stratified(self, count: int, rng: torch.Generator) -> list[Transform]:
        """Draw `count` members spread over the weights: the same mean with less variance."""
        offset = uniform((0, 1), rng)
        return [self.members[self._at((place + offset) / count)] for place in range(count)]
