"""From a photo to a protected one: detect, crop, protect, composite."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from shields.budget import Budget
from shields.errors import ConfigError, DeviceError, FaceNotFound
from shields.faces import Placement, crop, landmarks_in, paste, place
from shields.models.base import Detector
from shields.photo import quantize
from shields.protectors.base import Protector, ProtectorConfig
from shields.types import Face, Mask, Perturbation, Photo, Progress

__all__ = ["ProtectedPhoto", "Region", "RegionMode", "Shield", "choose_device"]

RegionMode = Literal["face", "photo", "auto"]


def choose_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or `mps` into a device that exists.

    Raises:
        DeviceError: No such device, or not on this machine.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(
            f"no device is called {name!r}; use auto, cpu, cuda, cuda:0 or mps"
        ) from None
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(
            f"device {name!r} was asked for, but this machine offers {count} CUDA devices to "
            "PyTorch; use --device auto or --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device {name!r} was asked for, but this machine has none; use cpu")
    if device.type not in {"cpu", "cuda", "mps"}:
        raise DeviceError(f"device {name!r} is not supported; use auto, cpu, cuda or mps")
    return device


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of the photo that is protected in one piece, and the face in it."""

    placement: Placement
    face: Face | None = None

    def landmarks(self, device: torch.device | str) -> Tensor | None:
        """(1, 5, 2) in pixels of the working image, or None without a face."""
        return None if self.face is None else landmarks_in(self.face, self.placement).to(device)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        box = self.placement
        face = None
        if self.face is not None:
            face = {
                "box": [round(float(value), 2) for value in self.face.box],
                "landmarks": [[round(float(v), 3) for v in point] for point in self.face.landmarks],
                "score": round(float(self.face.score), 4),
            }
        return {
            "left": box.left,
            "top": box.top,
            "width": box.width,
            "height": box.height,
            "size": list(box.size),
            "face": face,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Undo `to_dict`; landmarks come back rounded to thousandths of a pixel."""
        height, width = values["size"]
        placement = Placement(
            left=values["left"],
            top=values["top"],
            width=values["width"],
            height=values["height"],
            size=(height, width),
        )
        if values["face"] is None:
            return cls(placement=placement)
        left, top, right, bottom = values["face"]["box"]
        face = Face(
            box=(left, top, right, bottom),
            landmarks=np.array(values["face"]["landmarks"], dtype=np.float32),
            score=values["face"]["score"],
        )
        return cls(placement=placement, face=face)


@dataclass(frozen=True, kw_only=True)
class ProtectedPhoto:
    """A photo with its perturbation added and rounded, and how it came about."""

    #: (H, W, 3) uint8, within floor(levels) of the photo
    pixels: np.ndarray
    photo: Photo
    regions: tuple[Region, ...]
    method: str
    config: ProtectorConfig
    seed: int
    seconds: float
    #: what the user should know: what reading changed, which region was taken and why
    notes: tuple[str, ...] = ()

    @property
    def faces(self) -> tuple[Face, ...]:
        """The faces that were found, largest first."""
        return tuple(region.face for region in self.regions if region.face is not None)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The rectangles that may have changed."""
        return tuple(region.placement for region in self.regions)


class Shield:
    """Protects photos of any size with one protector.

    Args:
        protector: Computes the perturbation of a working image.
        detector: Finds faces; needed unless `region` is "photo".
        region: "face" protects every face and raises where there is none, "photo" the whole photo,
            "auto" the faces or, without one, the whole photo.
        size: Side of the working image, pixels; the perturbation is resized to the photo.
        margin: Side of the square around a face, in longer sides of its box. Recognizers look at
            about 1.2; more would show more and protect no better.
        seed: With the photo's own content it fixes every draw, so the order of photos is free.
        device: Where working images are put; the protector's networks must be there.
        method: Name for reports; the protector's class where left out.
    """

    def __init__(
        self,
        protector: Protector,
        *,
        detector: Detector | None,
        region: RegionMode = "auto",
        size: int = 256,
        margin: float = 1.6,
        seed: int = 0,
        device: torch.device | str = "cpu",
        method: str | None = None,
    ) -> None:
        if region not in get_args(RegionMode):
            raise ConfigError(f"`region` must be face, photo or auto, got {region!r}")
        if detector is None and region != "photo":
            raise ConfigError(f'`region="{region}"` needs a detector; pass one or use "photo"')
        if size < 64 or size % 8:
            raise ConfigError(f"`size` must be at least 64 pixels, in steps of 8, got {size}")
        self.protector, self.detector = protector, detector
        self.region, self.size, self.margin, self.seed = region, size, margin, seed
        self.device = torch.device(device)
        self.method = method or type(protector).__name__

    def regions(self, photo: Photo) -> tuple[tuple[Region, ...], tuple[str, ...]]:
        """Decide what is protected: the regions, and notes for the user.

        Raises:
            FaceNotFound: `region="face"` and the detector found none.
        """
        faces = self.detector(photo.image(self.device)) if self.detector is not None else []
        if self.region == "photo" or not faces:
            if self.region == "face":
                name = photo.path.name if photo.path is not None else "the photo"
                raise FaceNotFound(
                    f"no face was found in {name}; "
                    "use --region photo to protect the whole photo, or --region auto"
                )
            notes = () if self.region == "photo" else ("no face found: whole photo protected",)
            # The largest face still guides methods that align it, wherever the region came from.
            face = faces[0] if faces else None
            return (Region(placement=place(None, photo, size=self.size), face=face),), notes
        regions = (
            Region(placement=place(face, photo, margin=self.margin, size=self.size), face=face)
            for face in faces
        )
        return tuple(regions), ()

    def protect(self, photo: Photo, *, progress: Progress | None = None) -> ProtectedPhoto:
        """Protect every region of a photo.

        Args:
            photo: As read; it is not changed.
            progress: Called with (steps done, steps in all, mean objective) over all regions.

        Raises:
            FaceNotFound: `region="face"` and there is none.
        """
        began = time.perf_counter()
        regions, notes = self.regions(photo)
        digest = hashlib.sha256(np.ascontiguousarray(photo.pixels).data).hexdigest()
        pixels = photo.pixels.copy()
        for index, region in enumerate(regions):
            # Later regions see what earlier ones did to the pixels they share.
            perturbation = self._perturb(
                replace(photo, pixels=pixels),
                regions,
                index,
                rng=_generator(self.seed, digest, index),
                progress=_part(progress, index, len(regions)),
            )
            full = paste(perturbation.cpu(), region.placement)
            _composite(pixels, photo.pixels, full, region.placement, self.protector.config.budget)
        return ProtectedPhoto(
            pixels=pixels,
            photo=photo,
            regions=regions,
            method=self.method,
            config=self.protector.config,
            seed=self.seed,
            seconds=time.perf_counter() - began,
            notes=(*photo.notes, *notes),
        )

    def _perturb(
        self,
        photo: Photo,
        regions: Sequence[Region],
        index: int,
        *,
        rng: torch.Generator,
        progress: Progress | None,
    ) -> Perturbation:
        region = regions[index]
        image, mask = crop(photo, region.placement, self.device)
        mask = mask * _ownership(regions, index).to(mask)
        return self.protector(
            image, mask, rng=rng, landmarks=region.landmarks(self.device), progress=progress
        )


def _generator(seed: int, digest: str, index: int) -> torch.Generator:
    """A generator for one region of one photo, the same wherever the photo stands in a folder."""
    text = f"{seed}/{digest}/{index}".encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)


