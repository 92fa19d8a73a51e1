"""BRISQUE: how natural an image looks, told from the statistics of its local contrast.

Source:
    No-Reference Image Quality Assessment in the Spatial Domain (Mittal, Moorthy, Bovik, 2012),
    https://doi.org/10.1109/TIP.2012.2214050: 36 features, and a regression that its authors
    publish as two text files, `allmodel` and `allrange`, with their program,
    http://live.ece.utexas.edu/research/quality/BRISQUE_release.zip.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from shields.codec import resize
from shields.errors import WeightsError
from shields.types import Image

__all__ = ["Halving", "Regression", "contrast_features"]

#: "antialiased" as the authors' program, "plain" as those that halve with OpenCV
Halving = Literal["antialiased", "plain"]

_WINDOW, _SIGMA = 7, 7 / 6
_LUMA = (0.2989, 0.5870, 0.1140)
#: (down, right) neighbours whose products are looked at
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))
_FEATURES = 36


@torch.no_grad()
def contrast_features(image: Image, halving: Halving = "antialiased") -> Tensor:
    """The 36 features, (B, 36) float64: 18 at the image's size and 18 at half of it.

    Args:
        image: (B, 3, H, W), [0, 1].
        halving: How the image is halved, a cubic either way.

    Returns:
        Shape and variance of the local contrast; then for its products with the right, lower and
        both diagonal neighbours shape, mean, left and right variance. NaN where an image is flat.
    """
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=image.device).view(3, 1, 1)
    grey = (image.double() * 255 * weights).sum(dim=1, keepdim=True).round()
    if halving == "antialiased":
        half = resize(grey, _halved(grey), "bicubic")
    else:
        half = functional.interpolate(grey, _halved(grey), mode="bicubic", align_corners=False)
    return torch.cat([_of_one_size(grey), _of_one_size(half)], dim=1)


def _halved(grey: Tensor) -> tuple[int, int]:
    return (grey.shape[2] + 1) // 2, (grey.shape[3] + 1) // 2


def _of_one_size(grey: Tensor) -> Tensor:
    """(B, 1, H, W), levels -> (B, 18)."""
    places = torch.arange(_WINDOW, dtype=grey.dtype, device=grey.device) - _WINDOW // 2
    line = torch.exp(-0.5 * (places / _SIGMA) ** 2)
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    # zeros around the image, and neighbours across its edges, as in the authors' program
    mean = functional.conv2d(grey, window, padding=_WINDOW // 2)
    square = functional.conv2d(grey.square(), window, padding=_WINDOW // 2)
    contrast = (grey - mean) / ((square - mean.square()).abs().sqrt() + 1)
    features = [*_symmetric(contrast.flatten(1))]
    for shift in _NEIGHBOURS:
        features += _asymmetric((contrast * contrast.roll(shift, dims=(2, 3))).flatten(1))
    return torch.stack(features, dim=1)


@cache
def _shapes() -> tuple[Tensor, Tensor]:
    """Candidates of a generalised Gaussian's shape, and mean square over squared mean modulus."""
    shape = torch.arange(200, 10001, dtype=torch.float64) / 1000
    ratio = torch.lgamma(1 / shape) + torch.lgamma(3 / shape) - 2 * torch.lgamma(2 / shape)
    return shape, ratio.exp()


def _nearest_shape(ratios: Tensor, wanted: Tensor) -> Tensor:
    gap = (wanted.cpu()[:, None] - ratios).abs()
    return _shapes()[0][gap.argmin(dim=1)].to(wanted).where(wanted.isfinite(), torch.nan)


