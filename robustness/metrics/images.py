"""How far two images are apart, and whether that is far enough to call a forgery disrupted.

Source:
    The rate of outputs whose squared error is above 0.05: Disrupting Deepfakes (Ruiz et al.,
    2020), https://arxiv.org/abs/2003.01279; within what an edit changes: CMUA-Watermark (Huang et
    al., 2022), https://arxiv.org/abs/2105.10872.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from robustness.metrics import Facts, Measure, MeasureSettings, Scene, better
from robustness.metrics.memory import Memory
from shields import metrics
from shields.models.base import Perceptual
from shields.types import Image

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = ["Disrupted", "DisruptedEdit", "Features", "Lpips", "Psnr", "SquaredError", "Ssim",
           "masked_error"]  # fmt: skip

#: squared error, [-1, 1], beyond which a forgery counts as disrupted
_DISRUPTED = 0.05
#: change of a pixel, summed over its channels in [-1, 1], from which on an edit has touched it
_TOUCHED = 0.5


def _signed_error(image: Image, other: Image) -> Tensor:
    """Mean squared error (B,) as networks see images, in [-1, 1]: 0 to 4."""
    return metrics.mse(image, other) * (2 / 255) ** 2


class Psnr(Measure):
    """Peak signal-to-noise ratio."""

    def facts(self, pair: str) -> Facts:
        """More is nearer."""
        return Facts(
            higher=better(pair, alike=True),
            low=0,
            high=math.inf,
            unit="dB",
            summary="Peak signal-to-noise ratio over RGB for a range of 1; infinite where the "
            "images are equal.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return metrics.psnr(image, other)


class Ssim(Measure):
    """Structural similarity."""

    def facts(self, pair: str) -> Facts:
        """More is nearer."""
        return Facts(
            higher=better(pair, alike=True),
            low=-1,
            high=1,
            summary="Structural similarity over RGB, Gaussian window of 11 pixels, sigma 1.5; 1 "
            "where the images are equal.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return metrics.ssim(image, other)


class SquaredError(Measure):
    """Mean squared error in [-1, 1], which papers on forgeries also call L2."""

    def facts(self, pair: str) -> Facts:
        """Less is nearer."""
        return Facts(
            higher=better(pair, alike=False),
            low=0,
            high=4,
            summary="Mean squared error over all values, taken from -1 to 1: four times that of "
            "[0, 1].",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return _signed_error(image, other)


class _Perceptual(Measure):
    """A distance between deep features; those of the references are computed once."""

    def __init__(self, network: Perceptual) -> None:
        self._network, self._memory = network, Memory()

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        reference = self._memory(
            scene.reference_keys(), len(other), lambda rows: self._network.features(other[rows])
        )
        return self._network.distance(self._network.features(image), reference)


@dataclass(frozen=True, kw_only=True)
class LpipsSettings(MeasureSettings):
    """Which LPIPS."""

    #: "alex" is the package's default, "vgg" FaceLock's
    backbone: Literal["alex", "vgg", "squeeze"] = "alex"


class Lpips(_Perceptual):
    """LPIPS on a named backbone."""

    Settings: ClassVar = LpipsSettings

    @classmethod
    def load(cls, settings: LpipsSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Find the backbone's weights."""
        from shields.models import load

        return cls(load("perceptual", f"lpips-{settings.backbone}", store=store, device=device))

    def facts(self, pair: str) -> Facts:
        """Less is nearer."""
        return Facts(
            higher=better(pair, alike=False),
            low=0,
            high=math.inf,
            summary=f"LPIPS 0.1 distance ({self._network.name}), fitted to how people judge.",
        )


@dataclass(frozen=True, kw_only=True)
class FeaturesSettings(MeasureSettings):
    """Whose features."""

    #: an autoencoder or a recognizer
    network: str = "portrait-ae"


class Features(_Perceptual):
    """Distance between the feature maps of any of our networks; runs where LPIPS has no weights."""

    Settings: ClassVar = FeaturesSettings

    @classmethod
    def load(cls, settings: FeaturesSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Load the network."""
        from shields.models import load

        return cls(load("perceptual", f"features:{settings.network}", store=store, device=device))

    def facts(self, pair: str) -> Facts:
        """Less is nearer."""
        return Facts(
            higher=better(pair, alike=False),
            low=0,
            high=4,
            summary=f"Mean squared difference of unit-length feature maps ({self._network.name}); "
            "not LPIPS, and not fitted to people.",
        )


class Disrupted(Measure):
    """Whether a forgery is disrupted: its mean is the success rate SR."""

    pairs: ClassVar = ("edits", "fair")

    def facts(self, pair: str) -> Facts:
        """More is better for the defender."""
        return Facts(
            higher=True,
            low=0,
            high=1,
            unit="share",
            summary=f"Success rate: share of forgeries whose mean squared error in [-1, 1] is "
            f"above {_DISRUPTED:g}.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return (_signed_error(image, other) > _DISRUPTED).float()


class DisruptedEdit(Measure):
    """Whether a forgery is disrupted where the edit changes the photo: the mean is SR_mask.

    Differs:
        CMUA's program takes the mask from the first photo of a batch, and counts a photo that the
        editor left alone as a failure. Here every photo has its mask, and an empty one no value.
    """

    pairs: ClassVar = ("edits",)
    undefined: ClassVar = "the editor hardly changed the clean photo: its mask is empty"

    def facts(self, pair: str) -> Facts:
        """More is better for the defender."""
        return Facts(
            higher=True,
            low=0,
            high=1,
            unit="share",
            summary=f"Masked success rate: as sr, over the pixels that the edit of the clean photo "
            f"changes by more than {_TOUCHED:g}, summed over channels in [-1, 1].",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        change = 2 * (other - scene.clean.to(other))
        touched = change.abs().sum(dim=1, keepdim=True) > _TOUCHED
        error = masked_error(image, other, touched)
        return (error > _DISRUPTED).float().where(error.isfinite(), torch.nan)


def masked_error(image: Image, other: Image, mask: Tensor) -> Tensor:
    """Mean squared error (B,) in [-1, 1] over a mask (B, 1, H, W) and channels; NaN if empty."""
    error = (2 * (image - other)).square().mean(dim=1, keepdim=True)
    return (error * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
