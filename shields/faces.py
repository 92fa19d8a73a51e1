"""Face geometry: align and crop (differentiably), put a perturbation back where it came from.

Coordinates are x, y in pixels whose centres are integers, as in OpenCV and in face detectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError, ImageError
from shields.types import Face, Image, Mask, Perturbation, Photo

__all__ = [
    "Placement",
    "alignment",
    "crop",
    "landmarks_in",
    "paste",
    "place",
    "similarity",
    "warp",
]

#: sides of working images are multiples of this, and none is shorter than `_LEAST_SIDE`
_MULTIPLE = 8
_LEAST_SIDE = 64
#: share of a side over which the mask fades at an edge inside the photo
_FEATHER = 1 / 16


@dataclass(frozen=True)
class Placement:
    """An integer rectangle of a photo, and the size at which it is worked on.

    Example:
        >>> Placement(10, 20, 300, 200, size=(64, 96)).region
        (slice(20, 220, None), slice(10, 310, None))
    """

    #: pixels of the photo
    left: int
    top: int
    width: int
    height: int
    #: height and width of the working image, pixels
    size: tuple[int, int]

    @property
    def region(self) -> tuple[slice, slice]:
        """Rows and columns of the photo: `photo.pixels[placement.region]`."""
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Fit rotation, uniform scale and shift, without reflection, by least squares.

    In the plane such a map is [[a, -b], [b, a]] plus a shift and linear in its unknowns, so the
    optimum has a closed form.

    Args:
        source: (B, N, 2) x, y, pixels.
        target: (N, 2) or (B, N, 2), pixels.

    Returns:
        (B, 2, 3), maps source pixels to target pixels; NaN where `source` is.

    Raises:
        ImageError: All points of a source coincide.

    Source:
        Least-squares estimation of transformation parameters between two point patterns
        (Umeyama, 1991), https://doi.org/10.1109/34.88573.
    """
    target = target.to(source).expand_as(source)
    centre, target_centre = source.mean(dim=1), target.mean(dim=1)
    start, end = source - centre[:, None], target - target_centre[:, None]
    spread = start.square().sum(dim=(1, 2))
    if bool((spread == 0).any()):
        raise ImageError("landmarks must not all coincide; leave them out where there is no face")
    a = (start * end).sum(dim=(1, 2)) / spread
    b = (start[..., 0] * end[..., 1] - start[..., 1] * end[..., 0]).sum(dim=1) / spread
    linear = torch.stack([torch.stack([a, -b], dim=-1), torch.stack([b, a], dim=-1)], dim=1)
    # no matrix product here or below: autocast would round coordinates to 8 bits
    shift = target_centre - (linear * centre[:, None]).sum(dim=2)
    return torch.cat([linear, shift[..., None]], dim=2)


def alignment(
    landmarks: Tensor | None, image: Image, template: Tensor, crop_size: tuple[int, int]
) -> Tensor:
    """Map each image to a recognizer's crop.

    Args:
        landmarks: (B, 5, 2) x, y, pixels of `image`; None, or NaN in a row, where there are none:
            then the whole image is squeezed into the crop.
        image: (B, 3, H, W).
        template: (5, 2) x, y of the landmarks in the crop.
        crop_size: Height and width of the crop.

    Returns:
        (B, 2, 3), crop-from-image, on the image's device.
    """
    (height, width), (crop_height, crop_width) = image.shape[2:], crop_size
    x, y = crop_width / width, crop_height / height
    squeezed = image.new_tensor([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2]])
    squeezed = squeezed.repeat(len(image), 1, 1)
    if landmarks is None:
        return squeezed
    landmarks, template = landmarks.to(image), template.to(image)
    known = landmarks.isfinite().all(dim=2).all(dim=1)[:, None, None]
    # any proper points in place of the unknown ones, so that no NaN enters the arithmetic
    fitted = similarity(torch.where(known, landmarks, template), template)
    return torch.where(known, fitted, squeezed)


