"""How far two images are apart, and what each number means, as data.

Every function takes two batches in [0, 1] and returns one number an image, (B,): averages are the
caller's, so that nothing is pooled behind his back. `photo_psnr` and `photo_ssim` do the same for
two whole photos of 8 bits, band by band, so that a large one does not fill the memory.

Source:
    PSNR and SSIM of batches: torchmetrics; SSIM with a Gaussian window of 11 pixels, sigma 1.5, on
    RGB: Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al.,
    2004), https://doi.org/10.1109/TIP.2003.819861.
    FLIP: A Difference Evaluator for Alternating Images (Andersson et al., 2020),
    https://doi.org/10.1145/3406183, by its authors' package, at its default viewing distance.
    LPIPS: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al.,
    2018), https://arxiv.org/abs/1801.03924, heads of version 0.1.

Differs:
    SSIM covers the border too (reflected, as torchmetrics does); scikit-image leaves it out, which
    moves the third digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shields.errors import ImageError, MissingPackage, WeightsError
from shields.models.base import Perceptual, Recognizer
from shields.registry import Registry, did_you_mean
from shields.types import Image, check_image

__all__ = ["METRICS", "Metric", "flip", "identity", "lpips", "max_levels", "mean_psnr", "mse",
           "photo_psnr", "photo_ssim", "psnr", "ssim"]  # fmt: skip

_WINDOW, _SIGMA = 11, 1.5
#: rows of a whole photo that are measured at once
_BAND = 64
#: backbones of LPIPS; the card `lpips-NAME` says which file each is
_BACKBONES = ("alex", "vgg", "squeeze")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number about images, and what one has to know to put it in a table."""

    name: str
    #: (image, other) -> (B,); what `needs` names follows as further arguments
    function: Callable[..., Tensor]
    #: whether it compares two images; otherwise it judges one
    pair: bool = True
    higher_is_better: bool
    #: least and greatest value it can take
    low: float
    high: float
    #: packages that are optional, and "recognizer" where one has to be passed
    needs: tuple[str, ...] = ()


def _check_pair(image: Image, other: Image) -> None:
    check_image(image)
    check_image(other, "other")
    if image.shape != other.shape:
        raise ImageError(
            f"two images of one size are compared, got {tuple(image.shape)} and "
            f"{tuple(other.shape)}; resize one of them first"
        )


def _check_window(height: int, width: int) -> None:
    if min(height, width) < _WINDOW:
        raise ImageError(
            f"SSIM looks through a window of {_WINDOW} pixels, got an image of {height}x{width}"
        )


def _optional(package: str, metric: str, install: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"the metric {metric!r} needs the package {package}: pip install {install}"
        ) from error


@torch.no_grad()
def psnr(image: Image, other: Image) -> Tensor:
    """Peak signal-to-noise ratio of each pair for a range of 1, decibels.

    Args:
        image: (B, 3, H, W), [0, 1].
        other: (B, 3, H, W), [0, 1].

    Returns:
        (B,); equal images give infinity, see `mean_psnr`.

    Example:
        >>> psnr(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.1)).round(decimals=3)
        tensor([20.])
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check_pair(image, other)
    value: Tensor = peak_signal_noise_ratio(
        image, other, data_range=1.0, dim=(1, 2, 3), reduction="none"
    )
    return value


def mean_psnr(values: Tensor) -> tuple[float, int]:
    """Average PSNR over the pairs that differ, and count those that do not.

    Args:
        values: (N,), decibels, as `psnr` returns them.

    Returns:
        The mean of the finite ones, NaN where there is none, and the number of infinite ones.

    Example:
        >>> mean_psnr(torch.tensor([30.0, 40.0, math.inf]))
        (35.0, 1)
    """
    endless = values.isposinf()
    return float(values[~endless].double().mean()), int(endless.sum())


@torch.no_grad()
def ssim(image: Image, other: Image) -> Tensor:
    """Structural similarity of each pair: RGB, Gaussian window of 11 pixels, sigma 1.5.

    Args:
        image: (B, 3, H, W), [0, 1], sides of 11 pixels or more.
        other: (B, 3, H, W), [0, 1].

    Returns:
        (B,), 1 for equal images.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(image, other)
    _check_window(*image.shape[2:])
    value = structural_similarity_index_measure(
        image, other, sigma=_SIGMA, kernel_size=_WINDOW, data_range=1.0, reduction="none"
    )
    return torch.as_tensor(value).view(len(image))


