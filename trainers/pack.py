"""Pack face photos into one memory-mapped file, so that a trainer never decodes an image twice.

A pack is a safetensors file: `faces` (N, size, size, 3) uint8, `landmarks` (N, 5, 2) float32 in
pixels of the packed face, `identity` (N,) int64, and `labels` (N, attributes) int8, 1, 0 or -1 for
unknown; the names of files, identities, attributes and skipped files are in its metadata. Where
they were asked for, it also holds `parts` (N, size, size) uint8, indices into
`shields.masks.CLASSES`, and `heat:METHOD:RECOGNIZER` (N, size, size) uint8.
"""

from __future__ import annotations

import csv
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from facenet_pytorch import MTCNN
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from shields.errors import ConfigError, ImageError
from shields.masks import CLASSES
from trainers.data import FacePack
from trainers.draft import Draft
from trainers.pack_masks import Wanted, add_layers
from trainers.sources import Entry, Source, gather

__all__ = ["Attribute", "Cutter", "PackReport", "fill", "pack", "read_labels"]

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")
#: as many as `shields.photo.read` takes
_MOST_PIXELS = 120_000_000
#: the smallest face that is looked for, and the largest side in which it is, pixels
_LEAST_FACE, _LOOKED_AT = 40, 640


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

    def label(self, fields: Mapping[str, str]) -> int:
        """1, 0, or -1 for unknown."""
        return {self.yes: 1, self.no: 0}.get(fields.get(self.column, ""), -1)


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
        labels[name] = [item.label(row) for item in attributes]
    return labels


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a pack holds and what it left out."""

    faces: int
    identities: int
    skipped: dict[str, str]
    #: faces of which every attribute is known
    labelled: int = 0
    #: photos that an earlier, interrupted call had done
    resumed: int = 0


class Cutter:
    """Finds the face nearest to a photo's middle, and cuts it out.

    Args:
        size: Side of a packed face, pixels.
        margin: Side of the square that is cut, as a multiple of the detected box.
    """

    def __init__(self, size: int, margin: float) -> None:
        if size < 8 or not margin > 0:
            raise ConfigError(f"faces need 8 pixels and a margin above 0, got {size} and {margin}")
        self.size, self.margin = size, margin
        self._detector = MTCNN(min_face_size=_LEAST_FACE, keep_all=True)

    def __call__(
        self, image: PILImage.Image, parts: np.ndarray | None = None
    ) -> tuple[np.ndarray, Tensor, np.ndarray | None]:
        """Cut (size, size, 3) uint8, landmarks (5, 2) float32 in its pixels, and the parts.

        Raises:
            ImageError: There is no face.
        """
        box, points = self._found(image)
        center = (box[:2] + box[2:]) / 2
        side = self.margin * float((box[2:] - box[:2]).max())
        corner = center - side / 2
        landmarks = torch.from_numpy((points - corner) * (self.size / side)).float()
        face = self._cut(np.asarray(image), corner, side, PILImage.Resampling.LANCZOS)
        if parts is None:
            return face, landmarks, None
        # Masks may be of another resolution than their photo.
        scale = np.array(parts.shape[::-1]) / np.array(image.size)
        if abs(scale[0] / scale[1] - 1) > 0.02:
            raise ImageError(f"its masks are {parts.shape[::-1]}, of another shape than the photo")
        nearest = PILImage.Resampling.NEAREST
        return face, landmarks, self._cut(parts, corner * scale, side * float(scale[0]), nearest)

    def _found(self, image: PILImage.Image) -> tuple[np.ndarray, np.ndarray]:
        """Box (4,) and landmarks (5, 2) of the subject, pixels of the photo."""
        if min(image.size) < _LEAST_FACE:
            raise ImageError(f"too small: {image.width}x{image.height} pixels")
        shrink = max(1.0, max(image.size) / _LOOKED_AT)
        seen = image
        if shrink > 1:
            seen = image.resize((round(image.width / shrink), round(image.height / shrink)))
        if min(seen.size) < _LEAST_FACE:
            raise ImageError(f"too narrow: {image.width}x{image.height} pixels")
        boxes, _, points = self._detector.detect(seen, landmarks=True)
        if boxes is None:
            raise ImageError("no face")
        boxes, points = boxes.astype(float) * shrink, points.astype(float) * shrink
        # The subject of a portrait data set stands in the middle; bystanders may be as large.
        middle = np.array(image.size) / 2
        distance = np.linalg.norm((boxes[:, :2] + boxes[:, 2:]) / 2 - middle, axis=1)
        best = int(np.argmin(distance))
        return boxes[best], points[best]

    def _cut(
        self, pixels: np.ndarray, corner: np.ndarray, side: float, kernel: PILImage.Resampling
    ) -> np.ndarray:
        """Cut a square; edges are continued outwards."""
        height, width = pixels.shape[:2]
        beyond = (corner + side - np.array([width, height])).max()
        pad = int(np.ceil(max(0.0, -corner.min(), beyond))) + 1
        edges = ((pad, pad), (pad, pad), (0, 0))[: pixels.ndim]
        padded = np.pad(pixels, edges, mode="edge")
        low, high = tuple(corner + pad), tuple(corner + pad + side)
        face = PILImage.fromarray(padded).resize((self.size, self.size), kernel, box=(*low, *high))
        return np.array(face)


def _decoded(content: bytes) -> PILImage.Image:
    """Decode a photo, upright, RGB.

    Raises:
        ImageError: It is none, or announces too many pixels.
    """
    if not content:
        raise ImageError("empty (0 bytes)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is an error here
        try:
            image = PILImage.open(io.BytesIO(content), formats=_FORMATS)
        except UnidentifiedImageError:
            raise ImageError(f"no photo; read are {', '.join(_FORMATS)}") from None
        if image.width * image.height > _MOST_PIXELS:
            raise ImageError(f"too large: {image.width}x{image.height} pixels")
        return ImageOps.exif_transpose(image).convert("RGB")


def fill(
    draft: Draft, source: Source, cutter: Cutter, attributes: Sequence[Attribute] = (),
    table: Mapping[str, list[int]] | None = None,
) -> None:  # fmt: skip
    """Go through a source, with a bar, from where the draft stands.

    Args:
        draft: Gets the faces, and the reasons why others are left out.
        source: The photos.
        cutter: Finds faces.
        attributes: The labels that are kept.
        table: Bare file name -> labels; the source's own fields tell them where left out.

    Raises:
        ConfigError: The source has changed since the draft was begun, or lacks a label.
    """
    done = len(draft.rows)
    bar = track(
        source.entries, description="packing", total=source.total, console=Console(stderr=True)
    )
    for place, entry in enumerate(bar):
        if place < done:
            if entry.name != draft.rows[place]["name"]:
                raise ConfigError(
                    f"{draft.folder} was begun with other photos ({draft.rows[place]['name']}, now "
                    f"{entry.name}); put them back, or remove it"
                )
            continue
        absent = [item.column for item in attributes if item.column not in entry.fields]
        if table is None and entry.fields and absent:
            raise ConfigError(
                f"{entry.name} has no field {absent[0]!r}; it has: {', '.join(entry.fields)}"
            )
        if table is None:
            labels = [item.label(entry.fields) for item in attributes]
        else:
            labels = table.get(PurePosixPath(entry.name).name, [-1] * len(attributes))
        _take(draft, entry, cutter, labels)


def _take(draft: Draft, entry: Entry, cutter: Cutter, labels: list[int]) -> None:
    try:
        image = _decoded(entry.read())
        wanted = draft.parts is not None and entry.parts is not None
        shown = entry.parts() if wanted and entry.parts is not None else None
        face, landmarks, parts = cutter(image, shown)
        if draft.parts is not None and parts is None:
            raise ImageError("it has no masks")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise anything on damaged data
        draft.skip(entry.name, " ".join(str(error).split()) or type(error).__name__)
        return
    known = {"identity": entry.identity, "landmarks": landmarks.tolist(), "labels": labels}
    draft.add(entry.name, face, parts, known)


def pack(
    source: Path | str | Sequence[Path | str],
    output: Path,
    *,
    size: int = 160,
    margin: float = 1.8,
    labels: Path | None = None,
    attributes: Sequence[Attribute] = (),
    identity: str = "",
    masks: str = "",
    heat: str = "",
    device: str = "cpu",
) -> PackReport:
    """Cut the face nearest to each photo's middle and write the pack; bad files are only named.

    A call that was interrupted is gone on with by the same call; the output appears at its end.

    Args:
        source: What `trainers.sources.gather` reads, one or several; or one pack, to which masks
            and heat maps are added, all else staying as it is.
        output: The safetensors file to write.
        size: Side of a packed face, pixels.
        margin: Side of the square that is cut, as a multiple of the detected box.
        labels: A CSV with a column `file` that tells attributes of the photos; the source's own
            fields where left out.
        attributes: Which labels are wanted.
        identity: The field of the source that names a person.
        masks: "landmarks", "parser:NAME", "source", or "" for none.
        heat: "METHOD:RECOGNIZER", or "" for none.
        device: Where the networks for masks and heat maps run.

    Raises:
        ConfigError: The settings or the table of labels cannot be used, or a draft of another pack
            is in the way.
        ImageError: There is no face at all, or the source is none.
        OutputError: The output cannot be written.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    wanted = Wanted(masks, heat, device)
    if len(sources) == 1 and Path(sources[0]).suffix == ".safetensors":
        if labels is not None or attributes or identity or wanted.from_source:
            raise ConfigError("to a pack only --masks and --heat are added; pack the photos anew")
        return _extended(Path(sources[0]), output, wanted)
    if labels is not None and not attributes:
        raise ConfigError("labels need both a table and the attributes to read from it, got one")
    table = read_labels(labels, attributes) if labels is not None else None
    if table is not None and not table:
        raise ConfigError(f"{labels} has no rows")
    opened = gather(sources, identity=identity)
    if attributes and table is None and not opened.has_fields:
        raise ConfigError("labels need both a table and the attributes to read from it, got one")
    if wanted.from_source and not opened.has_parts:
        raise ConfigError("this source has no masks of its own; use --masks landmarks")
    attributes = attributes or [
        Attribute(name=name, column=name, yes="1", no="-1") for name in opened.attributes
    ]
    settings = {
        "source": [str(Path(path).absolute()) for path in sources], "size": size, "margin": margin,
        "identity": identity, "labels": labels, "attributes": attributes,
        "masks": wanted.from_source,
    }  # fmt: skip
    cutter, _ = Cutter(size, margin), wanted.maps  # what cannot be loaded is said at once
    with Draft(output, settings, size, parts=wanted.from_source) as draft:
        before = len(draft.rows)
        fill(draft, opened, cutter, attributes, table)
        return _written(draft, wanted, attributes, before)


