"""What a transform is, and those that sending a photo brings: JPEG, resampling, cropping.

All public names of transforms stand in `shields.transforms`; import them from there.

Source:
    Rec. ITU-T T.81 (1992), https://www.w3.org/Graphics/JPEG/itu-t81.pdf: transform and tables.
    JPEG-resistant Adversarial Images (Shin, Song, 2017): rounding replaced by a cubic.

Differs:
    The value of a compressed image is never approximated: the forward pass is the codec itself.
    What is soft is the gradient alone.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError
from shields.types import Image

__all__ = ["TO_YCC", "CompressResize", "Crop", "Identity", "Jpeg", "Kernel", "Range", "Resize",
           "Seeded", "Subsampling", "Transform", "carry", "real_jpeg", "resize", "soft_jpeg",
           "uniform"]  # fmt: skip

#: one strength, or the lowest and the highest to draw from
Range = float | tuple[float, float]
Kernel = Literal["bilinear", "bicubic", "lanczos"]
Subsampling = Literal["4:2:0", "4:4:4"]
Gradient = Literal["straight", "soft"]

#: no side is made shorter than this, pixels
_LEAST_SIDE = 16

#: threads for a batch; Pillow lets go of the interpreter while it codes
_THREADS = 8
#: JFIF: RGB -> Y, Cb, Cr (chroma about 0)
TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def _through_codec(pixels: np.ndarray, quality: int, subsampling: Subsampling) -> np.ndarray:
    """Encode and decode (H, W, 3) uint8."""
    file = io.BytesIO()
    image = PillowImage.fromarray(pixels)
    image.save(file, format="JPEG", quality=quality, subsampling=subsampling)
    with PillowImage.open(file) as decoded:
        return np.array(decoded)


@torch.no_grad()
def real_jpeg(image: Image, quality: int, subsampling: Subsampling = "4:2:0") -> Image:
    """Round to 8 bits, then encode and decode with libjpeg, on the CPU.

    Args:
        image: (B, 3, H, W), [0, 1], on any device.
        quality: libjpeg's scale, 1 to 100.
        subsampling: "4:2:0" halves the colour planes, as nearly every program does; "4:4:4" not.

    Returns:
        (B, 3, H, W), every value k / 255, without gradient, on the image's device.
    """
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    photos = list(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def work(pixels: np.ndarray) -> np.ndarray:
        return _through_codec(pixels, quality, subsampling)

    if len(photos) == 1:
        coded = [work(photos[0])]
    else:
        # Built anew each time: threads kept for later would not survive a fork (data loaders).
        with ThreadPoolExecutor(min(len(photos), _THREADS)) as pool:
            coded = list(pool.map(work, photos))
    return torch.from_numpy(np.stack(coded)).permute(0, 3, 1, 2).to(image) / 255


def soft_jpeg(image: Image, quality: int, subsampling: Subsampling = "4:2:0") -> Image:
    """Imitate the codec differentiably: rounding becomes a cubic that bends through it.

    For 4:2:0 this is `kornia.enhance.jpeg_codec_differentiable`; for 4:4:4, which it lacks, the
    same steps without the halved colour planes. About one level from the codec on photos, far
    more on noise: use the gradient, not the value.

    Args:
        image: (B, 3, H, W), [0, 1].
        quality: libjpeg's scale, 1 to 100.
        subsampling: "4:2:0" or "4:4:4".

    Returns:
        (B, 3, H, W), [0, 1]; the last clamp is a plain one.
    """
    if subsampling == "4:2:0":
        from kornia.enhance import jpeg_codec_differentiable

        coded: Tensor = jpeg_codec_differentiable(image, image.new_tensor([float(quality)]))
        return coded
    height, width = image.shape[2:]
    padded = functional.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
    to_ycc, dct = image.new_tensor(TO_YCC), _dct_matrix().to(image)
    offset = image.new_tensor([128.0, 0.0, 0.0]).view(3, 1, 1)
    planes = torch.einsum("kc,bcyx->bkyx", to_ycc, padded * 255) - offset
    blocks = planes.reshape(len(image), 3, planes.shape[2] // 8, 8, -1, 8)
    table = _tables(quality).to(image).view(3, 1, 8, 1, 8)
    scaled = torch.einsum("ua,bkyaxd,vd->bkyuxv", dct, blocks, dct) / table
    whole = scaled.detach().round()
    rounded = whole + (scaled - whole) ** 3
    blocks = torch.einsum("ua,bkyuxv,vd->bkyaxd", dct, rounded * table, dct)
    planes = blocks.flatten(4, 5).flatten(2, 3) + offset
    colours = torch.einsum("ck,bkyx->bcyx", to_ycc.inverse(), planes) / 255
    return colours[..., :height, :width].clamp(0, 1)


@lru_cache(maxsize=1)
def _dct_matrix() -> Tensor:
    """The orthonormal 8-point cosine transform, (frequency, position)."""
    positions, frequencies = torch.arange(8) + 0.5, torch.arange(8)
    matrix = torch.cos(torch.outer(frequencies, positions) * math.pi / 8) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


@lru_cache(maxsize=128)
def _tables(quality: int) -> Tensor:
    """Steps of quantisation as the codec has them at this quality: (3, 8, 8) for Y, Cb, Cr."""
    file = io.BytesIO()
    PillowImage.new("RGB", (8, 8)).save(file, format="JPEG", quality=quality)
    with PillowImage.open(file) as coded:
        tables = coded.quantization  # type: ignore[attr-defined]  # a JPEG has it, others not
    luma, chroma = (torch.tensor(tables[key], dtype=torch.float32).view(8, 8) for key in (0, 1))
    return torch.stack([luma, chroma, chroma])


class _Carry(torch.autograd.Function):
    """The first input's value with the second input's gradient."""

    @staticmethod
    def forward(_context: object, value: Tensor, _carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def carry(value: Tensor, carrier: Tensor) -> Tensor:
    """Return `value`, bit for bit, with the gradient of `carrier`.

    `carrier + (value - carrier).detach()` would do the same only up to rounding.

    Example:
        >>> x = torch.tensor([0.3], requires_grad=True)
        >>> y = carry(x.detach().round(), x * 2)
        >>> y.sum().backward()
        >>> float(y.detach()), float(x.grad)
        (0.0, 2.0)
    """
    carried: Tensor = _Carry.apply(value, carrier)
    return carried


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
    happened; "soft" is the gradient of `shields.codec.soft_jpeg` at the unrounded image.
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
    except (NotImplementedError, RuntimeError, ValueError):
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


@dataclass(frozen=True, kw_only=True)
class Crop(Transform):
    """Cut a window out of the image and enlarge it bilinearly to the old size."""

    #: sides of the window as a share of the image's
    share: Range = (0.8, 1.0)

    limits: ClassVar = {"share": (0.05, 1)}

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