def _part(progress: Progress | None, index: int, count: int) -> Progress | None:
    if progress is None:
        return None

    def report(done: int, total: int, value: float) -> None:
        progress(index * total + done, count * total, value)

    return report


def _ownership(regions: Sequence[Region], index: int) -> Mask:
    """Which pixels of a working image are this region's: (1, 1, h, w), 0 or 1.

    Where rectangles overlap, a pixel belongs to the face that is nearer in units of its own size,
    so that no face undoes what protects another.
    """
    own = regions[index].placement
    height, width = own.size
    x = own.left + (np.arange(width) + 0.5) * own.width / width
    y = (own.top + (np.arange(height) + 0.5) * own.height / height)[:, None]
    mine = np.ones((height, width), dtype=bool)
    distance = _distance(own, x, y)
    for other, region in enumerate(regions):
        box = region.placement
        if other == index:
            continue
        inside = (x >= box.left) & (x < box.left + box.width)
        inside = inside & (y >= box.top) & (y < box.top + box.height)
        theirs = _distance(box, x, y)
        nearer = theirs <= distance if other < index else theirs < distance
        mine &= ~(inside & nearer)
    return torch.from_numpy(mine)[None, None].float()


def _distance(box: Placement, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across = (x - box.left - box.width / 2) / box.width
    down = (y - box.top - box.height / 2) / box.height
    return np.asarray(across**2 + down**2)


def _composite(
    pixels: np.ndarray,
    original: np.ndarray,
    perturbation: Perturbation,
    box: Placement,
    budget: Budget,
) -> None:
    """Add a region's perturbation (1, 3, height, width) to `pixels` in place, in whole levels.

    What may move is counted from the original, whatever other regions have added already.
    """
    clean, present = original[box.region], pixels[box.region]
    if not np.array_equal(clean, present):
        added = torch.from_numpy(present.astype(np.int16) - clean).permute(2, 0, 1)
        perturbation = perturbation + added[None] / 255
    pixels[box.region] = quantize(clean, perturbation, budget)
