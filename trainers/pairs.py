"""Pack pairs of photos, clean and protected by whatever tool, for `trainers.purifier`.

The file is a pack as `trainers.pack` makes it, with six channels instead of three: the clean
photo's, then the protected one's. Nothing is resized, because what a protector adds would change;
squares are cut where it changed most, so that no face has to be found.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

from shields.errors import ImageError, OutputError, ShieldsError
from shields.files import aside
from shields.photo import READABLE, read
from trainers.pack import PackReport

__all__ = ["pack_pairs"]

#: what `shields protect` adds to a name
_MARK = "-protected"
_CORNERS = [[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [1.0, 1.0]]


def pack_pairs(clean: Path, protected: Path, output: Path, *, size: int = 160) -> PackReport:
    """Cut the same square out of clean and of protected photos and write the pack.

    Args:
        clean: A folder of photos.
        protected: A folder of the same photos, protected, under the same names; the ending may
            differ, and `-protected` may stand before it. May be the same folder.
        output: The safetensors file to write.
        size: Side of the square, pixels.

    Returns:
        What was packed; photos that could not be used are only named.

    Raises:
        ImageError: No pair could be used.
        OutputError: The file cannot be written.
    """
    found = {_key(path, protected): path for path in _photos(protected)}
    photos = [path for path in _photos(clean) if not path.stem.endswith(_MARK)]
    squares, people, files = [], [], []
    names: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for path in track(photos, description="packing pairs", console=Console(stderr=True)):
        name = path.relative_to(clean).as_posix()
        try:
            squares.append(_square(path, found.get(_key(path, clean)), size))
        except ShieldsError as error:
            skipped[name] = str(error)
            continue
        files.append(name)
        # A folder is a person where photos lie in folders, as in other packs.
        person = path.parent.name if path.parent != clean else path.stem
        people.append(names.setdefault(person, len(names)))
    if not squares:
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in list(skipped)[:3])
        raise ImageError(
            f"no pair of {clean} and {protected} can be used ({reasons or 'there are no photos'})"
        )
    lists = {"identities": list(names), "files": files, "skipped": skipped, "attributes": []}
    tensors = {
        "faces": torch.from_numpy(np.stack(squares)),
        # Of squares no landmarks are known, and nobody asks; their corners stand for them.
        "landmarks": torch.tensor(_CORNERS).repeat(len(squares), 1, 1) * size,
        "identity": torch.tensor(people),
    }
    _write(tensors, {key: json.dumps(value) for key, value in lists.items()}, output)
    return PackReport(faces=len(squares), identities=len(names), skipped=skipped)


def _photos(folder: Path) -> list[Path]:
    """Photos of a folder; what `shields protect` wrote comes after what it read."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in READABLE]
    return sorted(paths, key=lambda path: (path.stem.endswith(_MARK), path))


def _key(path: Path, folder: Path) -> str:
    """What a clean and a protected photo have in common: the path without ending and mark."""
    return path.relative_to(folder).with_suffix("").as_posix().removesuffix(_MARK)


def _square(clean: Path, protected: Path | None, size: int) -> np.ndarray:
    """Cut (size, size, 6) uint8 about the middle of what was changed."""
    if protected is None or protected == clean:
        raise ImageError("there is no protected photo of that name")
    pair = [read(path).pixels for path in (clean, protected)]
    if pair[0].shape != pair[1].shape:
        raise ImageError(f"sizes differ, {pair[0].shape[:2]} and {pair[1].shape[:2]} pixels")
    height, width = pair[0].shape[:2]
    if min(height, width) < size:
        raise ImageError(f"{height}x{width} is smaller than {size} pixels")
    change = np.square(pair[1].astype(np.float64) - pair[0]).sum(axis=2)
    if not change.any():
        raise ImageError("nothing was changed")
    corners = []
    for axis, side in ((1, height), (0, width)):
        middle = float((change.sum(axis=axis) * (np.arange(side) + 0.5)).sum() / change.sum())
        corners.append(min(max(round(middle - size / 2), 0), side - size))
    top, left = corners
    both = np.concatenate(pair, axis=2)
    return np.ascontiguousarray(both[top : top + size, left : left + size])


def _write(tensors: dict[str, torch.Tensor], metadata: dict[str, str], output: Path) -> None:
    try:
        with aside(output) as part:
            save_file(tensors, part, metadata=metadata)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error}") from error