def _written(
    draft: Draft, wanted: Wanted, attributes: Sequence[Attribute], resumed: int
) -> PackReport:
    """Join what a draft holds, add maps, and write the pack."""
    rows = [row for row in draft.rows if "skipped" not in row]
    skipped = {row["name"]: str(row["skipped"]) for row in draft.rows if "skipped" in row}
    if not rows:
        first = f" ({next(iter(skipped.items()))})" if skipped else ""
        raise ImageError(f"no face was found in any of the {len(skipped)} photos{first}")
    people = {name: place for place, name in enumerate(dict.fromkeys(r["identity"] for r in rows))}
    tensors = {
        "faces": draft.faces.tensor(),
        "landmarks": torch.tensor([row["landmarks"] for row in rows]),
        "identity": torch.tensor([people[row["identity"]] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.int8).reshape(
            len(rows), -1
        ),
    }
    if draft.parts is not None:
        tensors["parts"] = draft.parts.tensor()
    tensors |= add_layers(draft, tensors, len(people), wanted)
    metadata: dict[str, object] = {
        "identities": list(people),
        "files": [row["name"] for row in rows],
        "skipped": skipped,
        "attributes": [item.name for item in attributes],
    }
    draft.finish(tensors, metadata | _about(tensors, wanted))
    known = sum(-1 not in row["labels"] for row in rows) if attributes else 0
    return PackReport(
        faces=len(rows), identities=len(people), skipped=skipped, labelled=known, resumed=resumed
    )


def _about(tensors: Mapping[str, Tensor], wanted: Wanted) -> dict[str, object]:
    return {"classes": CLASSES, "masks": wanted.masks} if "parts" in tensors else {}


def _extended(path: Path, output: Path, wanted: Wanted) -> PackReport:
    """Copy a pack and add maps to it."""
    if not (wanted.masks or wanted.heat):
        raise ConfigError(f"{path} is a pack already; --masks or --heat says what to add")
    FacePack(path, validation=False)  # complains where it is none
    with safe_open(path, framework="pt") as archive:
        tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        notes = {key: json.loads(value) for key, value in archive.metadata().items()}
    people = len(notes["identities"])
    size = int(tensors["faces"].shape[1])
    settings = {"pack": path.absolute()}
    with Draft(output, settings, size) as draft:
        made = add_layers(draft, tensors, people, wanted)
        about = _about(made, wanted)
        draft.finish(tensors | made, notes | about)
    return PackReport(faces=len(tensors["faces"]), identities=people, skipped={})
