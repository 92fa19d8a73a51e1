"""Pack face photos into one memory-mapped file, so that a trainer never decodes an image twice.

A pack is a safetensors file: `faces` (N, size, size, 3) uint8, `landmarks` (N, 5, 2) float32 in
pixels of the packed face, `identity` (N,) int64, and `labels` (N, attributes) int8, 1, 0 or -1 for
unknown; the names of files, identities, attributes and skipped files are in its metadata. A folder
is an identity where photos lie in folders, else each photo is one.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from facenet_pytorch import MTCNN
from PIL import Image as PILImage
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from shields.errors import ConfigError, ImageError

__all__ = ["Attribute", "PackReport", "pack", "read_labels", "read_photos"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A label that stands in a column of a table: `Smiling=expression:happiness|neutral`."""

    name: str
    column: str
    yes: str
    no: str

    @classmethod
    def parse(cls, text: str) -> Attribute:
        """Read `NAME=COLUMN:YES|NO`.

        Raises:
            ConfigError: The text is laid out otherwise.
        """
        found = re.fullmatch(r"([^=]+)=([^:]+):([^|]+)\|([^|]+)", text)
        if found is None:
            raise ConfigError(f"an attribute is written NAME=COLUMN:YES|NO, got {text!r}")
        name, column, yes, no = found.groups()
        return cls(name=name, column=column, yes=yes, no=no)


def read_labels(table: Path, attributes: Sequence[Attribute]) -> dict[str, list[int]]:
    """Read a CSV with a column `file`: file's bare name -> 1, 0 or -1 (unknown) per attribute.

    Raises:
        ConfigError: The table cannot be read, or lacks a column.
    """
    try:
        with table.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table} cannot be read: {error}") from error
    columns = list(rows[0]) if rows else []
    absent = [
        name for name in ("file", *(item.column for item in attributes)) if name not in columns
    ]
    if absent:
        raise ConfigError(f"{table} lacks the column {absent[0]!r}; it has: {', '.join(columns)}")
    labels: dict[str, list[int]] = {}
    for row in rows:
        name = PurePosixPath(row["file"] or "").name
        if name in labels:
            raise ConfigError(f"{table} names {name!r} twice; bare file names must be unique")
        labels[name] = [{item.yes: 1, item.no: 0}.get(row[item.column], -1) for item in attributes]
    return labels


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a pack holds and what it left out."""

    faces: int
    identities: int
    skipped: dict[str, str]
    #: faces of which every attribute is known
    labelled: int = 0


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


def pack(
    source: Path,
    output: Path,
    *,
    size: int = 160,
    margin: float = 1.8,
    labels: Path | None = None,
    attributes: Sequence[Attribute] = (),
) -> PackReport:
    """Cut the face nearest to each photo's middle and write the pack; bad files are only named.

    Args:
        source: A folder of photos or a tar of them.
        output: The safetensors file to write.
        size: Side of a packed face, pixels.
        margin: Side of the square that is cut, as a multiple of the detected box.
        labels: A CSV with a column `file` that tells attributes of the photos.
        attributes: Which of its columns are wanted.

    Raises:
        ConfigError: The table of labels cannot be used.
        ImageError: There is no face at all, or the source is neither a folder nor a tar.
    """
    if (labels is None) != (not attributes):
        raise ConfigError("labels need both a table and the attributes to read from it, got one")
    table = read_labels(labels, attributes) if labels is not None else {}
    if labels is not None and not table:
        raise ConfigError(f"{labels} has no rows")
    detector = MTCNN(min_face_size=40, keep_all=True)
    faces, landmarks, identities, files = [], [], [], []
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
        files.append(name)
        identities.append(names.setdefault(_identity(name), len(names)))
    if not faces:
        raise ImageError(f"no face was found in any of the {len(photos)} photos of {source}")
    output.parent.mkdir(parents=True, exist_ok=True)
    unknown = [-1] * len(attributes)
    known = [table.get(PurePosixPath(name).name, unknown) for name in files]
    lists = {"identities": list(names), "files": files, "skipped": skipped,
             "attributes": [item.name for item in attributes]}  # fmt: skip
    save_file(
        {
            "faces": torch.stack(faces),
            "landmarks": torch.stack(landmarks),
            "identity": torch.tensor(identities),
            "labels": torch.tensor(known, dtype=torch.int8).reshape(len(files), -1),
        },
        output,
        metadata={key: json.dumps(value) for key, value in lists.items()},
    )
    labelled = sum(-1 not in row for row in known) if attributes else 0
    return PackReport(faces=len(faces), identities=len(names), skipped=skipped, labelled=labelled)
