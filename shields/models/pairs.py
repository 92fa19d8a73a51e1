"""Photos of people in a folder or tar, and pairs of them: drawn, or from LFW's `pairs.txt`."""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import torch

from shields.errors import ImageError
from shields.photo import READABLE

__all__ = ["Pair", "PhotoSet", "draw_pairs", "read_pairs"]

_PAIRS_FILE = "pairs.txt"
#: draws per pair wanted, before a small set is taken to have no more
_TRIES = 50


@dataclass(frozen=True)
class Pair:
    """Two photos, by their names in a `PhotoSet`."""

    first: str
    second: str
    #: whether both show one person
    same: bool
    #: which fold of the protocol it belongs to
    fold: int = 0


@dataclass(frozen=True)
class PhotoSet:
    """The photos of a folder or a tar; the folder that a photo lies in names the person."""

    source: Path
    #: person -> names of the photos, both sorted
    people: Mapping[str, list[str]]

    @classmethod
    def open(cls, source: Path) -> Self:
        """List the photos.

        Raises:
            ImageError: It is neither a folder nor a tar, or holds no folder with photos.
        """
        if source.is_dir():
            found = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
            names = [path.as_posix() for path in found]
        else:
            with _archive(source) as archive:
                names = [member.name for member in archive if member.isfile()]
        people: dict[str, list[str]] = {}
        for path in map(PurePosixPath, sorted(names)):
            hidden = path.name.startswith(".")  # macOS writes such files beside every photo
            if path.suffix.lower() in READABLE and path.parent.name and not hidden:
                people.setdefault(path.parent.name, []).append(str(path))
        if not people:
            raise ImageError(f"{source} holds no photos in folders, one folder for each person")
        return cls(source, dict(sorted(people.items())))

    @property
    def pairs_file(self) -> Path | None:
        """`pairs.txt` in the folder or beside the tar; None where there is none."""
        folder = self.source if self.source.is_dir() else self.source.parent
        path = folder / _PAIRS_FILE
        return path if path.is_file() else None

    def files(self, names: Collection[str]) -> Iterator[tuple[str, Path]]:
        """Yield (name, file) of some photos; a file of a tar lasts until the next is asked for."""
        if self.source.is_dir():
            yield from ((name, self.source / name) for name in sorted(names))
            return
        wanted = set(names)
        with _archive(self.source) as archive, tempfile.TemporaryDirectory() as folder:
            for member in archive:  # in the archive's order, which a compressed one needs
                name = str(PurePosixPath(member.name))
                if name not in wanted or not member.isfile():
                    continue
                wanted.remove(name)  # an archive may hold a name twice
                content = archive.extractfile(member)
                assert content is not None, "isfile() members have content"
                path = Path(folder) / f"photo{PurePosixPath(name).suffix}"
                path.write_bytes(content.read())
                yield name, path


@contextmanager
def _archive(source: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(source) as archive:
            yield archive
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(f"{source} is neither a folder nor a tar of photos: {reason}") from error


def draw_pairs(photos: PhotoSet, count: int, rng: torch.Generator) -> list[Pair]:
    """Draw pairs, half of one person and half of two; fewer where there are not so many.

    A person is drawn evenly and then a photo of that person, so that nobody of whom there are many
    photos outweighs the rest; no pair comes twice.

    Raises:
        ImageError: No person has two photos, or there is only one person.
    """
    people = list(photos.people.values())
    several = [names for names in people if len(names) > 1]
    if not several or len(people) < 2:
        raise ImageError(
            f"{photos.source}: needed are two people or more, and two photos of one; found are "
            f"{len(people)}, {len(several)} of them with two photos or more"
        )

    def draw(size: int, number: int) -> list[int]:
        return [int(torch.randint(size, (), generator=rng)) for _ in range(number)]

    drawn: dict[tuple[str, str], bool] = {}
    for same, wanted in ((True, count // 2), (False, count - count // 2)):
        before = len(drawn)
        for _ in range(wanted * _TRIES):
            if len(drawn) - before == wanted:
                break
            if same:
                names = several[draw(len(several), 1)[0]]
                first, second = (names[index] for index in draw(len(names), 2))
            else:
                one, other = (people[index] for index in draw(len(people), 2))
                if one is other:
                    continue
                first, second = one[draw(len(one), 1)[0]], other[draw(len(other), 1)[0]]
            if first != second:
                drawn.setdefault((min(first, second), max(first, second)), same)
    return [Pair(*names, same) for names, same in drawn.items()]


def read_pairs(path: Path, photos: PhotoSet, count: int) -> tuple[list[Pair], dict[str, str]]:
    """Read LFW's `pairs.txt`: folds of as many genuine as impostor pairs.

    Args:
        path: First line: folds and pairs of each kind in a fold, or the latter alone. Then
            `person number number` or `person number person number`, separated by blanks or tabs.
        photos: Where the photos are; number 7 of a person ends in `_0007`.
        count: How many pairs at most, from all folds alike.

    Returns:
        The pairs whose photos are there, and the photos that are not: name -> why.

    Raises:
        ImageError: The file is not in that format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = [int(value) for value in lines[0].split()]
        folds, half = (1, header[0]) if len(header) == 1 else header
    except (OSError, ValueError, IndexError) as error:
        raise ImageError(f"{path} is no list of pairs as LFW has it: {error}") from error
    known = {PurePosixPath(name).stem: name for names in photos.people.values() for name in names}
    absent: dict[str, str] = {}
    pairs: list[Pair] = []
    for number, line in enumerate(lines[1:]):
        if not line.strip():
            continue
        stems, same = _stems(path, number + 2, line)
        missing = {stem: f"not in {photos.source}" for stem in stems if stem not in known}
        absent |= missing
        if not missing:
            pairs.append(Pair(known[stems[0]], known[stems[1]], same, number // max(1, 2 * half)))
    limit = max(1, count // (2 * max(1, folds)))
    taken: dict[tuple[int, bool], int] = {}
    kept = []
    for pair in pairs:
        key = pair.fold, pair.same
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= limit:
            kept.append(pair)
    return kept, absent


def _stems(path: Path, number: int, line: str) -> tuple[tuple[str, str], bool]:
    """The names of a line's two photos without suffix, and whether they show one person."""
    parts = line.split()
    same = len(parts) == 3
    try:
        if same:
            parts = [parts[0], parts[1], parts[0], parts[2]]
        one, first, other, second = parts
        return (f"{one}_{int(first):04d}", f"{other}_{int(second):04d}"), same
    except ValueError as error:
        raise ImageError(
            f"{path}, line {number}: `person number number` or `person number person number` is "
            f"needed, got {line!r}"
        ) from error
