"""Whether a face is still the person's: likeness by a named recognizer, and what papers make of it.

Source:
    The face's error (Eq. 16) and the defence success rate (section IV-A4): ID-Guard (Qu et al.,
    2025), https://arxiv.org/abs/2409.13349. Likeness of the edit and its source as a measure of
    protection: FaceLock (Wang et al., 2025), https://arxiv.org/abs/2411.16832.

Differs:
    ID-Guard's face mask is a hull of Dlib's 68 points; ours is an ellipse through five landmarks.
    Eq. 16 leaves open what happens to channels, and the range: here it is their mean, and [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from robustness.metrics import Facts, Measure, MeasureSettings, Scene, better
from robustness.metrics.images import masked_error
from robustness.metrics.memory import Memory
from shields.errors import ConfigError
from shields.masks import components
from shields.models.base import Detector, Recognizer
from shields.types import Image

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = ["Defended", "Detected", "FaceError", "FaceSettings", "Likeness", "Recognised",
           "face_error"]  # fmt: skip

#: a forgery counts as warded off beyond this error, where it is recognised less than that as well
_DISRUPTED, _LIKE = 0.05, 0.4


def face_error(image: Image, other: Image, landmarks: Tensor) -> Tensor:
    """Mean squared error over the face and all channels, in [-1, 1]: ID-Guard's L2_face.

    Args:
        image: (B, 3, H, W), [0, 1].
        other: (B, 3, H, W), [0, 1].
        landmarks: (B, 5, 2), pixels; NaN rows where no face is known.

    Returns:
        (B,), 0 to 4; NaN where no face is known, or none of it lies in the image.
    """
    known = landmarks.isfinite().flatten(1).all(dim=1)
    values = image.new_full((len(image),), torch.nan)
    if known.any():
        mask = components(landmarks[known], (image.shape[2], image.shape[3]), ["face"])
        values[known] = masked_error(image[known], other[known], mask)
    return values


def _landmarks(scene: Scene, image: Image) -> Tensor:
    if scene.landmarks is None:
        return image.new_full((len(image), 5, 2), torch.nan)
    return scene.landmarks.to(image)


class FaceError(Measure):
    """L2_face: the squared error over the face."""

    undefined: ClassVar = "no face was found in the clean photo"

    def facts(self, pair: str) -> Facts:
        """Less is nearer."""
        return Facts(
            higher=better(pair, alike=False),
            low=0,
            high=4,
            summary="L2_face: mean squared error in [-1, 1] over an ellipse around the face of the "
            "clean photo.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return face_error(image, other, _landmarks(scene, image))


@dataclass(frozen=True, kw_only=True)
class FaceSettings(MeasureSettings):
    """Who judges, and where the face is looked for."""

    #: a recognizer; name one that the protector did not optimise against as well
    recognizer: str = ""
    #: "clean" expects the face where it is in the clean photo; "own" looks for it in each image,
    #: for attacks and editors that move it
    align: Literal["clean", "own"] = "clean"


class _Faces(Measure):
    """What compares faces by a recognizer; embeddings of the references are computed once."""

    Settings: ClassVar = FaceSettings
    undefined: ClassVar = "no face was found in the clean photo, or in one of the pair"

    def __init__(self, recognizer: Recognizer, detector: Detector | None = None) -> None:
        self.recognizer, self._detector = recognizer, detector
        self._memory = Memory()

    @classmethod
    def load(cls, settings: FaceSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Load the recognizer, and a detector where each image is aligned on its own."""
        from shields.models import load

        if not settings.recognizer:
            raise ConfigError("who compares the faces? Name a recognizer: fr:face-embedder@source")
        recognizer = load("recognizer", settings.recognizer, store=store, device=device)
        own = settings.align == "own"
        return cls(
            recognizer, load("detector", "mtcnn", store=store, device=device) if own else None
        )

    def likeness(self, image: Image, other: Image, scene: Scene) -> Tensor:
        """Cosine of the faces' embeddings (B,); NaN where one is missing."""
        points = _landmarks(scene, image)
        ours = self._embed(image, points)
        theirs = self._memory(
            scene.reference_keys(), len(other), lambda rows: self._embed(other[rows], points[rows])
        )
        cosine = (ours[0] * theirs[0]).sum(dim=1).clamp(-1, 1)
        return cosine.where(ours[1] & theirs[1], torch.nan)

    def _embed(self, image: Image, points: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, D), and whether there was a face to embed (B,)."""
        if self._detector is not None:
            found = [_nearest(self._detector, image[row : row + 1], points[row]) for row in
                     range(len(image))]  # fmt: skip
            points = torch.stack(found)
        known = points.isfinite().flatten(1).all(dim=1)
        return self.recognizer(image, self.recognizer.matrix(points, image)), known

    @property
    def _where(self) -> str:
        return "each aligned on its own" if self._detector else "aligned as in the clean photo"


def _nearest(detector: Detector, image: Image, expected: Tensor) -> Tensor:
    """Landmarks (5, 2) of the face nearest to where one is expected; NaN where there is none."""
    faces = detector(image)
    if not faces:
        return torch.full_like(expected, torch.nan)
    points = [torch.as_tensor(face.landmarks).to(expected) for face in faces]
    if not expected.isfinite().all():
        return points[0]
    return min(points, key=lambda five: float((five.mean(dim=0) - expected.mean(dim=0)).norm()))


class Likeness(_Faces):
    """Likeness of two faces by a named recognizer: FR, or ID similarity."""

    def facts(self, pair: str) -> Facts:
        """Less is better for the defender, whatever is compared."""
        threshold = self.recognizer.threshold
        same = f"; one person above {threshold:g} (its card)" if threshold is not None else ""
        return Facts(
            higher=False,
            low=-1,
            high=1,
            unit="cosine",
            summary=f"Likeness of the faces: cosine of the embeddings of {self.recognizer.name}, "
            f"{self._where}{same}.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return self.likeness(image, other, scene)


class Recognised(_Faces):
    """Whether a recognizer takes two faces for one person."""

    @classmethod
    def load(cls, settings: FaceSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Load the recognizer, whose card must tell its threshold."""
        measure = super().load(settings, store=store, device=device)
        if measure.recognizer.threshold is None:
            raise ConfigError(
                f"the card of {measure.recognizer.name!r} tells no `threshold` in its [results]; "
                "measure one on pairs of photos and write it there"
            )
        return measure

    def facts(self, pair: str) -> Facts:
        """Less is better for the defender."""
        return Facts(
            higher=False,
            low=0,
            high=1,
            unit="share",
            summary=f"Share of faces that {self.recognizer.name} takes for the same person: cosine "
            f"above {self.recognizer.threshold:g}, the threshold of its card; {self._where}.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        likeness = self.likeness(image, other, scene)
        assert self.recognizer.threshold is not None, "checked by load"
        alike = likeness > self.recognizer.threshold
        return alike.float().where(likeness.isfinite(), torch.nan)


class Defended(_Faces):
    """Whether a forgery's face is both disrupted and no longer alike: the mean is DSR."""

    pairs: ClassVar = ("edits", "fair")

    def facts(self, pair: str) -> Facts:
        """More is better for the defender."""
        return Facts(
            higher=True,
            low=0,
            high=1,
            unit="share",
            summary=f"Defence success rate: share of forgeries with L2_face above {_DISRUPTED:g} "
            f"and a cosine by {self.recognizer.name} below {_LIKE:g}, both as published (for "
            f"ArcFace), {self._where}.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        likeness = self.likeness(image, other, scene)
        error = face_error(image, other, _landmarks(scene, image))
        reached = (error > _DISRUPTED) & (likeness < _LIKE)
        return reached.float().where(error.isfinite() & likeness.isfinite(), torch.nan)


class Detected(Measure):
    """Whether a detector still finds a face in the judged image."""

    pairs: ClassVar = ("photo", "handled", "source")

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    @classmethod
    def load(cls, settings: MeasureSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Load MTCNN, whose weights come with its package."""
        from shields.models import load

        return cls(load("detector", "mtcnn", store=store, device=device))

    def facts(self, pair: str) -> Facts:
        """A face that is not found is not recognised; a photo as saved should stay a face."""
        return Facts(
            higher=pair == "photo",
            low=0,
            high=1,
            unit="share",
            summary="Share of judged images in which MTCNN finds a face; one without has no "
            "likeness, and is missing there.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return torch.tensor([float(bool(self._detector(row[None]))) for row in image])