@torch.no_grad()
def mse(image: Image, other: Image) -> Tensor:
    """Mean squared difference of each pair, in squared levels, (B,): 0 to 255 squared."""
    _check_pair(image, other)
    return ((image - other) * 255).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def max_levels(image: Image, other: Image) -> Tensor:
    """Largest difference of a value of each pair, in levels, (B,): 0 to 255."""
    _check_pair(image, other)
    return (image - other).abs().amax(dim=(1, 2, 3)) * 255


@torch.no_grad()
def flip(image: Image, other: Image) -> Tensor:
    """Mean FLIP error of each pair: what flickers when the two alternate on a screen.

    Args:
        image: (B, 3, H, W), [0, 1].
        other: (B, 3, H, W), [0, 1]; the reference.

    Returns:
        (B,), 0 to 1.

    Raises:
        MissingPackage: `flip_evaluator` is not installed.
    """
    _check_pair(image, other)
    evaluator = _optional("flip_evaluator", "flip", "'shields[metrics]'")
    test, reference = (
        batch.permute(0, 2, 3, 1).contiguous().cpu().numpy() for batch in (image, other)
    )
    means = [
        evaluator.evaluate(theirs, ours, "LDR", applyMagma=False)[1]
        for ours, theirs in zip(test, reference, strict=True)
    ]
    return torch.tensor(means, dtype=torch.float32, device=image.device)


@lru_cache(maxsize=3)
def _lpips_network(backbone: str) -> Perceptual:
    from shields.models.perceptual import LpipsModel
    from shields.weights import WeightStore

    if backbone not in _BACKBONES:
        hint = did_you_mean(backbone, _BACKBONES)
        raise WeightsError(f"LPIPS has no backbone {backbone!r}; {hint}")
    store = WeightStore()
    card = store.card(f"lpips-{backbone}")
    try:
        path = store.find(card)
    except WeightsError as error:
        need = f"the metric {card.name!r} needs {card.file} from {card.url} there"
        raise WeightsError(f"{error}; {need}") from error
    return LpipsModel.load(path, card)


@torch.no_grad()
def lpips(image: Image, other: Image, backbone: str | Perceptual = "alex") -> Tensor:
    """LPIPS distance of each pair. The backbone's weights are looked for, never downloaded.

    Args:
        image: (B, 3, H, W), [0, 1], sides of 32 pixels or more.
        other: (B, 3, H, W), [0, 1].
        backbone: "alex" (as most papers), "vgg" or "squeeze", or a network that is loaded already.

    Returns:
        (B,), 0 for equal images.

    Raises:
        WeightsError: The backbone's weights are not on this machine; names file, URL and places.
        MissingPackage: `lpips` is not installed.
    """
    _check_pair(image, other)
    if not isinstance(backbone, Perceptual):
        _optional("lpips", "lpips", "lpips")
        backbone = _lpips_network(backbone).to(image.device)
    distance: Tensor = backbone(image, other)
    return distance


@torch.no_grad()
def identity(
    image: Image,
    other: Image,
    recognizer: Recognizer,
    matrix: Tensor,
    other_matrix: Tensor | None = None,
) -> Tensor:
    """Likeness of the faces of each pair: cosine of their embeddings.

    Args:
        image: (B, 3, H, W), [0, 1].
        other: (B, 3, H, W), [0, 1].
        recognizer: The network that compares; what counts as the same person is its `threshold`.
        matrix: (B, 2, 3), crop-from-image, of `image`, as `recognizer.matrix` makes it.
        other_matrix: The same of `other`; None where the face is in the same place.

    Returns:
        (B,), -1 to 1.
    """
    _check_pair(image, other)
    ours = recognizer(image, matrix)
    theirs = recognizer(other, matrix if other_matrix is None else other_matrix)
    likeness: Tensor = (ours * theirs).sum(dim=1)
    return likeness


