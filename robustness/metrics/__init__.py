"""What is measured: the contract of metrics, the pairs they compare, the table, and `load`.

A metric's name says what is compared: `psnr@photo` is the fidelity of a protection, `psnr@edits`
how far it drives an edit away. So the direction that is good belongs to the name and the pair.
Values are one a photo, or one a set of photos; averages are `robustness.summary`'s.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

import numpy as np
import torch
from torch import Tensor

from robustness.metrics.memory import Memory
from robustness.settings import check_settings, read_settings
from shields.codec import resize
from shields.errors import ConfigError, ImageError, UnknownName
from shields.registry import Registry, did_you_mean
from shields.types import Image, check_image

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = ["METRICS", "PAIRS", "Facts", "Measure", "MeasureSettings", "Scene",
           "SetMeasure", "Total", "better", "bootstrap", "load"]  # fmt: skip

#: what stands behind the @ -> the judged image, and the one it is compared with
PAIRS: Mapping[str, str] = MappingProxyType(
    {
        "photo": "the protected photo as saved, with the clean photo",
        "handled": "the protected photo after the attack, with the clean photo",
        "edits": "the forgery of the protected and attacked photo, with that of the clean photo",
        "fair": "the forgery of the protected and attacked photo, with that of the clean photo "
        "after the same attack",
        "source": "the forgery of the protected and attacked photo, with the clean photo",
    }
)
#: numbers that the bootstrap draws at once
_DRAWN = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one has to know to read a number."""

    #: whether more is better for the defender; None where neither direction is
    higher: bool | None
    #: least and greatest value it can take
    low: float
    high: float
    unit: str = ""
    #: what it is, in a sentence
    summary: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What else is known of the photos of a pair."""

    #: (B, 3, H, W), [0, 1]; images of a pair are brought to its size
    clean: Image
    #: digests of the references, one an image; their features are kept under them
    keys: tuple[str, ...] = ()
    #: (B, 5, 2), pixels of the clean photo; NaN rows where it shows no face
    landmarks: Tensor | None = None
    #: the instruction of an edit
    prompt: str = ""
    #: what the edited photo should show
    description: str = ""

    def reference_keys(self) -> list[Hashable]:
        """What features of the references are kept under: digest, size and landmarks."""
        size = (self.clean.shape[2], self.clean.shape[3])
        points = self.landmarks
        return [
            (key, size, "" if points is None else str(points[row].tolist()))
            for row, key in enumerate(self.keys)
        ]


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """Settings of a metric: numbers, truth values and words, each with a default."""

    #: field -> smallest and largest value that makes sense
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        check_settings(self, self.limits)


class _Loadable(ABC):
    """What all metrics share."""

    #: the metric's own settings, written behind its name
    Settings: ClassVar[type[MeasureSettings]] = MeasureSettings
    #: pairs on which it makes sense
    pairs: ClassVar[tuple[str, ...]] = tuple(PAIRS)
    #: where its networks are
    device: torch.device = torch.device("cpu")

    # A subclass knows its own settings' class; to mypy that narrows the parameter.
    @classmethod
    def load(cls, settings: Any, *, store: WeightStore, device: torch.device) -> Self:  # noqa: ANN401
        """Build the metric, with its networks where it runs any."""
        return cls()

    @abstractmethod
    def facts(self, pair: str) -> Facts:
        """Say what its numbers mean on a pair."""

    def _fitted(self, image: Image, other: Image, scene: Scene) -> tuple[Image, Image]:
        """Check both images of a pair and bring them to the clean photo's size."""
        check_image(image)
        check_image(other, "other")
        if not len(image) == len(other) == len(scene.clean):
            raise ImageError(
                f"a pair has as many images as the scene, got {len(image)}, {len(other)} and "
                f"{len(scene.clean)}"
            )
        size = (scene.clean.shape[2], scene.clean.shape[3])
        first, second = (
            batch if batch.shape[2:] == size else resize(batch, size, "lanczos").clamp(0, 1)
            for batch in (image.to(self.device), other.to(self.device))
        )
        return first, second