def warp(image: Image, matrix: Tensor, size: tuple[int, int]) -> Image:
    """Warp images by affine maps: bilinear, differentiable, 0 outside.

    An image that shrinks by 2 or more is first reduced by a power of 2 with antialiasing.

    Args:
        image: (B, 3, H, W); half precision is warped in float32.
        matrix: (B, 2, 3), crop-from-image. One that lies on the CPU spares a GPU a wait.
        size: Height and width of the result.

    Returns:
        (B, 3, *size).
    """
    if torch.finfo(image.dtype).bits < 32:  # what a network gives under autocast
        image = image.float()  # the coordinates below take its type, and need more than 8 bits
    halvings = _halvings(matrix)
    grid = _grid(matrix.to(image), image.shape[2:], size)
    if len(set(halvings)) == 1:
        return _sample(image, grid, halvings[0])
    samples = (
        _sample(image[index : index + 1], grid[index : index + 1], own)
        for index, own in enumerate(halvings)
    )
    return torch.cat(list(samples))


def _halvings(matrix: Tensor) -> list[tuple[int, int]]:
    """How often each image can be halved, down and across, before the warp would enlarge it."""
    # a column of the map says how many pixels of the crop one pixel of the image covers
    scales = matrix.detach()[:, :, :2].norm(dim=1).clamp_min(1e-6)
    across_down = (1e-4 - scales.log2()).floor().clamp_min(0).int().tolist()
    return [(down, across) for across, down in across_down]


