"""Pack face photos into one memory-mapped file, so that a trainer never decodes an image twice.

A pack is a safetensors file: `faces` (N, size, size, 3) uint8, `landmarks` (N, 5, 2) float32 in
pixels of the packed face, `identity` (N,) int64; the names of identities and skipped files are in
its metadata. A folder is an identity where photos lie in folders, else each photo is one.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from facenet_pytorch import MTCNN
from PIL import Image as PILImage
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from shields.errors import ImageError

__all__ = ["PackReport", "pack", "read_photos"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a pack holds and what it left out."""

    faces: int
    identities: int
    skipped: dict[str, str]


def read_photos(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path inside the source, file content) of a folder or a tar, in a fixed order."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in _SUFFIXES:
                yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    try:
        archive = tarfile.open(source)  # noqa: SIM115  closed below
    except (tarfile.TarError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(f"{source} is neither a folder nor a tar of photos: {reason}") from error
    with archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        for member in sorted(members, key=lambda member: member.name):
            if PurePosixPath(member.name).suffix.lower() in _SUFFIXES:
                content = archive.extractfile(member)
                assert content is not None, "isfile() members have content"
                yield member.name, content.read()


def _identity(name: str) -> str:
    """Name the person: the folder if there is one above the file, else the file itself."""
    path = PurePosixPath(name)
    return path.parent.name if len(path.parts) > 1 else path.stem


def _crop(
    image: PILImage.Image, box: np.ndarray, points: np.ndarray, size: int, margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a square of `margin` times the larger side of the box; edges are continued outwards."""
    center = (box[:2] + box[2:]) / 2
    side = margin * float((box[2:] - box[:2]).max())
    corner = center - side / 2
    scale = size / side
    pad = int(np.ceil(max(0.0, -corner.min(), *(corner + side - np.array(image.size))))) + 1
    padded = np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    low = tuple(corner + pad)
    high = tuple(corner + pad + side)
    face = PILImage.fromarray(padded).resize(
        (size, size), PILImage.Resampling.LANCZOS, box=(*low, *high)
    )
    return np.asarray(face), (points - corner) * scale


def pack(source: Path, output: Path, *, size: int = 160, margin: float = 1.8) -> PackReport:
    """Cut the face nearest to each photo's middle and write the pack; bad files are only named.

    Args:
        source: A folder of photos or a tar of them.
        output: The safetensors file to write.
        size: Side of a packed face, pixels.
        margin: Side of the square that is cut, as a multiple of the detected box.

    Raises:
        ImageError: There is no face at all, or the source is neither a folder nor a tar.
    """
    detector = MTCNN(min_face_size=40, keep_all=True)
    faces, landmarks, identities = [], [], []
    names: dict[str, int] = {}
    skipped: dict[str, str] = {}
    photos = list(read_photos(source))
    console = Console(stderr=True)
    for name, content in track(photos, description=f"packing {source.name}", console=console):
        try:
            image = PILImage.open(io.BytesIO(content)).convert("RGB")
        except Exception as error:  # decoders raise anything on damaged data
            skipped[name] = str(error)
            continue
        boxes, _, points = detector.detect(image, landmarks=True)
        if boxes is None:
            skipped[name] = "no face"
            continue
        boxes, points = boxes.astype(float), points.astype(float)
        # The subject of a portrait data set stands in the middle; bystanders may be as large.
        middle = np.array(image.size) / 2
        distance = np.linalg.norm((boxes[:, :2] + boxes[:, 2:]) / 2 - middle, axis=1)
        best = int(np.argmin(distance))
        face, point = _crop(image, boxes[best], points[best], size, margin)
        faces.append(torch.from_numpy(face.copy()))
        landmarks.append(torch.from_numpy(point).float())
        identities.append(names.setdefault(_identity(name), len(names)))
    if not faces:
        raise ImageError(f"no face was found in any of the {len(photos)} photos of {source}")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "faces": torch.stack(faces),
            "landmarks": torch.stack(landmarks),
            "identity": torch.tensor(identities),
        },
        output,
        metadata={"identities": json.dumps(list(names)), "skipped": json.dumps(skipped)},
    )
    return PackReport(faces=len(faces), identities=len(names), skipped=skipped)
