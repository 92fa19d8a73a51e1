"""Quality of images by themselves, and of sets of them: BRISQUE, FID and its relatives.

Source:
    FID: GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017),
    https://arxiv.org/abs/1706.08500. KID: Demystifying MMD GANs (Binkowski et al., 2018),
    https://arxiv.org/abs/1801.01401. Both on the Inception that torch-fidelity converted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from robustness.metrics import Facts, Measure, MeasureSettings, Scene, SetMeasure, better
from robustness.metrics.brisque import Halving, Regression, contrast_features
from shields.card import Card
from shields.errors import ConfigError, MissingPackage, WeightsError
from shields.models.base import Recognizer
from shields.types import Image

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = ["Brisque", "BrisqueSettings", "FaceSetDistance", "InceptionDistance",
           "InceptionKernelDistance", "SetSettings", "frechet_distance",
           "kernel_distance"]  # fmt: skip

_INCEPTION = Card(
    name="inception-fid",
    role="classifier",
    architecture="inception-v3-compat",
    file="weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
)
_BRISQUE_RELEASE = "http://live.ece.utexas.edu/research/quality/BRISQUE_release.zip"


@dataclass(frozen=True, kw_only=True)
class BrisqueSettings(MeasureSettings):
    """Which regression, and how images are halved."""

    #: with `allmodel` and `allrange`; `brisque-live` in any of the places of weights if empty
    folder: str = ""
    halving: Halving = "antialiased"


class Brisque(Measure):
    """BRISQUE of the judged image; the reference is not looked at."""

    Settings: ClassVar = BrisqueSettings
    pairs: ClassVar = ("photo", "handled", "edits")
    undefined: ClassVar = "the image is flat: it has no contrast to judge"

    def __init__(self, regression: Regression, halving: Halving = "antialiased") -> None:
        self._regression, self._halving = regression, halving

    @classmethod
    def load(cls, settings: BrisqueSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Find the authors' regression; nothing stands in for it."""
        places = [place / "brisque-live" for place in store.places()]
        if settings.folder:
            places = [Path(settings.folder).expanduser()]
        for place in places:
            if (place / "allmodel").is_file():
                return cls(Regression.read(place), settings.halving)
        raise WeightsError(
            f"brisque needs `allmodel` and `allrange` of {_BRISQUE_RELEASE}; tried: "
            f"{', '.join(map(str, places))}"
        )

    def facts(self, pair: str) -> Facts:
        """Less is more natural."""
        return Facts(
            higher=pair != "photo",
            low=-math.inf,
            high=math.inf,
            summary="BRISQUE of the judged image alone, about 0 (natural) to 100; says nothing of "
            f"what the image shows (halved by a cubic, {self._halving}).",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return self._regression(contrast_features(image, self._halving))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance between Gaussians that have the moments of (N, D) and (M, D).

    The trace of the root of the product of both covariances is a sum of singular values: of the
    product of the two centred sets, each reduced to at most D rows. With fewer photos than
    features that is much faster than the root of a matrix, and exact where the root is singular.
    """
    first, second = (_centred(part.double()) for part in (features, reference))
    gap = (features.double().mean(dim=0) - reference.double().mean(dim=0)).square().sum()
    shared = torch.linalg.svdvals(first @ second.T).sum()
    return float(gap + first.square().sum() + second.square().sum() - 2 * shared)


def _centred(features: Tensor) -> Tensor:
    """(N, D) -> A of at most D rows, with A.T @ A the covariance."""
    centred = (features - features.mean(dim=0)) / math.sqrt(len(features) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    return torch.linalg.qr(centred, mode="r").R


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Unbiased squared MMD with KID's cubic kernel, over all of (N, D) and (M, D) at once."""
    ours, theirs = features.double(), reference.double()

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first @ second.T / first.shape[1] + 1) ** 3

    def within(part: Tensor) -> Tensor:
        all_pairs = kernel(part, part)
        return (all_pairs.sum() - all_pairs.trace()) / (len(part) * (len(part) - 1))

    return float(within(ours) + within(theirs) - 2 * kernel(ours, theirs).mean())


