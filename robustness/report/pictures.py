"""The pictures of a report: which are shown, how they are made small, and which are left out."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from robustness.report.results import UNPROTECTED

__all__ = ["Album", "Gallery", "Picture", "load"]

#: what all pictures of a page may weigh, bytes as they stand in the page
_WEIGHT = 6_000_000
#: longest side, pixels, and libwebp's quality
_SIDE, _QUALITY = 256, 88
#: handlings shown, and photos
_HANDLINGS, _PHOTOS = 6, 6
#: kinds that no seed changes
_ONCE = ("clean", "protected")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of a run, and where it stands in the product."""

    photo: str
    protector: str
    attack: str
    manipulator: str
    condition: str
    seed: int
    #: clean, protected, handled, forged-clean or forged
    kind: str
    #: below the folder of the run
    file: str

    @property
    def column(self) -> str:
        """What was done to the photo after it was protected, in words."""
        handled = "as saved" if self.attack == UNPROTECTED else f"after {self.attack}"
        if self.manipulator == UNPROTECTED:
            return handled
        condition = f" ({self.condition})" if self.condition else ""
        return f"forged by {self.manipulator}{condition}, {handled}"


@dataclass(kw_only=True)
class Gallery:
    """All shown pictures of one photo: protectors down, what was done across."""

    photo: str
    columns: list[str] = field(default_factory=list)
    #: protector -> column -> data URI
    rows: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(kw_only=True)
class Album:
    """What a page shows, and how much it does not."""

    galleries: list[Gallery] = field(default_factory=list)
    shown: int = 0
    left_out: int = 0
    #: files that could not be read
    broken: list[str] = field(default_factory=list)
    side: int = _SIDE
    quality: int = _QUALITY


def _spread(names: Sequence[str], most: int) -> set[str]:
    """Some of the names, evenly from the first to the last."""
    if len(names) <= most:
        return set(names)
    return {names[round(place * (len(names) - 1) / (most - 1))] for place in range(most)}


def _listed(folder: Path) -> list[Picture]:
    """What the suite has kept, as far as the list can be read."""
    names = Picture.__dataclass_fields__
    try:
        entries = json.loads((folder / "pictures.json").read_text(encoding="utf-8"))
        return [Picture(**{name: entry[name] for name in names}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        # A report of numbers alone is still a report; the page says that there are no pictures.
        return []


def _embedded(path: Path) -> str:
    """A picture as a data URI, small enough for a page."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def load(folder: Path, attacks: Sequence[str], *, weight: int = _WEIGHT) -> Album:
    """Choose and embed pictures: whole photos one after another, until the weight is used up.

    Args:
        folder: Of the run, with `pictures.json`.
        attacks: In the order of the suite; where there are many, some are chosen evenly.
        weight: What the pictures may weigh together, bytes.
    """
    pictures = _listed(folder)
    album = Album()
    pictured = {picture.attack for picture in pictures}
    chosen = _spread([attack for attack in attacks if attack in pictured], _HANDLINGS)
    photos = list(dict.fromkeys(picture.photo for picture in pictures))[:_PHOTOS]
    places = {attack: place for place, attack in enumerate(attacks)}
    # Clean and protected photos are made once, whatever the seeds.
    first_seed = min((picture.seed for picture in pictures if picture.kind not in _ONCE), default=0)
    wanted = [
        picture
        for picture in pictures
        if picture.photo in photos
        and picture.attack in chosen
        and (picture.kind in _ONCE or picture.seed == first_seed)
    ]
    wanted.sort(
        key=lambda picture: (photos.index(picture.photo), places.get(picture.attack, len(places)))
    )
    for picture in wanted:
        weight -= _show(album, folder, picture, weight)
        if weight <= 0:
            break
    album.left_out = len(pictures) - album.shown - len(album.broken)
    return album


def _show(album: Album, folder: Path, picture: Picture, room: int) -> int:
    """Put a picture where it belongs, and say what it weighs; all the room if it does not fit."""
    same_photo = album.galleries and album.galleries[-1].photo == picture.photo
    gallery = album.galleries[-1] if same_photo else Gallery(photo=picture.photo)
    row = gallery.rows.get(picture.protector, {})
    if picture.column in row:
        # Handled by nothing, it is the saved photo again.
        album.shown += 1
        return 0
    path = folder / picture.file
    try:
        # A list of another's making must not put any file of this machine on the page.
        if not path.resolve().is_relative_to(folder.resolve()):
            raise OSError(f"{picture.file} is outside of the run")
        address = _embedded(path)
    except (OSError, ValueError, Image.DecompressionBombError):
        album.broken.append(picture.file)
        return 0
    if len(address) > room:
        return room
    if not same_photo:
        album.galleries.append(gallery)
    if picture.column not in gallery.columns:
        gallery.columns.append(picture.column)
    gallery.rows[picture.protector] = {**row, picture.column: address}
    album.shown += 1
    return len(address)
