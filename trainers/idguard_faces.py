"""ID-Guard's training photos with their masks, and its measure of success.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, Eq. 16 and section IV-A4.

Differs:
    The paper's face mask is a hull of Dlib's 68 points; ours is an ellipse through five landmarks.
    Eq. 16 leaves open what happens to channels, and the range: here it is their mean, and [-1, 1].
    Where a pack holds maps of parts or heat maps, they are cut and mirrored with the faces; a heat
    map is then that of the whole packed face, not of the crop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from shields.codec import uniform
from shields.masks import components, from_labels
from shields.models.base import Recognizer
from shields.models.heatmaps import heat_map
from shields.models.manipulation import Manipulator
from shields.types import Image, Mask
from trainers.scheme import resized

__all__ = ["RECOGNISED", "SUCCESS", "Heat", "Photos", "cut_faces", "described", "face_distance",
           "photos_of", "plain_name", "success"]  # fmt: skip

Heat = Literal["grad-cam++", "grad-cam", "none"]

#: a face counts as disrupted beyond this distance, where it is recognised less than that as well
SUCCESS, RECOGNISED = 0.05, 0.4


@dataclass(frozen=True, kw_only=True)
class Photos:
    """Clean photos and what depends on them alone."""

    #: (B, 3, S, S), [0, 1]
    face: Image
    #: (B, 5, 2), pixels
    landmarks: Tensor
    #: eyes, brows, nose, mouth and lips
    binary: Mask
    #: what a recognizer goes by; 1 everywhere where none was asked for
    heat: Mask


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A square of packed photos, mirrored or not."""

    top: int
    left: int
    side: int
    mirrored: bool

    @classmethod
    def draw(cls, whole: int, region: tuple[float, float], rng: torch.Generator) -> _Window:
        side = min(whole, round(whole * uniform(region, rng)))
        top, left = (int(torch.randint(whole - side + 1, (), generator=rng)) for _ in range(2))
        mirrored = bool(torch.randint(2, (), generator=rng))
        return cls(top=top, left=left, side=side, mirrored=mirrored)

    def cut(self, packed: Tensor) -> Tensor:
        """(..., W, W) -> (..., side, side), not mirrored."""
        return packed[..., self.top : self.top + self.side, self.left : self.left + self.side]

    def face(self, packed: Tensor, size: int) -> Image:
        face = resized(self.cut(packed).float() / 255, size).clamp(0, 1)
        return face.flip(-1) if self.mirrored else face

    def landmarks(self, packed: Tensor, size: int) -> Tensor:
        offset = torch.tensor([self.left, self.top], device=packed.device)
        points = (packed - offset + 0.5) * (size / self.side) - 0.5
        if not self.mirrored:
            return points
        # What was on the left is on the right.
        points = points[:, [1, 0, 2, 4, 3]]
        return torch.stack([size - 1 - points[..., 0], points[..., 1]], dim=-1)

    def mask(self, cut: Mask, size: int) -> Mask:
        """A mask (B, 1, side, side) of the cut, at another size."""
        mask = resized(cut, size).clamp(0, 1)
        return mask.flip(-1) if self.mirrored else mask


def cut_faces(
    batch: dict[str, Tensor], size: int, region: tuple[float, float], rng: torch.Generator
) -> tuple[Image, Tensor]:
    """Cut one random square for the whole batch, mirrored half of the time.

    Args:
        batch: `face` (B, 3, W, W) uint8 and `landmarks` (B, 5, 2), as `trainers.data` makes them.
        size: Side of the result, pixels.
        region: Smallest and largest share of the packed side that is cut.
        rng: A CPU generator.

    Returns:
        (B, 3, size, size), [0, 1], and the landmarks (B, 5, 2) in its pixels.
    """
    window = _Window.draw(batch["face"].shape[-1], region, rng)
    return window.face(batch["face"], size), window.landmarks(batch["landmarks"], size)