class Measure(_Loadable):
    """A metric that gives a number a photo; a subclass writes `_measure`."""

    #: why a value may be NaN, one line
    undefined: ClassVar[str] = "the number is not defined for this photo"

    @abstractmethod
    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        """Two (B, 3, H, W), [0, 1], of the clean photo's size -> (B,)."""

    @final
    @torch.no_grad()
    def measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        """Measure a batch of pairs.

        Args:
            image: (B, 3, H, W), [0, 1], what is judged.
            other: (B, 3, H, W), [0, 1], what it is compared with; the size may be another.
            scene: The clean photos, to whose size both are brought by Lanczos, and what is known.

        Returns:
            (B,), on the CPU; NaN where `undefined` holds, infinite for the PSNR of equal images.

        Raises:
            ShieldsError: The images, or what the scene says, do not do.
        """
        values = self._measure(*self._fitted(image, other, scene), scene)
        if values.shape != (len(image),):
            raise ImageError(
                f"{type(self).__name__} must give a number an image, shape ({len(image)},), got "
                f"{tuple(values.shape)}"
            )
        return values.float().cpu()


class SetMeasure(_Loadable):
    """A metric that gives one number for all photos of a cell."""

    def __init__(self) -> None:
        self._memory = Memory()

    @abstractmethod
    def features(self, image: Image, landmarks: Tensor | None) -> Tensor:
        """(B, 3, H, W), [0, 1], landmarks (B, 5, 2) of the clean photo in pixels -> (B, D)."""

    @abstractmethod
    def distance(self, features: Tensor, reference: Tensor) -> float:
        """How far two sets of features, (N, D) and (M, D), are apart."""

    @final
    def start(self) -> Total:
        """Begin a set."""
        return Total(self)

    @torch.no_grad()
    def pair(self, image: Image, other: Image, scene: Scene) -> tuple[Tensor, Tensor]:
        """Features of the judged images and of the references, (B, D) each, on the CPU."""
        image, other = self._fitted(image, other, scene)
        points = scene.landmarks

        def compute(rows: list[int]) -> tuple[Tensor, ...]:
            return (self.features(other[rows], None if points is None else points[rows]),)

        (reference,) = self._memory(scene.reference_keys(), len(other), compute)
        return self.features(image, points).cpu(), reference.cpu()


class Total:
    """A set of pairs as it grows; only features are kept of it."""

    def __init__(self, measure: SetMeasure) -> None:
        self._measure = measure
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, image: Image, other: Image, scene: Scene) -> None:
        """Add a batch, as `Measure.measure` takes it."""
        self._pairs.append(self._measure.pair(image, other, scene))

    def value(self) -> float:
        """The number.

        Raises:
            ImageError: Fewer than two photos are in the set.
        """
        photos = sum(len(features) for features, _ in self._pairs)
        if photos < 2:
            raise ImageError(f"a number about a set needs two photos or more, got {photos}")
        features, reference = (torch.cat(part) for part in zip(*self._pairs, strict=True))
        return self._measure.distance(features, reference)


def better(pair: str, *, alike: bool) -> bool | None:
    """Whether more is better for the defender, of a number that grows with likeness (or falls).

    A protected photo should look like the clean one, and its forgery unlike the clean one's; how
    near a forgery is to the photo itself says nothing: it may be a failed edit or a perfect one.

    Example:
        >>> better("photo", alike=True), better("edits", alike=True), better("source", alike=True)
        (True, False, None)
    """
    return None if pair == "source" else alike == (pair == "photo")