def _grid(matrix: Tensor, image_size: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Where in the image, as [-1, 1] from edge to edge, each pixel of the crop lies: (B, h, w, 2).

    Such coordinates stay true when the image is reduced.
    """
    a, b, c, d, e, f = (value[:, None, None] for value in matrix.flatten(1).unbind(dim=1))
    y = torch.arange(size[0], device=matrix.device, dtype=matrix.dtype)[:, None] - f
    x = torch.arange(size[1], device=matrix.device, dtype=matrix.dtype) - c
    determinant = a * e - b * d
    across = (e * x - b * y) / determinant
    down = (a * y - d * x) / determinant
    height, width = image_size
    return torch.stack([(2 * across + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)


def _sample(image: Image, grid: Tensor, halvings: tuple[int, int]) -> Image:
    if any(halvings):
        height, width = (max(1, s >> n) for s, n in zip(image.shape[2:], halvings, strict=True))
        image = _resize(image, (height, width))
    return functional.grid_sample(image, grid, mode="bilinear", align_corners=False)


def _resize(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, antialiased where it shrinks: weights are positive and sum to 1."""
    shrinks = size[0] < tensor.shape[2] or size[1] < tensor.shape[3]
    return functional.interpolate(
        tensor, size, mode="bilinear", align_corners=False, antialias=shrinks
    )


def place(face: Face | None, photo: Photo, *, margin: float = 2.0, size: int = 256) -> Placement:
    """Choose the rectangle to protect and the size at which to work on it.

    Args:
        face: The rectangle is a square around its box, cut at the photo's border; the whole photo
            without one.
        photo: The photo.
        margin: Side of the square, in longer sides of the face's box.
        size: Longer side of the working image, pixels. The aspect is kept up to multiples of 8; no
            side is enlarged, except to 64 pixels. A rectangle that is not larger than this is
            widened to blocks of 8 and taken as it is.

    Raises:
        ConfigError: A margin or size that makes no sense.
        ImageError: The face lies outside the photo.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ConfigError(f"`margin` must be above 0, got {margin}")
    if size < _LEAST_SIDE or size % _MULTIPLE:
        raise ConfigError(f"`size` must be {_LEAST_SIDE} or more, in steps of 8, got {size}")
    left, top, right, bottom = (0, 0, photo.width, photo.height)
    if face is not None:
        x, y = (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2
        reach = margin * max(face.box[2] - face.box[0], face.box[3] - face.box[1]) / 2
        left, top = max(0, math.floor(x - reach)), max(0, math.floor(y - reach))
        right = min(photo.width, math.ceil(x + reach))
        bottom = min(photo.height, math.ceil(y + reach))
    width, height = right - left, bottom - top
    if width < 1 or height < 1:
        raise ImageError(
            f"the face {face and face.box} lies outside the photo of {photo.width}x{photo.height}; "
            "was it found in another photo?"
        )
    if face is not None and max(width, height) <= size and min(width, height) >= _LEAST_SIDE:
        # No resampling then: whole blocks of 8, on the grid that codecs and autoencoders start from
        # the photo's corner.
        left, right = _blocks(left, right, photo.width)
        top, bottom = _blocks(top, bottom, photo.height)
        width, height = right - left, bottom - top
    scale = min(1.0, size / max(width, height))
    working = (_working_side(height, scale), _working_side(width, scale))
    return Placement(left, top, width, height, size=working)


def _blocks(low: int, high: int, end: int) -> tuple[int, int]:
    """Widen [low, high) to multiples of 8, as far as whole ones lie before `end`."""
    outer = math.ceil(high / _MULTIPLE) * _MULTIPLE
    return low // _MULTIPLE * _MULTIPLE, min(outer, end // _MULTIPLE * _MULTIPLE)


def _working_side(side: int, scale: float) -> int:
    return max(_LEAST_SIDE, round(side * scale / _MULTIPLE) * _MULTIPLE)


def crop(
    photo: Photo, placement: Placement, device: torch.device | str = "cpu"
) -> tuple[Image, Mask]:
    """Cut a placement out of a photo, at its working size.

    Resampling is Lanczos on 8 bits, as by the programs that will handle the photo; the photo never
    becomes float as a whole.

    Returns:
        Image (1, 3, h, w), every value k / 255, and mask (1, 1, h, w): 1, but fading to 0 at edges
        that lie inside the photo, so that the perturbation has no seam.
    """
    height, width = placement.size
    region = PillowImage.fromarray(np.ascontiguousarray(photo.pixels[placement.region]))
    if region.size != (width, height):
        region = region.resize((width, height), PillowImage.Resampling.LANCZOS)
    image = torch.from_numpy(np.array(region)).to(device).permute(2, 0, 1)[None].float() / 255
    down = _fade(height, placement.top, photo.height - placement.top - placement.height)
    across = _fade(width, placement.left, photo.width - placement.left - placement.width)
    mask = down[:, None] * across
    return image.contiguous(), mask[None, None].to(device)


def _fade(count: int, before: int, after: int) -> Tensor:
    """Raised cosines from about 0 to 1 at the ends that have photo before or after them."""
    ramp = ((torch.arange(count) + 0.5) / (count * _FEATHER)).clamp_max(1)
    ramp = (ramp * math.pi / 2).sin().square()
    start = ramp if before > 0 else torch.ones(count)
    return start * ramp.flip(0) if after > 0 else start


def paste(perturbation: Perturbation, placement: Placement) -> Perturbation:
    """Resize a perturbation from the working size to the rectangle in the photo.

    Bilinear, because kernels with negative lobes overshoot the budget.

    Args:
        perturbation: (1, 3, *placement.size), image units.
        placement: Where it came from.

    Returns:
        (1, 3, placement.height, placement.width), nowhere larger than the greatest input value.
    """
    if perturbation.shape[2:] == (placement.height, placement.width):
        return perturbation
    bound = float(perturbation.detach().abs().max())
    # the weights sum to 1 only up to rounding
    return _resize(perturbation, (placement.height, placement.width)).clamp_(-bound, bound)


def landmarks_in(face: Face, placement: Placement) -> Tensor:
    """Landmarks of a face in pixels of the working image: (1, 5, 2) float32."""
    height, width = placement.size
    scale = np.array([width / placement.width, height / placement.height])
    corner = np.array([placement.left, placement.top])
    points = (np.asarray(face.landmarks, dtype=np.float64) - corner + 0.5) * scale - 0.5
    return torch.from_numpy(points[None]).float()
