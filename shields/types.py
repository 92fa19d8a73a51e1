"""The words of the toolkit as types: image, mask, perturbation, face, photo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shields.errors import ImageError

__all__ = [
    "Face",
    "Image",
    "Mask",
    "Objective",
    "Perturbation",
    "Photo",
    "Progress",
    "Step",
    "check_image",
    "check_mask",
]

#: (B, 3, H, W), float32, RGB, [0, 1]
Image = Tensor
#: (B, 1, H, W), float32, [0, 1]; 1 = may be perturbed
Mask = Tensor
#: (B, 3, H, W), float32, signed, image units: 8 levels are 8 / 255
Perturbation = Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a projected-gradient loop stands, as an objective sees it.

    `rng` lives on the CPU. Whatever an objective draws, it draws for **one** sample and shares
    with the whole batch, so that a batch gives the same result as its photos one by one.
    """

    index: int
    total: int
    rng: torch.Generator

    @property
    def fraction(self) -> float:
        """Share of the loop that is done before this step, [0, 1)."""
        return self.index / self.total


#: (image, step) -> (B,): one number a sample, larger is better, samples independent
Objective = Callable[[Image, Step], Tensor]
#: (steps done, steps in all, mean objective)
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True, kw_only=True)
class Face:
    """A detected face, in photo pixels."""

    #: left, top, right, bottom
    box: tuple[float, float, float, float]
    #: (5, 2) x, y: image-left eye, image-right eye, nose, image-left and image-right mouth corner
    landmarks: np.ndarray
    score: float


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo as read: upright, sRGB, 8 bit, full size; what is not colour is kept aside."""

    #: (H, W, 3) uint8
    pixels: np.ndarray
    #: (H, W) uint8, or None where the file has no transparency
    alpha: np.ndarray | None = None
    path: Path | None = None
    #: EXIF block with the orientation tag reset; written only when metadata is kept
    exif: bytes | None = None
    #: what reading changed, in words for the report: "rotated by EXIF", "16 bit to 8 bit", …
    notes: tuple[str, ...] = field(default=())

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[1])

    def image(self, device: torch.device | str = "cpu") -> Image:
        """Convert to (1, 3, H, W) float32; every value is k / 255."""
        tensor = torch.from_numpy(np.ascontiguousarray(self.pixels)).to(device)
        return tensor.permute(2, 0, 1)[None].float() / 255


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def check_image(image: Image, name: str = "image") -> None:
    """Raise `ImageError` unless `image` is (B, 3, H, W) float32, finite and in [0, 1].

    Example:
        >>> check_image(torch.zeros(1, 3, 8, 8))
        >>> check_image(torch.full((1, 3, 8, 8), -1.0))
        Traceback (most recent call last):
        ...
        shields.errors.ImageError: `image` must lie in [0, 1], got [-1.00, -1.00]; the ranges of
        networks are handled by `shields.models`, pass the photo as read
    """
    ok = isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == 3
    if not ok or image.dtype != torch.float32 or image.numel() == 0:
        raise ImageError(f"`{name}` must be (B, 3, H, W) float32, got {_describe(image)}")
    low, high = (float(value) for value in image.detach().aminmax())
    if not low >= 0 or not high <= 1:  # written so that NaN fails
        raise ImageError(
            f"`{name}` must lie in [0, 1], got [{low:.2f}, {high:.2f}]; the ranges of\n"
            "networks are handled by `shields.models`, pass the photo as read"
        )


def check_mask(mask: Mask, image: Image) -> None:
    """Raise `ImageError` unless `mask` is (B, 1, H, W) float32 in [0, 1] and fits `image`."""
    expected = (image.shape[0], 1, *image.shape[2:])
    ok = isinstance(mask, Tensor) and mask.shape == expected and mask.dtype == torch.float32
    if not ok:
        raise ImageError(f"`mask` must be {expected} float32, got {_describe(mask)}")
    low, high = (float(value) for value in mask.detach().aminmax())
    if not low >= 0 or not high <= 1:
        raise ImageError(f"`mask` must lie in [0, 1], got [{low:.2f}, {high:.2f}]")
