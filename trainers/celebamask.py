"""CelebAMask-HQ as its authors lay it out: photos, masks of single components, attributes.

Source:
    MaskGAN (Lee et al., 2020), https://arxiv.org/abs/1907.11922: 30,000 photos of CelebA-HQ, up to
    18 masks each of 512x512 pixels, in folders of 2,000 photos.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from shields.errors import ConfigError, ImageError
from shields.masks import CLASSES
from trainers.sources import Entry, Source

__all__ = ["celebamask", "is_celebamask", "label_map"]

_PHOTOS, _MASKS = "CelebA-HQ-img", "CelebAMask-HQ-mask-anno"
_ATTRIBUTES, _MAPPING = "CelebAMask-HQ-attribute-anno.txt", "CelebA-HQ-to-CelebA-mapping.txt"
#: CelebA's own list of people, which may be laid beside
_PEOPLE = "identity_CelebA.txt"
_PER_FOLDER = 2000
#: Masks overlap: skin runs under the features, frames of glasses over the eyes that they show.
_PAINTED = (
    "neck", "cloth", "skin", "l_ear", "r_ear", "ear_r", "neck_l", "nose", "eye_g", "l_eye",
    "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip", "hair", "hat",
)  # fmt: skip


def is_celebamask(folder: Path) -> bool:
    """Whether a folder has this layout."""
    return (folder / _PHOTOS).is_dir() and (folder / _MASKS).is_dir()


def celebamask(folder: Path) -> Source:
    """Read the layout: photos in the order of their numbers, each with its masks and attributes.

    People are told apart by CelebA's list, `identity_CelebA.txt`, where it lies in the folder; else
    a photo is a person, by its name in CelebA. Fields are the forty attributes, "1" or "-1".

    Raises:
        ConfigError: The lists of attributes or of names are damaged.
    """
    names, told = _attributes(folder / _ATTRIBUTES)
    people = _people(folder)
    photos = [path for path in (folder / _PHOTOS).iterdir() if path.suffix == ".jpg"]
    numbered = sorted((int(path.stem), path) for path in photos if path.stem.isdigit())
    entries = [
        Entry(
            name=path.name,
            identity=people.get(number, path.stem),
            read=path.read_bytes,
            fields=told.get(path.name, {}),
            parts=partial(label_map, folder / _MASKS, number),
        )
        for number, path in numbered
    ]
    return Source(
        entries=entries,
        total=len(entries),
        attributes=names,
        has_fields=bool(names),
        has_parts=True,
    )


def label_map(masks: Path, number: int) -> np.ndarray:
    """Join the masks of one photo: (H, W) uint8, indices into `shields.masks.CLASSES`.

    Args:
        masks: The folder of all masks.
        number: The photo's.

    Raises:
        ImageError: It has no mask, one is damaged, or they differ in size.
    """
    folder = masks / str(number // _PER_FOLDER)
    labels: np.ndarray | None = None
    for name in _PAINTED:
        path = folder / f"{number:05d}_{name}.png"
        if not path.is_file():
            continue
        shown = _mask(path)
        if labels is None:
            labels = np.zeros(shown.shape, np.uint8)
        if shown.shape != labels.shape:
            raise ImageError(f"{path.name} is of another size than the other masks of its photo")
        labels[shown] = CLASSES.index(name)
    if labels is None:
        raise ImageError(f"no mask {number:05d}_*.png in {folder}")
    return labels


def _mask(path: Path) -> np.ndarray:
    try:
        with PILImage.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as image:
            return np.asarray(image.convert("L")) > 127
    except Exception as error:  # decoders raise anything on damaged data
        raise ImageError(f"the mask {path.name} is damaged: {error}") from error


def _lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _attributes(path: Path) -> tuple[Sequence[str], Mapping[str, Mapping[str, str]]]:
    """Names of the attributes, and file -> attribute -> "1" or "-1"."""
    if not path.is_file():
        return (), {}
    lines = _lines(path)
    names = lines[1] if len(lines) > 1 else []  # the first holds their count
    told = {row[0]: dict(zip(names, row[1:], strict=False)) for row in lines[2:] if row}
    wrong = [name for name, values in told.items()
             if len(values) != len(names) or set(values.values()) - {"1", "-1"}]  # fmt: skip
    if not names or wrong:
        raise ConfigError(
            f"{path} must have a count, a line of names, and a line of 1 and -1 for each photo; "
            f"the line of {wrong[0] if wrong else 'names'} is otherwise"
        )
    return names, told


def _people(folder: Path) -> dict[int, str]:
    """Number of the photo -> who it shows, as far as the lists tell."""
    if not (folder / _MAPPING).is_file():
        return {}
    rows = [row for row in _lines(folder / _MAPPING) if len(row) == 3 and row[0].isdigit()]
    files = {int(number): original for number, _, original in rows}
    if not (folder / _PEOPLE).is_file():
        return files
    known = {row[0]: f"celeba-{row[1]}" for row in _lines(folder / _PEOPLE) if len(row) == 2}
    return {number: known.get(original, original) for number, original in files.items()}
