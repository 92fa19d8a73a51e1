"""Where photos to pack come from: folders, tars, WebDatasets, tables, CelebAMask-HQ.

A source is a list of entries whose content is read when its turn comes, so that a data set of any
size fits, and an entry that cannot be read harms no other. What a source tells about a photo (a
JSON file beside it, a column of its table) are its fields.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np

from shields.errors import ConfigError, ImageError
from shields.photo import READABLE

__all__ = ["Entry", "Source", "expand", "gather", "identity_of", "unreadable", "written"]

#: what stands beside a photo in a WebDataset
_COMPANIONS = ("json", "cls", "txt")
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One photo of a source."""

    #: where it lies in the source
    name: str
    #: who it shows
    identity: str
    #: the content of the file; may raise anything; to be called before the next entry is asked for
    read: Callable[[], bytes]
    fields: Mapping[str, str] = field(default_factory=dict)
    #: (H, W) uint8, indices into `shields.masks.CLASSES`, where the source has masks
    parts: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Entries in an order that never changes."""

    entries: Iterable[Entry]
    total: int
    #: fields that are packed as labels unasked: their values are 1 and -1
    attributes: Sequence[str] = ()
    has_fields: bool = False
    has_parts: bool = False


def gather(sources: Sequence[Path | str], *, identity: str = "") -> Source:
    """Open what photos are packed from.

    Args:
        sources: Folders, tars, tables (`.parquet`, `.arrow`), folders of such tables, or a folder
            in CelebAMask-HQ's layout; patterns as `expand` reads them.
        identity: The field that names a person; where left out, "identity" if there is one, else
            the folder that the photo lies in, else the photo itself.

    Raises:
        ConfigError: Nothing is there.
        ImageError: The only source is neither a folder nor a file of photos.
        MissingPackage: It is a table, and pyarrow is not installed.
    """
    paths = [path for source in sources for path in expand(source)]
    if not paths:
        raise ConfigError("there must be a source of photos, got none")
    alone = len(paths) == 1
    opened: list[Source] = []
    for path in paths:
        prefix = "" if alone else f"{path.name}/"
        try:
            opened.append(_opened(path, prefix, identity))
        except ImageError as error:
            if alone:
                raise
            opened.append(Source(entries=[unreadable(path.name, str(error))], total=1))
    if alone:
        return opened[0]
    return Source(
        entries=_Chain([part.entries for part in opened]),
        total=sum(part.total for part in opened),
        attributes=opened[0].attributes,
        has_fields=any(part.has_fields for part in opened),
        has_parts=all(part.has_parts for part in opened),
    )


class _Chain:
    """One iterable behind the other, as often as asked for."""

    def __init__(self, parts: Sequence[Iterable[Entry]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Entry]:
        for part in self._parts:
            yield from part


def _opened(path: Path, prefix: str, identity: str) -> Source:
    from trainers.celebamask import celebamask, is_celebamask
    from trainers.tables import tables, tables_in

    if not path.exists():
        raise ConfigError(f"there is no {path}")
    if is_celebamask(path):
        return celebamask(path)
    if found := tables_in(path):
        return tables(found, path, prefix, identity)
    if path.is_dir():
        return _folder(path, prefix)
    return _tar(path, prefix, identity)


def expand(pattern: Path | str) -> list[Path]:
    """Read a path, with `{0000..0012}` or `{a,b}` in it, or with `*` and `?`.

    Raises:
        ConfigError: Nothing has such a name.

    Example:
        >>> [path.name for path in expand("shard-{08..10}.tar")]
        ['shard-08.tar', 'shard-09.tar', 'shard-10.tar']
    """
    text = str(pattern)
    if Path(text).exists():
        return [Path(text)]
    paths: list[Path] = []
    for name in _braces(text):
        path = Path(name)
        if any(sign in path.name for sign in "*?["):
            found = sorted(path.parent.glob(path.name))
            if not found:
                raise ConfigError(f"there is no photo, folder or tar that matches {name}")
            paths += found
        else:
            paths.append(path)
    return paths


def _braces(text: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found.group(1))
    if ends is None:
        choices = found.group(1).split(",")
    else:
        first, last = ends.groups()
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    before, after = text[: found.start()], text[found.end() :]
    return [whole for choice in choices for whole in _braces(before + choice + after)]


def identity_of(name: str) -> str:
    """Name the person: the folder if there is one above the file, else the file itself.

    Example:
        >>> identity_of("lfw/Ada_Lovelace/Ada_Lovelace_0001.jpg"), identity_of("004.png")
        ('Ada_Lovelace', '004')
    """
    path = PurePosixPath(name)
    return path.parent.name if len(path.parts) > 1 else path.stem


def unreadable(name: str, reason: str) -> Entry:
    """Stand in for what cannot be read, so that it is counted and named like a bad photo."""

    def read() -> NoReturn:
        raise ImageError(reason)

    return Entry(name=name, identity=name, read=read)


def _person(name: str, prefix: str, fields: Mapping[str, str], asked: str) -> str:
    """Who a photo shows; the same number in two shards need not be the same person."""
    if asked or "identity" in fields:
        return fields[asked or "identity"]
    return identity_of(name) if "/" in name else prefix + identity_of(name)


def _folder(folder: Path, prefix: str) -> Source:
    entries = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or path.suffix.lower() not in READABLE or not path.is_file():
            continue
        name = inside.as_posix()
        person = _person(name, prefix, {}, "")
        entries.append(Entry(name=prefix + name, identity=person, read=path.read_bytes))
    return Source(entries=entries, total=len(entries))


def _tar(path: Path, prefix: str, identity: str) -> Source:
    """A tar of photos; a WebDataset where JSON, `cls` or `txt` files stand beside them."""
    members: list[tarfile.TarInfo] = []
    damage = ""
    with _open_tar(path) as archive:
        # Going back in a compressed one means unpacking it anew.
        packed = not isinstance(archive.fileobj, io.BufferedReader)
        try:
            for member in archive:
                # Links in a tar would lead to other members, or out of it.
                if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
                    members.append(member)
        except _DAMAGE as error:
            damage = str(error) or type(error).__name__
    if not packed:
        members.sort(key=lambda member: member.name)
    photos, beside = _samples(members)
    entries = _TarPhotos(path, photos, beside, prefix, identity)
    extra = [unreadable(path.name, f"damaged from here on: {damage}")] if damage else []
    return Source(
        entries=_Chain([entries, extra]),
        total=len(photos) + len(extra),
        has_fields=bool(beside),
    )


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path)
    except _DAMAGE as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(
            f"{path} is neither a folder, a tar nor a table of photos: {reason}"
        ) from error


_Beside = dict[str, dict[str, tarfile.TarInfo]]


def _samples(members: Sequence[tarfile.TarInfo]) -> tuple[list[tarfile.TarInfo], _Beside]:
    """The photos, and by key what stands beside each, in a WebDataset."""
    photos = [member for member in members if PurePosixPath(member.name).suffix.lower() in READABLE]
    keys = {_split(member.name)[0] for member in photos}
    beside: _Beside = {}
    for member in members:
        key, ending = _split(member.name)
        if ending in _COMPANIONS and key in keys:
            beside.setdefault(key, {})[ending] = member
    if beside:  # `key.mask.png` belongs to the sample but is not its photo
        photos = [member for member in photos if "." not in _split(member.name)[1]]
    return photos, beside


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a file in a WebDataset: the ending starts at the first dot."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower()


class _TarPhotos:
    """Entries of a tar, which is open while one goes through them."""

    def __init__(
        self, path: Path, photos: Sequence[tarfile.TarInfo], beside: _Beside, prefix: str,
        identity: str,
    ) -> None:  # fmt: skip
        self._path, self._photos, self._beside = path, photos, beside
        self._prefix, self._identity = prefix, identity

    def __iter__(self) -> Iterator[Entry]:
        with _open_tar(self._path) as archive:
            for member in self._photos:
                yield self._entry(archive, member)

    def _entry(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Entry:
        name = self._prefix + member.name
        try:
            fields = self._fields(archive, self._beside.get(_split(member.name)[0], {}))
            person = _person(member.name, self._prefix, fields, self._identity)
        except KeyError:
            return unreadable(name, f"no field {self._identity!r} tells who it is")
        except (*_DAMAGE, ValueError) as error:
            return unreadable(name, f"what stands beside it cannot be read: {error}")
        read = partial(_content, archive, member)
        return Entry(name=name, identity=person, read=read, fields=fields)

    @staticmethod
    def _fields(
        archive: tarfile.TarFile, companions: Mapping[str, tarfile.TarInfo]
    ) -> dict[str, str]:
        fields: dict[str, str] = {}
        for ending, member in companions.items():
            text = _content(archive, member).decode("utf-8")
            if ending != "json":
                fields[ending] = text.strip()
                continue
            told = json.loads(text)
            if not isinstance(told, dict):
                raise ValueError(f"{member.name} holds no table of fields")
            fields |= {key: written(value) for key, value in told.items()}
        return fields


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None, "isfile() members have content"
    return content.read()


def written(value: object) -> str:
    """Write a field as it is compared: text as it is, all else as in JSON.

    Example:
        >>> written("yes"), written(True), written(-1)
        ('yes', 'true', '-1')
    """
    return value if isinstance(value, str) else json.dumps(value, default=str)
