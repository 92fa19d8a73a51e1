"""Purifiers that need no network made for it: filters, noise, and an autoencoder's round trip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from robustness.purifiers import Purifier, PurifierConfig
from shields.errors import ConfigError
from shields.transforms import GaussianBlur, Noise, resize
from shields.types import Image

if TYPE_CHECKING:
    from shields.models.base import Autoencoder
    from shields.weights import WeightStore

__all__ = ["AdverseCleaner", "Bilateral", "BilateralConfig", "CleanerConfig", "Gaussian",
           "GaussianConfig", "Median", "MedianConfig", "NoiseUpscale", "NoiseUpscaleConfig",
           "RoundTrip", "RoundTripConfig", "TotalVariation", "TotalVariationConfig"]  # fmt: skip


def _reflected(image: Image, radius: int) -> Image:
    """Continue (B, C, H, W) by reflection; beyond its own length, by its border."""
    inside = min(radius, min(image.shape[2:]) - 1)
    padded = functional.pad(image, (inside,) * 4, mode="reflect")
    return functional.pad(padded, (radius - inside,) * 4, mode="replicate")


def _check_odd(window: int, owner: str) -> None:
    if window % 2 == 0:
        raise ConfigError(f"`window` of {owner} must be odd (pixels), got {window}")


@dataclass(frozen=True, kw_only=True)
class MedianConfig(PurifierConfig):
    """The window of a median."""

    #: side, odd, pixels
    window: int = 3

    limits: ClassVar = {"window": (1, 31)}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_odd(self.window, "Median")


class Median(Purifier):
    """Replace every value by the median of its window, each colour on its own."""

    Config = MedianConfig
    config: MedianConfig

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        window = self.config.window
        padded = _reflected(image, window // 2)
        # One plane at a time: a window of 5 is 25 copies of it.
        planes = [
            plane.unfold(0, window, 1).unfold(1, window, 1).flatten(2).median(dim=2).values
            for plane in padded.flatten(0, 1)
        ]
        return torch.stack(planes).view_as(image)


@dataclass(frozen=True, kw_only=True)
class GaussianConfig(PurifierConfig):
    """The width of a Gaussian."""

    #: standard deviation, pixels; the window reaches three of it to each side
    sigma: float = 1.0

    limits: ClassVar = {"sigma": (0.05, 64)}


class Gaussian(Purifier):
    """Blur by a Gaussian."""

    Config = GaussianConfig
    config: GaussianConfig

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        return GaussianBlur(window=0).apply(image, sigma=self.config.sigma)


@dataclass(frozen=True, kw_only=True)
class BilateralConfig(PurifierConfig):
    """The window of a bilateral filter and how fast its weights fall."""

    #: diameter of the round window, odd, pixels
    window: int = 5
    #: standard deviation over the summed difference of the three colours, levels
    sigma_colour: float = 25.0
    #: standard deviation over the distance, pixels
    sigma_space: float = 2.0

    limits: ClassVar = {"window": (1, 31), "sigma_colour": (0.1, 765), "sigma_space": (0.1, 64)}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_odd(self.window, "Bilateral")


def _bilateral(image: Image, config: BilateralConfig) -> Image:
    """Average (B, 3, H, W) over neighbours that are near and of a like colour."""
    radius = config.window // 2
    height, width = image.shape[2:]
    padded = _reflected(image, radius)
    total, weights = torch.zeros_like(image), torch.zeros_like(image[:, :1])
    offsets = range(-radius, radius + 1)
    for down, right in ((down, right) for down in offsets for right in offsets):
        squared = down**2 + right**2
        if squared > radius**2:
            continue
        top, left = radius + down, radius + right
        neighbour = padded[..., top : top + height, left : left + width]
        gap = (neighbour - image).abs().sum(dim=1, keepdim=True) * (255 / config.sigma_colour)
        weight = torch.exp(-0.5 * (gap.square() + squared / config.sigma_space**2))
        total += weight * neighbour
        weights += weight
    return total / weights


class Bilateral(Purifier):
    """Smooth within edges: neighbours count by nearness and by likeness of colour.

    Source:
        Bilateral Filtering for Gray and Color Images (Tomasi, Manduchi, 1998), with the distance
        of colours that OpenCV uses, the sum over the three.
    """

    Config = BilateralConfig
    config: BilateralConfig

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        return _bilateral(image, self.config)


@dataclass(frozen=True, kw_only=True)
class CleanerConfig(PurifierConfig):
    """How often the two filters of AdverseCleaner run."""

    #: runs of the bilateral filter
    smoothings: int = 64
    #: runs of the guided filter
    guidings: int = 4

    limits: ClassVar = {"smoothings": (0, 1000), "guidings": (0, 100)}


def _guided(guide: Image, image: Image, radius: int, softness: float) -> Image:
    """Guided filter with a guide in colour, (B, 3, H, W) each.

    Within every window the image is taken for an affine map of the guide's three colours; the
    least-squares maps of all windows over a pixel are averaged.
    """

    def mean(values: Tensor) -> Tensor:
        flat = _reflected(values.flatten(1, -3), radius)
        rows = functional.avg_pool2d(flat, (2 * radius + 1, 1), stride=1)
        return functional.avg_pool2d(rows, (1, 2 * radius + 1), stride=1).view(values.shape)

    guide_mean, image_mean = mean(guide), mean(image)
    # (B, 3, 3, H, W): covariance of guide with guide, and of guide with image
    own = mean(guide[:, :, None] * guide[:, None]) - guide_mean[:, :, None] * guide_mean[:, None]
    both = mean(guide[:, :, None] * image[:, None]) - guide_mean[:, :, None] * image_mean[:, None]
    eye = torch.eye(3, dtype=guide.dtype, device=guide.device)
    slopes = torch.linalg.solve(
        own.permute(0, 3, 4, 1, 2) + softness * eye, both.permute(0, 3, 4, 1, 2)
    ).permute(0, 3, 4, 1, 2)
    offset = image_mean - torch.einsum("bijyx,biyx->bjyx", slopes, guide_mean)
    return torch.einsum("bijyx,biyx->bjyx", mean(slopes.contiguous()), guide) + mean(offset)


class AdverseCleaner(Purifier):
    """Many bilateral filters, then a few guided ones that bring the edges back.

    Source:
        AdverseCleaner (2023): 64 bilateral filters (window 5, both deviations 8), then 4 guided
        filters (radius 4, softness 16 in squared levels) whose guide is the input.
    """

    Config = CleanerConfig
    config: CleanerConfig

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        bilateral = BilateralConfig(window=5, sigma_colour=8, sigma_space=8)
        smooth = image
        for _ in range(self.config.smoothings):
            smooth = _bilateral(smooth, bilateral)
        # Variances of nearly flat windows need more digits than float32 has.
        guide, result = image.double(), smooth.double()
        for _ in range(self.config.guidings):
            result = _guided(guide, result, radius=4, softness=16 / 255**2)
        return result.float()


@dataclass(frozen=True, kw_only=True)
class TotalVariationConfig(PurifierConfig):
    """How much total variation costs against distance."""

    #: weight of the total variation, for values in [0, 1]; larger is smoother
    weight: float = 0.05
    #: iterations
    steps: int = 100

    limits: ClassVar = {"weight": (1e-4, 10), "steps": (1, 10_000)}


class TotalVariation(Purifier):
    """The image nearest to the given one among those of less total variation, colour by colour.

    Source:
        An Algorithm for Total Variation Minimization and Applications (Chambolle, 2004): the
        semi-implicit iteration on the dual field, with step 1/4.

    Differs:
        A fixed number of iterations, so that a batch gives what its images give one by one.
    """

    Config = TotalVariationConfig
    config: TotalVariationConfig

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        field = torch.zeros(2, *image.shape, dtype=image.dtype, device=image.device)
        result = image
        for _ in range(self.config.steps):
            slope = _slope(result)
            norm = slope.square().sum(dim=0).sqrt()
            field = (field - slope / 4) / (1 + norm / (4 * self.config.weight))
            result = image - _divergence(field)
        return result


def _slope(image: Image) -> Tensor:
    """Forward differences downwards and to the right, 0 at the far border: (2, B, C, H, W)."""
    down = functional.pad(image[..., 1:, :] - image[..., :-1, :], (0, 0, 0, 1))
    right = functional.pad(image[..., 1:] - image[..., :-1], (0, 1))
    return torch.stack([down, right])


def _divergence(field: Tensor) -> Tensor:
    """Backward differences of a field that is 0 at the far border: minus the slopes' adjoint."""
    down, right = field
    above = functional.pad(down[..., :-1, :], (0, 0, 1, 0))
    before = functional.pad(right[..., :-1], (1, 0))
    return down - above + right - before


