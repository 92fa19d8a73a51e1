"""ID-Guard's training photos with their masks, and its measure of success.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, Eq. 16 and section IV-A4.

Differs:
    The paper's face mask is a hull of Dlib's 68 points; ours is an ellipse through five landmarks.
    Eq. 16 leaves open what happens to channels, and the range: here it is their mean, and [-1, 1].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shields.codec import uniform
from shields.masks import components
from shields.models.base import Recognizer
from shields.models.heatmaps import heat_map
from shields.models.manipulation import Manipulator
from shields.types import Image, Mask
from trainers.scheme import resized

__all__ = ["RECOGNISED", "SUCCESS", "Photos", "cut_faces", "described", "face_distance",
           "plain_name", "success"]  # fmt: skip

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
    packed = batch["face"]
    whole = packed.shape[-1]
    side = min(whole, round(whole * uniform(region, rng)))
    top, left = (int(torch.randint(whole - side + 1, (), generator=rng)) for _ in range(2))
    cut = packed[..., top : top + side, left : left + side].float() / 255
    offset = torch.tensor([left, top], device=packed.device)
    points = (batch["landmarks"] - offset + 0.5) * (size / side) - 0.5
    face = resized(cut, size).clamp(0, 1)
    if int(torch.randint(2, (), generator=rng)):
        face = face.flip(-1)
        # What was on the left is on the right.
        points = points[:, [1, 0, 2, 4, 3]]
        points = torch.stack([size - 1 - points[..., 0], points[..., 1]], dim=-1)
    return face, points


def described(
    face: Image,
    landmarks: Tensor,
    recognizer: Recognizer,
    heat: Literal["grad-cam++", "grad-cam", "none"],
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
        `identity_NAME`, and the mean `success`.
    """
    face = pair[0]
    mask = components(landmarks, (face.shape[2], face.shape[3]), ["face"])
    matrix = judge.matrix(landmarks, face)
    values: dict[str, Tensor] = {}
    successes = []
    for manipulator, names in zip(manipulators, asked, strict=True):
        far, alike = [], []
        for name in names:
            clean, forged = (manipulator(image, name).float().clamp(0, 1) for image in pair)
            far.append(face_distance(clean, forged, mask))
            alike.append((judge(clean, matrix) * judge(forged, matrix)).sum(dim=1))
        distances, similar = torch.cat(far), torch.cat(alike)
        reached = ((distances > SUCCESS) & (similar < RECOGNISED)).float().mean()
        successes.append(reached)
        ending = plain_name(manipulator.name)
        values[f"success_{ending}"] = reached
        values[f"l2_face_{ending}"] = distances.mean()
        values[f"identity_{ending}"] = similar.mean()
    values["success"] = torch.stack(successes).mean()
    return values


def plain_name(name: str) -> str:
    """A name as it may stand in a card, where dots and slashes mean something."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)