class _Inception(SetMeasure):
    """What looks at sets through Inception's 2048 features."""

    def __init__(self, network: Any) -> None:  # noqa: ANN401  torchmetrics' own class
        super().__init__()
        self._network = network

    @classmethod
    def load(cls, settings: MeasureSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Load Inception through torchmetrics and torch-fidelity."""
        path = _inception_weights(store)
        if find_spec("torch_fidelity") is None:
            raise MissingPackage(
                "fid and kid need the package torch_fidelity: pip install torch-fidelity"
            )
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
        return cls(network.to(device))

    def features(self, image: Image, landmarks: Tensor | None) -> Tensor:
        """(B, 3, H, W), [0, 1] -> (B, 2048); 8 bits, brought to 299 x 299 inside."""
        features: Tensor = self._network((image * 255).round().to(torch.uint8))
        return features.float()


def _inception_weights(store: WeightStore) -> Path:
    places = [*store.places(), Path(torch.hub.get_dir()) / "checkpoints"]
    if not store.download and not any((place / _INCEPTION.file).is_file() for place in places):
        raise WeightsError(
            f"fid and kid need {_INCEPTION.file} from {_INCEPTION.url}; put it into one of: "
            f"{', '.join(map(str, places))}"
        )
    return store.find(_INCEPTION)


class InceptionDistance(_Inception):
    """FID. Biased upwards for small sets: to be compared at equal numbers of photos only."""

    def facts(self, pair: str) -> Facts:
        """Less is nearer."""
        return Facts(
            higher=better(pair, alike=False),
            low=0,
            high=math.inf,
            summary="Frechet distance of Inception's 2048 features between both sets; with fewer "
            "than 2048 photos comparable at equal numbers only.",
        )

    def distance(self, features: Tensor, reference: Tensor) -> float:
        """Frechet distance."""
        return frechet_distance(features, reference)


class InceptionKernelDistance(_Inception):
    """KID over all photos at once, where its authors average over subsets: unbiased."""

    def facts(self, pair: str) -> Facts:
        """Less is nearer."""
        return Facts(
            higher=better(pair, alike=False),
            low=-math.inf,
            high=math.inf,
            summary="Kernel distance (KID) of Inception's 2048 features between both sets; "
            "unbiased, so a little below 0 where they agree.",
        )

    def distance(self, features: Tensor, reference: Tensor) -> float:
        """Kernel distance."""
        return kernel_distance(features, reference)


@dataclass(frozen=True, kw_only=True)
class SetSettings(MeasureSettings):
    """Whose embeddings."""

    recognizer: str = ""


class FaceSetDistance(SetMeasure):
    """Frechet distance between faces as a recognizer sees them: a distance of its own, not FID."""

    Settings: ClassVar = SetSettings

    def __init__(self, recognizer: Recognizer) -> None:
        super().__init__()
        self._recognizer = recognizer

    @classmethod
    def load(cls, settings: SetSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Load the recognizer."""
        from shields.models import load

        if not settings.recognizer:
            raise ConfigError("whose embeddings? Name a recognizer: fd:face-embedder@edits")
        return cls(load("recognizer", settings.recognizer, store=store, device=device))

    def facts(self, pair: str) -> Facts:
        """Less is nearer."""
        return Facts(
            higher=better(pair, alike=False),
            low=0,
            high=4,
            summary=f"Frechet distance of {self._recognizer.name}'s embeddings between both sets; "
            "not FID, and comparable at equal numbers of photos only.",
        )

    def features(self, image: Image, landmarks: Tensor | None) -> Tensor:
        """Embeddings of faces aligned as in the clean photo; of whole images without landmarks."""
        return self._recognizer(image, self._recognizer.matrix(landmarks, image))

    def distance(self, features: Tensor, reference: Tensor) -> float:
        """Frechet distance."""
        return frechet_distance(features, reference)