def photos_of(
    batch: dict[str, Tensor],
    size: int,
    region: tuple[float, float],
    recognizer: Recognizer,
    heat: Heat,
    *,
    rng: torch.Generator,
) -> Photos:
    """Cut photos as `cut_faces` does, with both masks: those of the pack, where it has them.

    Args:
        batch: As for `cut_faces`; `parts` and `heat:METHOD:RECOGNIZER`, (B, W, W) uint8, are used
            where they are there, and else computed.
        size: Side of the result, pixels.
        region: Smallest and largest share of the packed side that is cut.
        recognizer: The network that the heat map is of.
        heat: Method, or "none".
        rng: A CPU generator.
    """
    window = _Window.draw(batch["face"].shape[-1], region, rng)
    face = window.face(batch["face"], size)
    landmarks = window.landmarks(batch["landmarks"], size)
    known = f"heat:{heat}:{recognizer.name}"
    photos = described(face, landmarks, recognizer, "none" if known in batch else heat)
    if "parts" in batch:
        parts = from_labels(window.cut(batch["parts"]).long(), ["id-guard-binary"])
        photos = replace(photos, binary=(window.mask(parts, size) >= 0.5).to(face))
    if known in batch:
        warm = window.mask(window.cut(batch[known])[:, None].float() / 255, size)
        # Somewhere it is 1, as after `heat_map`, unless nothing speaks for the person.
        warm = warm / warm.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
        photos = replace(photos, heat=warm)
    return photos


def described(
    face: Image,
    landmarks: Tensor,
    recognizer: Recognizer,
    heat: Heat,
) -> Photos:
    """Add both masks to photos."""
    size = (face.shape[2], face.shape[3])
    binary = components(landmarks, size, ["id-guard-binary"])
    warm = torch.ones_like(binary)
    if heat != "none":
        with torch.autocast(face.device.type, enabled=False):
            warm = heat_map(recognizer, face, landmarks, method=heat).to(face)
    return Photos(face=face, landmarks=landmarks, binary=binary, heat=warm)


def face_distance(clean: Image, protected: Image, mask: Mask) -> Tensor:
    """Eq. 16, (B,): squared difference over the face, mean over channels, in [-1, 1] units."""
    error = (2 * (protected - clean)).square().mean(dim=1, keepdim=True)
    return (error * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)).clamp_min(1)


@torch.no_grad()
def success(
    manipulators: Sequence[Manipulator],
    asked: Sequence[Sequence[str]],
    pair: tuple[Image, Image],
    landmarks: Tensor,
    judge: Recognizer,
) -> dict[str, Tensor]:
    """Measure how forgeries of protected photos differ from those of clean ones.

    Args:
        manipulators: N of them.
        asked: For each, its conditions.
        pair: Clean and protected photos, (B, 3, H, W), [0, 1].
        landmarks: (B, 5, 2), pixels.
        judge: Says how alike two faces are.

    Returns:
        Of each manipulator `success_NAME` (the share that is disrupted), `l2_face_NAME` and
        `identity_NAME`, and the means `success` and `progress`: how far forgeries are on their way
        to both thresholds, 1 where all have arrived.
    """
    face = pair[0]
    mask = components(landmarks, (face.shape[2], face.shape[3]), ["face"])
    matrix = judge.matrix(landmarks, face)
    values: dict[str, Tensor] = {}
    successes, ways = [], []
    for manipulator, names in zip(manipulators, asked, strict=True):
        far, alike = [], []
        for name in names:
            clean, forged = (manipulator(image, name).float().clamp(0, 1) for image in pair)
            far.append(face_distance(clean, forged, mask))
            alike.append((judge(clean, matrix) * judge(forged, matrix)).sum(dim=1))
        distances, similar = torch.cat(far), torch.cat(alike)
        reached = ((distances > SUCCESS) & (similar < RECOGNISED)).float().mean()
        successes.append(reached)
        way = (distances / SUCCESS).clamp(0, 1) + ((1 - similar) / (1 - RECOGNISED)).clamp(0, 1)
        ways.append(way.mean() / 2)
        ending = plain_name(manipulator.name)
        values[f"success_{ending}"] = reached
        values[f"l2_face_{ending}"] = distances.mean()
        values[f"identity_{ending}"] = similar.mean()
    values["success"] = torch.stack(successes).mean()
    values["progress"] = torch.stack(ways).mean()
    return values


def plain_name(name: str) -> str:
    """A name as it may stand in a card, where dots and slashes mean something."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
