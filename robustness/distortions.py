"""Attacks on 8-bit pixels that are no codec: blur, geometry, colour, lost pixels, screenshots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageEnhance

from robustness.attacks import Attack, encoded, resized, scaled
from shields.errors import ConfigError
from shields.jpeg import TO_YCC

__all__ = ["Blur", "Contrast", "Crop", "DesktopScreenshot", "Downscale", "Drop", "Jitter",
           "PhoneScreenshot", "Rotate", "Saturation", "Screenshot"]  # fmt: skip

Fill = Literal["median", "black"]


def _rounded(values: np.ndarray) -> np.ndarray:
    """Levels as 8-bit values; what leaves the range is clipped, it does not wrap."""
    return values.round().clip(0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Blur(Attack):
    """A Gaussian window over the reflected photo, in floating point, rounded once."""

    name = "blur"

    #: standard deviation, pixels; 0 = a sixth of the window
    sigma: float = 1.5
    #: side of the window, odd, pixels
    window: int = 5

    limits: ClassVar = {"sigma": (0, 64), "window": (1, 385)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window % 2 == 0:
            raise ConfigError(f"`window` of Blur must be odd (pixels), got {self.window}")

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Reflection has nothing to offer beyond the photo's own length.
        radius = min(self.window // 2, min(pixels.shape[:2]) - 1)
        places = np.arange(-radius, radius + 1)
        line = np.exp(-0.5 * (places / (self.sigma or self.window / 6)) ** 2)
        line /= line.sum()
        values = pixels.astype(np.float32)
        for axis in (0, 1):
            length = values.shape[axis]
            around = [(radius, radius) if other == axis else (0, 0) for other in range(3)]
            padded = np.pad(values, around, mode="reflect")
            values = np.zeros_like(values)
            for start, weight in enumerate(line.astype(np.float32)):
                values += weight * np.take(padded, range(start, start + length), axis)
        return _rounded(values)


@dataclass(frozen=True, kw_only=True)
class Downscale(Attack):
    """Shrink by Pillow's bilinear filter, widened, and enlarge by the same: pixelation."""

    name = "downscale"

    #: both sides are divided by this
    factor: float = 2.0

    limits: ClassVar = {"factor": (1, 64)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        size = scaled(height, 1 / self.factor), scaled(width, 1 / self.factor)
        return resized(resized(pixels, size, "bilinear"), (height, width), "bilinear")


@dataclass(frozen=True, kw_only=True)
class Rotate(Attack):
    """Rotate by a drawn angle: bilinear, black corners, same canvas, not rotated back.

    Source:
        FaceLock, Table 3, draws within 10 degrees; all else is not said there.
    """

    name = "rotate"

    #: the angle is uniform between minus this and this
    degrees: float = 10.0

    limits: ClassVar = {"degrees": (0, 180)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        angle = rng.uniform(-self.degrees, self.degrees)
        turned = PillowImage.fromarray(pixels).rotate(angle, PillowImage.Resampling.BILINEAR)
        return np.asarray(turned)


@dataclass(frozen=True, kw_only=True)
class Crop(Attack):
    """Cut out a window at a drawn place; it stays small unless `restore` is on."""

    name = "crop"

    #: sides of the window as a share of the photo's
    share: float = 0.9
    #: enlarge the window to the old size by Lanczos
    restore: bool = False

    limits: ClassVar = {"share": (0.05, 1)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        rows, columns = scaled(height, self.share), scaled(width, self.share)
        top = int(rng.integers(height - rows + 1))
        left = int(rng.integers(width - columns + 1))
        window = pixels[top : top + rows, left : left + columns]
        return resized(window, (height, width)) if self.restore else window


@dataclass(frozen=True, kw_only=True)
class Jitter(Attack):
    """Brightness, contrast, saturation and hue, in this order, each off by a drawn amount.

    The first three are Pillow's `ImageEnhance`: factors on every value, about the mean grey, and
    about each pixel's grey. The hue turns in Pillow's 8-bit HSV. Each step rounds.

    Source:
        FaceLock, Table A6, names the attack and no numbers; these are ours.
    """

    name = "jitter"

    #: factors are uniform between 1 minus this and 1 plus this
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    #: turns of the colour circle, to either side
    hue: float = 0.05

    limits: ClassVar = {
        **dict.fromkeys(("brightness", "contrast", "saturation"), (0, 1)),
        "hue": (0, 0.5),
    }

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = PillowImage.fromarray(pixels)
        steps = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        )
        for enhance, reach in steps:
            image = enhance(image).enhance(rng.uniform(1 - reach, 1 + reach))
        turn = round(256 * rng.uniform(-self.hue, self.hue))
        if turn == 0:
            return np.asarray(image)
        hue, *others = image.convert("HSV").split()
        turned = hue.point([(level + turn) % 256 for level in range(256)])
        return np.asarray(PillowImage.merge("HSV", (turned, *others)).convert("RGB"))


@dataclass(frozen=True, kw_only=True)
class Saturation(Attack):
    """Scale the colour about each pixel's grey, the luma of JPEG files: 0 is grey."""

    name = "saturation"

    factor: float = 0.6

    limits: ClassVar = {"factor": (0, 8)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        grey = (pixels @ np.array(TO_YCC[0]))[..., None]
        return _rounded(grey + self.factor * (pixels - grey))


@dataclass(frozen=True, kw_only=True)
class Contrast(Attack):
    """Scale every value about the photo's mean, one number for all colours, or about black."""

    name = "contrast"

    factor: float = 0.6
    #: "black" darkens: so DeeperForensics-1.0 understands the word
    about: Literal["mean", "black"] = "mean"

    limits: ClassVar = {"factor": (0, 8)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        centre = pixels.mean() if self.about == "mean" else 0.0
        return _rounded(centre + self.factor * (pixels - centre))


@dataclass(frozen=True, kw_only=True)
class Drop(Attack):
    """Lose drawn pixel positions, all colours of each, and fill the holes.

    "median" takes that of the kept ones among the eight neighbours, or, where none is left, the
    mean of all that is kept; "black" leaves holes.

    Differs:
        ARS fills with the clean photo's pixels, which nobody has who handles a protected one.
    """

    name = "drop"

    #: share of the positions that is lost
    ratio: float = 0.1
    fill: Fill = "median"

    limits: ClassVar = {"ratio": (0, 0.95)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        lost = rng.random((height, width)) < self.ratio
        filled = pixels.copy()
        if self.fill == "black" or not lost.any() or lost.all():
            filled[lost] = 0
            return filled
        # NaN marks lost pixels and the world outside, for the median to pass over.
        kept = np.pad(np.where(lost[..., None], np.nan, pixels), ((1, 1), (1, 1), (0, 0)),
                      constant_values=np.nan)  # fmt: skip
        rows, columns = np.nonzero(lost)
        near = np.stack(
            [kept[rows + down, columns + right] for down in range(3) for right in range(3)]
        )
        # NaN sorts to the end; this is `nanmedian`, ten times as fast.
        near.sort(axis=0)
        count = 9 - np.isnan(near).sum(axis=0, keepdims=True)
        lower, upper = (
            np.take_along_axis(near, np.maximum(place, 0), axis=0)
            for place in ((count - 1) // 2, count // 2)
        )
        median = np.where(count > 0, (lower + upper) / 2, pixels[~lost].mean(axis=0))
        filled[lost] = _rounded(median[0])
        return filled


@dataclass(frozen=True, kw_only=True)
class Screenshot(Attack):
    """Show a photo at another size and photograph the screen's memory: scale, then recompress.

    The picture is scaled bilinearly as browsers do and lies off the screen's grid by a drawn part
    of a pixel, so a row and a column are lost; then it is saved. The levels are ours.
    """

    name = "screenshot"

    #: new sides as a share of the old
    scale: float = 0.75
    #: JPEG at this quality, 4:2:0; 0 = saved without loss, as PNG
    quality: int = 90

    limits: ClassVar = {"scale": (0.1, 8), "quality": (0, 100)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        rows, columns = math.floor(height * self.scale), math.floor(width * self.scale)
        rows, columns = max(rows - 1, 1), max(columns - 1, 1)
        # One pixel of the screen is so much of the photo.
        across, down = width / (columns + 1), height / (rows + 1)
        left, top = rng.uniform(0, 1, 2) * (across, down)
        box = (left, top, left + columns * across, top + rows * down)
        image = PillowImage.fromarray(pixels)
        shown = image.resize((columns, rows), PillowImage.Resampling.BILINEAR, box)
        shot = np.asarray(shown)
        return encoded(shot, "JPEG", quality=self.quality) if self.quality else shot


@dataclass(frozen=True, kw_only=True)
class DesktopScreenshot(Screenshot):
    """A screenshot on a computer: three quarters of the size, saved as PNG."""

    name = "screenshot-desktop"

    quality: int = 0


@dataclass(frozen=True, kw_only=True)
class PhoneScreenshot(Screenshot):
    """A screenshot on a phone: one and a half times the size, saved as JPEG 90."""

    name = "screenshot-phone"

    scale: float = 1.5
