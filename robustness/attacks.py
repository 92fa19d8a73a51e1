"""What the world does to a photo, for real: codecs, resampling, and how attacks are named.

An attack takes 8-bit pixels and gives 8-bit pixels, through the codec or the resampler itself;
`shields.transforms` has the differentiable counterparts that protectors average over. Attacks are
frozen dataclasses, and text: `parse("jpeg:75+resize:0.5")`, where `str` gives the text back.

Example:
    >>> photo = np.zeros((64, 48, 3), np.uint8)
    >>> parse("jpeg:75+resize:0.5").apply(photo).shape
    (32, 24, 3)
    >>> str(parse("resize:0.5:bicubic"))
    'resize:0.5,kernel=bicubic'
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image as PillowImage
from PIL import features

from robustness.settings import check_settings, read_settings, write_settings
from shields.errors import ConfigError, ImageError, MissingPackage
from shields.registry import Registry

__all__ = ["ATTACKS", "Attack", "Avif", "Chain", "CompressResize", "Heic", "Jpeg", "Kernel",
           "Nothing", "Resize", "Subsampling", "Webp", "encoded", "families", "parse", "resized",
           "scaled"]  # fmt: skip

Kernel = Literal["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"]
Subsampling = Literal["4:2:0", "4:2:2", "4:4:4"]
Levels = Literal["own", "deeperforensics"]

#: no side is made shorter than this, unless it is already, pixels
_LEAST_SIDE = 16
_KERNELS: Mapping[str, PillowImage.Resampling] = {
    kernel.name.lower(): kernel for kernel in PillowImage.Resampling
}


@dataclass(frozen=True)
class Attack(ABC):
    """A named handling of a photo; a subclass writes `_apply`."""

    #: the name in `ATTACKS`
    name: ClassVar[str]
    #: field -> smallest and largest value that makes sense
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        check_settings(self, self.limits)

    def __str__(self) -> str:
        settings = write_settings(self)
        return f"{self.name}:{settings}" if settings else self.name

    @abstractmethod
    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 -> (H', W', 3) uint8; what is drawn comes from `rng`."""

    def apply(self, pixels: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Handle a photo.

        Args:
            pixels: (H, W, 3) uint8, sRGB; left as it is.
            seed: Of what the attack draws (an angle, a place): `numpy.random.default_rng(seed)`.

        Returns:
            (H', W', 3) uint8; the size changes where the attack changes it.

        Raises:
            ImageError: The pixels have another shape or type.
            MissingPackage: A codec is not installed.
        """
        ok = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 3
        if not ok or pixels.shape[2] != 3 or pixels.size == 0:
            came = getattr(pixels, "shape", ""), getattr(pixels, "dtype", type(pixels).__name__)
            raise ImageError(f"`pixels` must be (H, W, 3) uint8, got {came[0]} {came[1]}")
        return np.array(self._apply(pixels, np.random.default_rng(seed)), order="C")


@dataclass(frozen=True, kw_only=True)
class Nothing(Attack):
    """The photo as it was saved."""

    name = "none"

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return pixels


def encoded(pixels: np.ndarray, codec: str, **options: Any) -> np.ndarray:  # noqa: ANN401  Pillow's
    """Encode (H, W, 3) uint8 by a codec of Pillow's with its options, and decode."""
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, format=codec, **options)
    with PillowImage.open(file, formats=[codec]) as decoded:
        return np.array(decoded.convert("RGB"))


def scaled(side: int, scale: float) -> int:
    """Scale a side in pixels: rounded down, but not below 16 unless it is shorter already."""
    # A scale of 1/3 must not lose a pixel to binary fractions.
    return max(math.floor(side * scale + 1e-6), min(side, _LEAST_SIDE))


def resized(pixels: np.ndarray, size: tuple[int, int], kernel: Kernel = "lanczos") -> np.ndarray:
    """Resample (H, W, 3) uint8 to (height, width) by Pillow, widened when shrinking."""
    height, width = size
    return np.asarray(PillowImage.fromarray(pixels).resize((width, height), _KERNELS[kernel]))


