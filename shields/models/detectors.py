"""Face detectors behind the `Detector` contract."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import torch
from facenet_pytorch import MTCNN
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import ConfigError
from shields.models.base import Detector, Frozen
from shields.types import Face, Image, check_image

__all__ = ["MtcnnDetector", "ProposalNetwork"]

#: longer side of the copy that is searched first, and of the one searched if nothing was found
_SIDES = (1024, 2048)
#: smallest face that is looked for in such a copy, pixels; the network knows none below
_LEAST_FACE = 20
#: side of what the first network looks at, pixels, and the ratio of its pyramid's levels
_WINDOW, _FACTOR = 12, 0.709


class ProposalNetwork(Frozen):
    """MTCNN's first network over its pyramid, with a gradient: how much each place is a face."""

    HOT = ("_probability",)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.freeze()

    @staticmethod
    def sizes(height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of the pyramid's levels, finest first; empty for a tiny image."""
        scale, sizes = _WINDOW / _LEAST_FACE, []
        while min(height, width) * scale >= _WINDOW:
            sizes.append((int(height * scale + 1), int(width * scale + 1)))
            scale *= _FACTOR
        return sizes

    def _probability(self, small: Image) -> Tensor:
        _, probability = self.network((small * 255 - 127.5) * 0.0078125)
        face: Tensor = probability[:, 1]
        return face

    def forward(
        self, image: Image, size: tuple[int, int], kernel: Literal["area", "bilinear"] = "area"
    ) -> Tensor:
        """Shrink (B, 3, H, W), [0, 1] to a level and score its places.

        Args:
            image: (B, 3, H, W), [0, 1].
            size: Height and width of the level, one of `sizes`.
            kernel: "area" is what the detector itself shrinks by.

        Returns:
            (B, h, w), the probability that a face of 12 pixels stands there.
        """
        return self._probability(functional.interpolate(image, size=size, mode=kernel))


class MtcnnDetector(Detector):
    """Three cascaded networks; their weights come with facenet-pytorch.

    Source:
        Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks
        (Zhang, Zhang, Li, Qiao, 2016), https://arxiv.org/abs/1604.02878; weights of
        https://github.com/timesler/facenet-pytorch, MIT.

    Differs:
        Large photos are searched in a copy of at most 1024 pixels a side, so the smallest face
        found is about 2 % of the longer side; a photo without any is searched again at 2048.
        Faces below `threshold` are dropped, since each one found will be changed.
    """

    def __init__(self, device: torch.device | str = "cpu", *, threshold: float = 0.95) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"`threshold` must lie in [0, 1], got {threshold}")
        self.threshold = threshold
        self.device = torch.device(device)
        # building draws weights before it loads the real ones
        with torch.random.fork_rng(devices=[]):
            self._network: Any = MTCNN(
                keep_all=True, min_face_size=_LEAST_FACE, device=self.device
            ).eval()
        #: the first network, for objectives: it has a gradient, the search has none
        self.proposals = ProposalNetwork(self._network.pnet)

    @classmethod
    def load(cls, *, device: torch.device | str = "cpu") -> Self:
        """Build with the usual threshold."""
        return cls(device)

    def accelerate(self, backend: str = "inductor") -> None:
        """Compile the first network, the only one that a loop runs."""
        self.proposals.accelerate(backend)

    def __call__(self, image: Image) -> list[Face]:
        """Find the faces in (1, 3, H, W), [0, 1], largest first; an empty list where none is."""
        return self.detect_batch(image)[0]

    def detect_batch(self, images: Image) -> list[list[Face]]:
        """Find the faces in each of (B, 3, H, W), [0, 1]: a list per image, largest first."""
        check_image(images, "images")
        found: list[list[Face]] = [[] for _ in images]
        longer = max(images.shape[2:])
        for side in _SIDES if longer > _SIDES[0] else _SIDES[:1]:
            left = [index for index, faces in enumerate(found) if not faces]
            if left:
                copies = torch.cat([_shrunk(images[index : index + 1], side) for index in left])
                for index, faces in zip(left, self._search(copies, images.shape[2:]), strict=True):
                    found[index] = faces
        return found

    def _search(self, images: Image, size: torch.Size) -> list[list[Face]]:
        """Detect in copies; `size` is the height and width of the photos, whose pixels count."""
        height, width = images.shape[2:]
        if min(height, width) < _LEAST_FACE:  # the network fails on an empty pyramid
            return [[] for _ in images]
        levels = images.permute(0, 2, 3, 1).to(self.device) * 255
        results = self._network.detect(levels, landmarks=True)
        scale = np.array([size[1] / width, size[0] / height])
        return [
            [] if boxes is None else self._faces(boxes, scores, points, scale)
            for boxes, scores, points in zip(*results, strict=True)
        ]

    def _faces(
        self, boxes: np.ndarray, scores: np.ndarray, points: np.ndarray, scale: np.ndarray
    ) -> list[Face]:
        # the detector returns arrays of objects, which numpy cannot compute with
        corners = boxes.astype(float) * np.tile(scale, 2)
        landmarks = (points.astype(float) + 0.5) * scale - 0.5
        faces = [
            Face(box=tuple(box), landmarks=five.astype(np.float32), score=float(score))
            for box, five, score in zip(corners.tolist(), landmarks, scores, strict=True)
            if score >= self.threshold
        ]
        return sorted(faces, key=_area, reverse=True)


def _area(face: Face) -> float:
    left, top, right, bottom = face.box
    return (right - left) * (bottom - top)


def _shrunk(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[2:]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return functional.interpolate(
        images, size, mode="bilinear", align_corners=False, antialias=True
    )
