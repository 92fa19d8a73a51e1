"""Differentiable maps from image to image: what happens to a photo on its way.

Each is a frozen dataclass that holds a strength or a range of it. `transform(image, rng)` draws one
strength for the whole batch, `transform.apply(image, quality=75)` is told. The shape of the image
is kept, and so is [0, 1]: what may overshoot is clamped plainly, so a pixel that is pushed past an
end of the range has gradient zero there. `transform.with_mask(image, mask, rng)`
moves a mask along.

Example:
    >>> rng = torch.Generator().manual_seed(0)
    >>> image = torch.rand(1, 3, 32, 32, generator=rng)
    >>> parse("jpeg:60..90+resize:0.5")(image, rng).shape
    torch.Size([1, 3, 32, 32])
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from shields.codec import (
    TO_YCC,
    CompressResize,
    Crop,
    Identity,
    Jpeg,
    OneOf,
    Range,
    Resize,
    Seeded,
    Sequence,
    Transform,
    resize,
)
from shields.errors import ConfigError
from shields.registry import Registry, did_you_mean
from shields.types import Image

__all__ = ["ROBUST", "TRANSFORMS", "AffineJitter", "ColorJitter", "CompressResize", "Contrast",
           "Crop", "Drop", "GaussianBlur", "Identity", "Jpeg", "Noise", "OneOf", "Range", "Resize",
           "Rotate", "Saturation", "Sequence", "Transform", "parse", "resize"]  # fmt: skip

Fill = Literal["median", "mean", "zero"]


@dataclass(frozen=True, kw_only=True)
class GaussianBlur(Transform):
    """A Gaussian window over the reflected image, as torchvision's `gaussian_blur`."""

    #: standard deviation, pixels
    sigma: Range = 1.5
    #: side of the window, odd, pixels; 0 = three sigma to each side
    window: int = 5

    limits: ClassVar = {"sigma": (0.05, 64)}

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = type(self.window) is int and self.window >= 0
        if not whole or (self.window and self.window % 2 == 0):
            raise ConfigError(f"`window` must be 0 or odd (pixels), got {self.window!r}")

    def apply(self, image: Image, *, sigma: float) -> Image:
        """Blur (B, 3, H, W) by a standard deviation in pixels."""
        window = self.window or 2 * math.ceil(3 * sigma) + 1
        # Reflection has nothing to offer beyond the image's own length.
        radius = min(window // 2, min(image.shape[2:]) - 1)
        line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        line = (line / line.sum()).to(image).expand(3, 1, -1)
        padded = functional.pad(image, (radius,) * 4, mode="reflect")
        blurred = functional.conv2d(padded, line[:, :, None], groups=3)
        return functional.conv2d(blurred, line[..., None], groups=3).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Noise(Seeded):
    """White Gaussian noise, the same field for every image of a batch."""

    #: standard deviation, levels
    levels: Range = 4.0

    limits: ClassVar = {"levels": (0, 255)}

    def apply(self, image: Image, *, levels: float, seed: float = 0) -> Image:
        """Add noise to (B, 3, H, W)."""
        rng = torch.Generator().manual_seed(int(seed))
        field = torch.randn(image.shape[1:], generator=rng).to(image)
        return (image + field * (levels / 255)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Drop(Seeded):
    """Lose pixel positions, all channels of each, and fill the holes.

    "median" and "mean" are taken over the kept ones of the 3x3 neighbours, or, where none is
    left, over everything kept; "zero" is black. Gradients reach the kept pixels only.
    """

    #: share of the positions that is lost
    ratio: Range = 0.1
    fill: Fill = "median"

    limits: ClassVar = {"ratio": (0, 0.95)}
    choices: ClassVar = {"fill": Fill}

    def apply(self, image: Image, *, ratio: float, seed: float = 0) -> Image:
        """Drop a share of the positions of (B, 3, H, W)."""
        rng = torch.Generator().manual_seed(int(seed))
        lost = (torch.rand(image.shape[2:], generator=rng) < ratio).to(image.device)
        if self.fill == "zero" or not lost.any() or lost.all():
            return image.masked_fill(lost, 0)
        # Lost pixels and the world outside are NaN, so that the NaN-aware statistics skip them.
        kept = functional.pad(image.masked_fill(lost, math.nan), (1,) * 4, value=math.nan)
        around = functional.unfold(kept, 3)[..., lost.flatten()].view(len(image), 3, 9, -1)
        near = around.nanmedian(dim=2).values if self.fill == "median" else around.nanmean(dim=2)
        everywhere = image[..., ~lost].mean(dim=2, keepdim=True)
        filled = image.clone()
        filled[..., lost] = torch.where(near.isnan(), everywhere, near)
        return filled


def _sample(image: Image, matrix: Tensor, padding: Literal["zeros", "border"]) -> Image:
    """Look up (2, 3) `matrix` times each place, both in shares of half the image's sides."""
    theta = matrix.to(image).expand(len(image), 2, 3)
    grid = functional.affine_grid(theta, list(image.shape), align_corners=False)
    sampled = functional.grid_sample(
        image, grid, mode="bilinear", padding_mode=padding, align_corners=False
    )
    return sampled.clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Rotate(Transform):
    """Rotate about the centre: bilinear, black corners, same canvas, not rotated back."""

    #: counter-clockwise
    degrees: Range = (-10.0, 10.0)

    limits: ClassVar = {"degrees": (-360, 360)}
    moves: ClassVar = True

    def apply(self, image: Image, *, degrees: float) -> Image:
        """Rotate (B, 3, H, W) counter-clockwise."""
        height, width = image.shape[2:]
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        rows = [[cosine, -sine * height / width, 0], [sine * width / height, cosine, 0]]
        return _sample(image, torch.tensor(rows), "zeros")


@dataclass(frozen=True, kw_only=True)
class AffineJitter(Seeded):
    """A small random affine map: a face that is aligned a little differently.

    Each of the six numbers of the map, in units of half the sides, is off by a Gaussian; the
    border is repeated outward.
    """

    #: standard deviation; 0.02 moves a corner of a 256-pixel image by some four pixels
    sigma: Range = 0.02

    limits: ClassVar = {"sigma": (0, 0.2)}
    moves: ClassVar = True

    def apply(self, image: Image, *, sigma: float, seed: float = 0) -> Image:
        """Move (B, 3, H, W)."""
        rng = torch.Generator().manual_seed(int(seed))
        return _sample(image, torch.eye(2, 3) + sigma * torch.randn(2, 3, generator=rng), "border")


def _turn_hue(image: Image, turns: float) -> Image:
    """Rotate colours about grey, luma kept."""
    cosine, sine = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    to_ycc = torch.tensor(TO_YCC, dtype=torch.float64)
    rotation = torch.tensor([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]).to(to_ycc)
    matrix = (to_ycc.inverse() @ rotation @ to_ycc).to(image)
    return torch.einsum("kc,bcyx->bkyx", matrix, image)


@dataclass(frozen=True, kw_only=True)
class Saturation(Transform):
    """Scale the colour about grey, brightness kept: 0 is grey, 1 leaves the image alone."""

    factor: Range = 0.6

    limits: ClassVar = {"factor": (0, 8)}

    def apply(self, image: Image, *, factor: float) -> Image:
        """Scale the chroma of (B, 3, H, W)."""
        grey = torch.einsum("c,bcyx->byx", image.new_tensor(TO_YCC[0]), image)[:, None]
        return (grey + factor * (image - grey)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Contrast(Transform):
    """Scale every value about the mean of its image: 0 is flat, 1 leaves the image alone."""

    factor: Range = 0.6

    limits: ClassVar = {"factor": (0, 8)}

    def apply(self, image: Image, *, factor: float) -> Image:
        """Scale the contrast of (B, 3, H, W)."""
        mean = image.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + factor * (image - mean)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue, in this order, each at its own strength.

    Differs:
        torchvision's turns the hue in HSV, which has corners; here colours turn about grey.
    """

    #: factor on every value
    brightness: Range = (0.8, 1.2)
    #: factor about the image's mean
    contrast: Range = (0.8, 1.2)
    #: factor about grey
    saturation: Range = (0.8, 1.2)
    #: turns of the colour circle
    hue: Range = (-0.05, 0.05)

    limits: ClassVar = {
        **dict.fromkeys(("brightness", "contrast", "saturation"), (0, 8)),
        "hue": (-0.5, 0.5),
    }

    def apply(
        self, image: Image, *, brightness: float, contrast: float, saturation: float, hue: float
    ) -> Image:
        """Change the colours of (B, 3, H, W)."""
        image = (image * brightness).clamp(0, 1)
        image = Contrast().apply(image, factor=contrast)
        image = Saturation().apply(image, factor=saturation)
        return _turn_hue(image, hue).clamp(0, 1)


def _value(text: str) -> float | str | tuple[float, ...]:
    """Read `3`, `0.5`, `60..90`, `true` or a word."""
    if text in {"true", "false"}:
        return text == "true"
    try:
        ends = tuple(int(end) if end.isdigit() else float(end) for end in text.split(".."))
    except ValueError:
        return text
    return ends[0] if len(ends) == 1 else ends


def _parse_one(text: str) -> Transform:
    name, _, settings = text.strip().partition(":")
    kind = TRANSFORMS[name]
    fields = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.strip().rpartition("=")
        key = key if equals else next(iter(fields), "strength")
        if key not in fields:
            raise ConfigError(f"{name} has no setting {key!r}; {did_you_mean(key, fields)}")
        values[key] = _value(value)
    return kind(**values)


def parse(text: str) -> Transform:
    """Read a transform such as "jpeg:75+resize:0.5", one after another.

    Args:
        text: `name`, `name:strength` or `name:low..high`, more settings after commas as
            `resize:0.5,kernel=bicubic`; joined by `+`.

    Raises:
        UnknownName: No transform has that name.
        ConfigError: A setting that the transform does not have, or a value out of its limits.

    Example:
        >>> parse("blur:0.5..1.5")
        GaussianBlur(sigma=(0.5, 1.5), window=5)
    """
    members = [_parse_one(part) for part in text.split("+")]
    return members[0] if len(members) == 1 else Sequence(*members)


TRANSFORMS: Registry[type[Transform]] = Registry(
    "transform",
    {
        "identity": "shields.transforms:Identity",
        "jpeg": "shields.transforms:Jpeg",
        "resize": "shields.transforms:Resize",
        "cr": "shields.transforms:CompressResize",
        "blur": "shields.transforms:GaussianBlur",
        "noise": "shields.transforms:Noise",
        "drop": "shields.transforms:Drop",
        "rotate": "shields.transforms:Rotate",
        "crop": "shields.transforms:Crop",
        "affine": "shields.transforms:AffineJitter",
        "jitter": "shields.transforms:ColorJitter",
        "saturation": "shields.transforms:Saturation",
        "contrast": "shields.transforms:Contrast",
    },
)

#: what `--robust` averages over: everyday handling, a quarter of it none
ROBUST = OneOf(
    Identity(),
    Resize(scale=0.5),
    Jpeg(quality=(60, 90)),
    CompressResize(),
    GaussianBlur(sigma=(0.5, 1.5)),
    weights=(0.25, 0.15, 0.25, 0.25, 0.1),
)