def _check_photos(photo: np.ndarray, other: np.ndarray) -> None:
    for array in (photo, other):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise ImageError(f"a photo must be (H, W, 3) uint8, got {array.shape} {array.dtype}")
    if photo.shape != other.shape:
        raise ImageError(
            f"two photos of one size are compared, got {photo.shape} and {other.shape}"
        )


def photo_psnr(photo: np.ndarray, other: np.ndarray) -> float:
    """PSNR of two whole photos, (H, W, 3) uint8, decibels: exact, and infinity for equal ones."""
    _check_photos(photo, other)
    total = 0
    for first in range(0, len(photo), _BAND):
        band = slice(first, first + _BAND)
        gap = photo[band].astype(np.int32) - other[band]
        total += int(np.square(gap).sum(dtype=np.int64))
    return 10 * math.log10(255**2 * photo.size / total) if total else math.inf


def photo_ssim(photo: np.ndarray, other: np.ndarray) -> float:
    """SSIM of two whole photos, (H, W, 3) uint8, sides of 11 pixels or more: equals `ssim`."""
    _check_photos(photo, other)
    height = len(photo)
    _check_window(*photo.shape[:2])
    margin, total = _WINDOW // 2, 0.0
    for first in range(0, height, _BAND):
        rows = np.arange(first - margin, min(first + _BAND, height) + margin)
        rows = (height - 1) - np.abs((height - 1) - np.abs(rows))  # reflected at both ends
        total += float(_similarity(photo[rows], other[rows]).sum())
    return total / photo.size


def _similarity(first: np.ndarray, second: np.ndarray) -> Tensor:
    """The map of SSIM, (3, H - 10, W), of two bands (H, W, 3) that reach over by 5 rows."""
    x, y = (torch.from_numpy(band).permute(2, 0, 1).double() / 255 for band in (first, second))
    places = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    line = torch.exp(-0.5 * (places / _SIGMA) ** 2)
    line = (line / line.sum()).expand(15, 1, _WINDOW)
    # One depthwise call for all: one plane at a time is many times slower on a CPU.
    planes = torch.cat([x, y, x * x, y * y, x * y])[None]
    planes = functional.conv2d(planes, line[..., None], groups=15)
    planes = functional.pad(planes, (_WINDOW // 2, _WINDOW // 2, 0, 0), mode="reflect")
    planes = functional.conv2d(planes, line[:, :, None], groups=15)[0]
    mean_x, mean_y, square_x, square_y, product = planes.view(5, 3, *planes.shape[1:]).unbind()
    variances = (square_x - mean_x**2).clamp_min(0) + (square_y - mean_y**2).clamp_min(0)
    covariance = product - mean_x * mean_y
    low, high = 0.01**2, 0.03**2
    structure = (2 * covariance + high) / (variances + high)
    light = (2 * mean_x * mean_y + low) / (mean_x**2 + mean_y**2 + low)
    similarity: Tensor = light * structure
    return similarity


METRICS: Registry[Metric] = Registry("metric", {})
for _metric in (
    Metric(name="psnr", function=psnr, higher_is_better=True, low=0, high=math.inf),
    Metric(name="ssim", function=ssim, higher_is_better=True, low=-1, high=1),
    Metric(name="mse", function=mse, higher_is_better=False, low=0, high=255**2),
    Metric(name="max_levels", function=max_levels, higher_is_better=False, low=0, high=255),
    Metric(
        name="flip", function=flip, higher_is_better=False, low=0, high=1, needs=("flip_evaluator",)
    ),
    *(
        Metric(
            name=f"lpips-{backbone}",
            function=partial(lpips, backbone=backbone),
            higher_is_better=False,
            low=0,
            high=math.inf,
            needs=("lpips",),
        )
        for backbone in _BACKBONES
    ),
    Metric(
        name="identity",
        function=identity,
        higher_is_better=True,
        low=-1,
        high=1,
        needs=("recognizer",),
    ),
):
    METRICS.add(_metric.name, _metric)