def _symmetric(values: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and variance of a generalised Gaussian that has the moments of (B, N)."""
    variance = values.square().mean(dim=1)
    wanted = variance / values.abs().mean(dim=1).square()
    return _nearest_shape(_shapes()[1], wanted), variance


def _asymmetric(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape, mean, left and right variance of an asymmetric one."""
    square = values.square()
    left, right = (
        (square * side).sum(dim=1) / side.sum(dim=1) for side in (values < 0, values > 0)
    )
    tilt = (left / right).sqrt()
    flat = values.abs().mean(dim=1).square() / square.mean(dim=1)
    wanted = flat * (tilt**3 + 1) * (tilt + 1) / (tilt**2 + 1).square()
    shape = _nearest_shape(1 / _shapes()[1], wanted)
    first, second, third = (torch.lgamma(order / shape) for order in (1, 2, 3))
    mean = (right.sqrt() - left.sqrt()) * (second - first + (first - third) / 2).exp()
    return shape, mean, left, right


@dataclass(frozen=True, kw_only=True, eq=False)
class Regression:
    """A support vector regression with Gaussian kernel, and the ranges its inputs are scaled by."""

    #: (N, 36), scaled
    vectors: Tensor
    #: (N,)
    weights: Tensor
    gamma: float
    rho: float
    #: (36,), what is scaled to -1 and to 1
    low: Tensor
    high: Tensor

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `allmodel` and `allrange`, LIBSVM's text.

        Raises:
            WeightsError: One is absent or damaged, or is no such regression of 36 features.
        """
        try:
            model = (folder / "allmodel").read_text(encoding="ascii")
            ranges = (folder / "allrange").read_text(encoding="ascii")
            return cls.parse(model, ranges)
        except (OSError, LookupError, ValueError) as error:
            raise WeightsError(
                f"{folder} holds no regression of BRISQUE's ({type(error).__name__}: {error}); "
                "`allmodel` and `allrange` of its authors' release are needed there"
            ) from error

    @classmethod
    def parse(cls, model: str, ranges: str) -> Self:
        """Take both texts apart; a `ValueError` or `LookupError` where they are odd."""
        head, _, body = model.partition("SV\n")
        facts = dict(line.split(maxsplit=1) for line in head.splitlines())
        if facts["svm_type"] != "epsilon_svr" or facts["kernel_type"] != "rbf":
            raise ValueError(f"it is {facts['svm_type']} with kernel {facts['kernel_type']}")
        entries = [line.split() for line in body.splitlines()]
        if len(entries) != int(facts["total_sv"]):
            raise ValueError(f"{len(entries)} of {facts['total_sv']} support vectors")
        low, high = _ranges(ranges)
        return cls(
            vectors=torch.tensor([_dense(own[1:]) for own in entries], dtype=torch.float64),
            weights=torch.tensor([float(own[0]) for own in entries], dtype=torch.float64),
            gamma=float(facts["gamma"]),
            rho=float(facts["rho"]),
            low=low,
            high=high,
        )

    def __call__(self, features: Tensor) -> Tensor:
        """Score features (B, 36): (B,), about 0 (natural) to 100."""
        low, high, vectors, weights = (
            tensor.to(features) for tensor in (self.low, self.high, self.vectors, self.weights)
        )
        scaled = 2 * (features - low) / (high - low) - 1
        apart = (scaled[:, None] - vectors).square().sum(dim=2)
        return (torch.exp(-self.gamma * apart) * weights).sum(dim=1) - self.rho


def _dense(entries: list[str]) -> list[float]:
    """`index:value`, from 1 on; LIBSVM leaves zeros out."""
    vector = [0.0] * _FEATURES
    for entry in entries:
        place, _, value = entry.partition(":")
        vector[int(place) - 1] = float(value)
    return vector


def _ranges(text: str) -> tuple[Tensor, Tensor]:
    kind, target, *lines = text.split("\n")
    if kind.strip() != "x" or [float(value) for value in target.split()] != [-1, 1]:
        raise ValueError("ranges that are not scaled to -1 and 1")
    rows = [line.split() for line in lines if line.strip()]
    if [int(row[0]) for row in rows] != [*range(1, _FEATURES + 1)]:
        raise ValueError(f"ranges of {len(rows)} features, not {_FEATURES}")
    table = torch.tensor([[float(row[1]), float(row[2])] for row in rows], dtype=torch.float64)
    return table[:, 0], table[:, 1]