@dataclass(frozen=True, kw_only=True)
class Jpeg(Attack):
    """Encode and decode with libjpeg-turbo through Pillow; IJG tables, baseline."""

    name = "jpeg"

    #: libjpeg's scale
    quality: int = 75
    #: how the colour planes are thinned out; 4:2:0 is what nearly every program does
    subsampling: Subsampling = "4:2:0"

    limits: ClassVar = {"quality": (1, 100)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return encoded(pixels, "JPEG", quality=self.quality, subsampling=self.subsampling)


@dataclass(frozen=True, kw_only=True)
class Webp(Attack):
    """Encode and decode lossy WebP with libwebp through Pillow, method 4; always 4:2:0."""

    name = "webp"

    #: libwebp's scale
    quality: int = 80

    limits: ClassVar = {"quality": (0, 100)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return encoded(pixels, "WEBP", quality=self.quality)


@dataclass(frozen=True, kw_only=True)
class Avif(Attack):
    """Encode and decode AVIF with libavif through Pillow, its default speed, 4:2:0."""

    name = "avif"

    #: libavif's scale
    quality: int = 75

    limits: ClassVar = {"quality": (0, 100)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not features.check("avif"):
            raise MissingPackage(
                "attack 'avif' needs a Pillow that was built with AVIF: pip install 'pillow>=11.3'"
            )
        # One thread: how the picture is cut into tiles must not depend on the machine.
        return encoded(pixels, "AVIF", quality=self.quality, max_threads=1)


@dataclass(frozen=True, kw_only=True)
class Heic(Attack):
    """Encode and decode HEIC with x265 through the optional package pillow-heif, 4:2:0."""

    name = "heic"

    #: x265's scale as libheif has it
    quality: int = 75

    limits: ClassVar = {"quality": (0, 100)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        _OPENERS["heic"]()
        return encoded(pixels, "HEIF", quality=self.quality)


@dataclass(frozen=True, kw_only=True)
class Resize(Attack):
    """Resample with Pillow, and leave the photo at its new size unless `restore` is on.

    Sizes are rounded down, the aspect ratio is kept, and no side falls below 16 pixels.
    """

    name = "resize"

    #: up to 16 a factor on both sides, above that the new longer side, pixels
    size: float = 0.5
    kernel: Kernel = "lanczos"
    #: bring it back to the old size by the same kernel
    restore: bool = False

    limits: ClassVar = {"size": (0.01, 65535)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = pixels.shape[:2]
        scale = self.size if self.size <= 16 else self.size / max(height, width)
        small = resized(pixels, (scaled(height, scale), scaled(width, scale)), self.kernel)
        return resized(small, (height, width), self.kernel) if self.restore else small


@dataclass(frozen=True, kw_only=True)
class CompressResize(Attack):
    """C&R: JPEG first, then a half-size Lanczos; left small unless `restore` is on.

    Source:
        TIP-RSR, Tables 1 and 2: quality 75, half the resolution. What comes after is not said;
        editors that work at a size of their own enlarge the small photo themselves.
    """

    name = "cr"

    #: libjpeg's scale
    quality: int = 75
    #: new sides as a share of the old
    scale: float = 0.5
    #: bring it back to the old size by Lanczos
    restore: bool = False

    limits: ClassVar = {"quality": (1, 100), "scale": (0.01, 1)}

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        coded = Jpeg(quality=self.quality)._apply(pixels, rng)
        return Resize(size=self.scale, restore=self.restore)._apply(coded, rng)


@dataclass(frozen=True)
class Chain(Attack):
    """One attack after another; each draws by a seed of its own, made of the chain's."""

    name = "chain"

    members: tuple[Attack, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("a chain of attacks needs at least one; `none` leaves a photo alone")

    def __str__(self) -> str:
        return "+".join(map(str, self.members))

    def _apply(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for member in self.members:
            pixels = member.apply(pixels, seed=int(rng.integers(2**31)))
        return pixels


def parse(text: str) -> Attack:
    """Read an attack, or several one after another, as in "jpeg:75+resize:0.5".

    Args:
        text: `name`, `name:first`, `name:first:second` or `name:key=value,key=value`; joined by
            `+`, the leftmost first.

    Raises:
        UnknownName: No attack has that name.
        ConfigError: A setting that the attack does not have, or a value that makes no sense.

    Example:
        >>> parse("jpeg:60:4:4:4")
        Jpeg(quality=60, subsampling='4:4:4')
    """
    members = []
    for part in text.split("+"):
        name, _, settings = part.strip().partition(":")
        if not name:
            raise ConfigError(f"an attack is missing in {text!r}; write it as jpeg:75+resize:0.5")
        members.append(read_settings(ATTACKS[name], settings, name))
    return members[0] if len(members) == 1 else Chain(tuple(members))


#: in the order in which they are listed
ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    {
        "none": "robustness.attacks:Nothing",
        "jpeg": "robustness.attacks:Jpeg",
        "webp": "robustness.attacks:Webp",
        "avif": "robustness.attacks:Avif",
        "heic": "robustness.attacks:Heic",
        "resize": "robustness.attacks:Resize",
        "cr": "robustness.attacks:CompressResize",
        "downscale": "robustness.distortions:Downscale",
        "blur": "robustness.distortions:Blur",
        "rotate": "robustness.distortions:Rotate",
        "crop": "robustness.distortions:Crop",
        "jitter": "robustness.distortions:Jitter",
        "saturation": "robustness.distortions:Saturation",
        "contrast": "robustness.distortions:Contrast",
        "drop": "robustness.distortions:Drop",
        "screenshot": "robustness.distortions:Screenshot",
        "screenshot-desktop": "robustness.distortions:DesktopScreenshot",
        "screenshot-phone": "robustness.distortions:PhoneScreenshot",
        "facebook": "robustness.platforms:Facebook",
        "instagram": "robustness.platforms:Instagram",
        "x": "robustness.platforms:X",
        "whatsapp": "robustness.platforms:WhatsApp",
        "wechat": "robustness.platforms:WeChat",
        "weibo": "robustness.platforms:Weibo",
        "telegram": "robustness.platforms:Telegram",
        "osn": "robustness.platforms:SocialNetwork",
    },
)
_OPENERS: Registry[Any] = Registry("attack", {"heic": "pillow_heif:register_heif_opener"})

#: family -> how an attack is written, its five levels from weak to strong
_OWN = {
    "saturation": ("saturation:{}", (0.8, 0.6, 0.4, 0.2, 0)),
    "contrast": ("contrast:{}", (0.85, 0.725, 0.6, 0.475, 0.35)),
    "drop": ("drop:{}", (0.1, 0.2, 0.3, 0.4, 0.5)),
    "blur": ("blur:0,window={}", (3, 5, 7, 9, 13)),
    "downscale": ("downscale:{}", (1.5, 2, 3, 4, 6)),
    "jpeg": ("jpeg:{}", (90, 75, 60, 45, 30)),
}
_DEEPERFORENSICS = {
    **_OWN,
    "saturation": ("saturation:{}", (0.4, 0.3, 0.2, 0.1, 0)),
    "contrast": ("contrast:{},about=black", (0.85, 0.725, 0.6, 0.475, 0.35)),
    "blur": ("blur:0,window={}", (7, 9, 13, 17, 21)),
    "downscale": ("downscale:{}", (2, 3, 4, 5, 6)),
}


def families(levels: Levels = "own") -> dict[str, tuple[Attack, ...]]:
    """List the six families that ARS is tested with, each at five levels, weak to strong.

    Args:
        levels: "own" are ours: those of the paper are in an appendix that is not public.
            "deeperforensics" takes saturation, contrast (there a darkening), blur and down-scale
            from DeeperForensics-1.0, made for videos of 1080 lines and harsh on a small face;
            drop and JPEG, which it does not have, stay ours.

    Raises:
        ConfigError: There is no such set of levels.

    Source:
        ARS names the families: colour saturation, colour contrast, random drop, Gaussian blur,
        down-scaling and JPEG.
    """
    tables = {"own": _OWN, "deeperforensics": _DEEPERFORENSICS}
    if levels not in tables:
        raise ConfigError(f"`levels` must be one of {', '.join(tables)}, got {levels!r}")
    return {
        family: tuple(parse(pattern.format(level)) for level in strengths)
        for family, (pattern, strengths) in tables[levels].items()
    }