@dataclass(frozen=True, kw_only=True)
class NoiseUpscaleConfig(PurifierConfig):
    """How much noise, and how small in between."""

    #: standard deviation of the noise, levels
    levels: float = 12.75
    #: sides in between as a share of the photo's
    scale: float = 0.5

    limits: ClassVar = {"levels": (0, 255), "scale": (0.05, 1)}


class NoiseUpscale(Purifier):
    """Drown the perturbation in noise, shrink, which averages the noise away, and enlarge.

    Source:
        Adversarial Perturbations Cannot Reliably Protect Artists From Generative AI (Hönig et al.,
        2025): its plain noise of 0.05 before a network that enlarges.

    Differs:
        No network: Lanczos both ways, at the photo's own size. What a diffusion upscaler would
        invent is not there, so this is the weakest form of the idea.
    """

    Config = NoiseUpscaleConfig
    config: NoiseUpscaleConfig

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        seed = int(torch.randint(2**31 - 1, (), generator=rng))
        noisy = Noise().apply(image, levels=self.config.levels, seed=seed)
        height, width = image.shape[2:]
        scale = self.config.scale
        size = max(math.floor(height * scale), 1), max(math.floor(width * scale), 1)
        return resize(resize(noisy, size).clamp(0, 1), (height, width))


@dataclass(frozen=True, kw_only=True)
class RoundTripConfig(PurifierConfig):
    """Which autoencoder."""

    #: name of an autoencoder as `shields.models.load` takes it
    autoencoder: str = "portrait-ae"


class RoundTrip(Purifier):
    """Encode to the posterior mean and decode: what an editor does without editing.

    Through the network that a protector was optimised against this does little or harms; through
    another one it purifies. Report both, and which.
    """

    Config = RoundTripConfig
    config: RoundTripConfig

    def __init__(self, autoencoder: Autoencoder, config: RoundTripConfig | None = None) -> None:
        super().__init__(config)
        self.autoencoder = autoencoder

    @classmethod
    def load(cls, config: RoundTripConfig, *, store: WeightStore, device: torch.device) -> Self:
        """Load the autoencoder that the config names."""
        from shields.models import load

        return cls(load("autoencoder", config.autoencoder, store=store, device=device), config)

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        return self.autoencoder.reconstruct(image)