def bootstrap(
    values: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, float, float]:
    """Mean of values, and where it lies in 95 % of samples that are drawn anew from them.

    Args:
        values: (N,), finite.
        groups: Of each value, what it belongs to; groups are drawn, with all of their values.
            Values are drawn where it is left out.
        seed: Of the draws.
        draws: How often.

    Returns:
        Mean, lower and upper bound; NaN where there is no value, and bounds NaN where there is
        one group.

    Raises:
        ConfigError: A value is not finite.
    """
    if not all(map(math.isfinite, values)):
        raise ConfigError("a mean needs finite values; count the others apart")
    if not values:
        return math.nan, math.nan, math.nan
    members: dict[Hashable, list[float]] = {}
    names = range(len(values)) if groups is None else groups
    for name, value in zip(names, values, strict=True):
        members.setdefault(name, []).append(value)
    mean, parts = math.fsum(values) / len(values), len(members)
    if parts < 2:
        return mean, math.nan, math.nan
    sums = np.array([math.fsum(group) for group in members.values()])
    counts = np.array([len(group) for group in members.values()])
    rng, share = np.random.default_rng(seed), np.full(parts, 1 / parts)
    at_once = max(1, _DRAWN // parts)
    means: list[float] = []
    while len(means) < draws:
        drawn = rng.multinomial(parts, share, size=min(at_once, draws - len(means)))
        means += (drawn @ sums / (drawn @ counts)).tolist()
    low, high = np.quantile(means, (0.025, 0.975))
    return mean, float(low), float(high)


#: in the order in which they are listed
METRICS: Registry[type[Measure] | type[SetMeasure]] = Registry(
    "metric",
    {
        "psnr": "robustness.metrics.images:Psnr",
        "ssim": "robustness.metrics.images:Ssim",
        "mse": "robustness.metrics.images:SquaredError",
        "lpips": "robustness.metrics.images:Lpips",
        "features": "robustness.metrics.images:Features",
        "sr": "robustness.metrics.images:Disrupted",
        "sr-mask": "robustness.metrics.images:DisruptedEdit",
        "l2-face": "robustness.metrics.faces:FaceError",
        "fr": "robustness.metrics.faces:Likeness",
        "recognised": "robustness.metrics.faces:Recognised",
        "dsr": "robustness.metrics.faces:Defended",
        "detected": "robustness.metrics.faces:Detected",
        "brisque": "robustness.metrics.quality:Brisque",
        "fid": "robustness.metrics.quality:InceptionDistance",
        "kid": "robustness.metrics.quality:InceptionKernelDistance",
        "fd": "robustness.metrics.quality:FaceSetDistance",
        "clip-s": "robustness.metrics.clip:InstructionScore",
        "clip-sd": "robustness.metrics.clip:DescriptionScore",
        "clip-i": "robustness.metrics.clip:ImageScore",
    },
)


def load(
    text: str, *, store: WeightStore, device: torch.device
) -> tuple[Measure | SetMeasure, str]:
    """Build a metric from its name, its settings and its pair, as in "fr:mobilefacenet@source".

    Args:
        text: `name@pair`, `name:first@pair` or `name:key=value,key=value@pair`; or, for one of
            your own, `module:factory@pair`: what the factory returns, called without arguments.
        store: Where weights are looked for.
        device: Where networks are put.

    Returns:
        The metric, and the pair.

    Raises:
        UnknownName: There is no such metric.
        ConfigError: The pair is left out or does not suit the metric, or a setting makes no sense.
        WeightsError: Weights are absent; nothing stands in for them.
        MissingPackage: A package is.
    """
    head, at, pair = text.strip().rpartition("@")
    if not at:
        raise ConfigError(f"what does {text!r} compare? Write {text}@edits; {_known_pairs(pair)}")
    if pair not in PAIRS:
        raise ConfigError(f"{text!r}: no pair is called {pair!r}; {_known_pairs(pair)}")
    name, _, settings = head.partition(":")
    if name not in METRICS and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", head):
        measure = _plugged(head)
    else:
        kind = METRICS[name]
        measure = kind.load(
            read_settings(kind.Settings, settings, name), store=store, device=device
        )
    if pair not in measure.pairs:
        raise ConfigError(f"{name} is measured on {' or '.join(measure.pairs)}, not on {pair}")
    measure.device = device
    return measure, pair


def _known_pairs(name: str) -> str:
    return did_you_mean(name, PAIRS)


def _plugged(address: str) -> Measure | SetMeasure:
    """Call a factory that is not ours, and hold what it returns to the contract."""
    from shields.models import imported

    try:
        measure = imported(address)()
    except ModuleNotFoundError as error:
        hint = did_you_mean(address.partition(":")[0], METRICS)
        raise UnknownName(f"no metric is called {address!r}, and {error}; {hint}") from error
    except Exception as error:  # of code that we know nothing about
        said = " ".join(str(error).split())
        raise ConfigError(f"metric {address!r}: {type(error).__name__}: {said}") from error
    if not isinstance(measure, Measure | SetMeasure):
        raise ConfigError(
            f"{address} returned a {type(measure).__name__}; a factory must return a metric: "
            "subclass robustness.metrics.Measure or SetMeasure"
        )
    return measure
