"""Single steps of a suite: find a file, cut a photo to size, forge, round."""

from __future__ import annotations

import hashlib
from glob import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage

from shields.errors import ImageError
from shields.models.manipulation import Editor, Manipulator, resized
from shields.photo import READABLE
from shields.types import Image

__all__ = ["beside", "drawn", "file_digest", "forge", "levels", "square"]


def file_digest(path: Path) -> str:
    """Hash of a photo's file; a missing one is said as `read` says it."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"{path} cannot be opened: {error.strerror}") from error


def beside(folder: Path, photo: Path) -> Path:
    """The file of a folder that is named as a photo, never the photo; a file stands for itself."""
    if folder.is_file():
        return folder
    for stem in (f"{photo.stem}-protected", photo.stem):
        for path in sorted(folder.glob(f"{escape(stem)}.*")):
            # `a.*` is also `a.b.png`, of another photo.
            named = path.stem == stem and path.suffix.lower() in READABLE
            if named and path.resolve() != photo.resolve():
                return path
    raise ImageError(f"there is no {photo.stem}.png, or of another format, in {folder}")


def drawn(seed: int, photo: str) -> int:
    """The seed with which a photo is handled, whatever protects it.

    Photos must not share their draws, or an angle or a quality is drawn once for all of them; a
    photo and its protected copies must.

    Args:
        seed: Of the suite.
        photo: Digest of the clean photo.
    """
    return int(hashlib.sha256(f"{seed} {photo}".encode()).hexdigest()[:7], 16)


def square(pixels: np.ndarray, size: int) -> np.ndarray:
    """The centre square, resized by Lanczos."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = PillowImage.fromarray(pixels[top : top + side, left : left + side])
    return np.array(square.resize((size, size), PillowImage.Resampling.LANCZOS))


@torch.no_grad()
def forge(forger: Manipulator | Editor, image: Image, condition: str, seed: int) -> Image:
    """Forge (1, 3, H, W), [0, 1]; sides that the network cannot take are resized and back."""
    if isinstance(forger, Editor):
        return forger.edit(image, [condition], seeds=[seed])
    height, width = image.shape[2:]
    if forger.native_size is not None:
        return forger(image, condition)
    multiple = forger.multiple
    legal = [max(1, round(side / multiple)) * multiple for side in (height, width)]
    forged = forger(resized(image, (legal[0], legal[1])), condition)
    return resized(forged, (height, width))


def levels(image: Image) -> np.ndarray:
    """Round (1, 3, H, W) to (H, W, 3) uint8."""
    if not bool(image.isfinite().all()):
        raise ImageError("the forgery has values that are not finite")
    levels = (image[0].float().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()
