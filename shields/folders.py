"""Where photos are found and where each result goes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shields.errors import ConfigError, OutputError
from shields.photo import READABLE, WRITABLE

__all__ = ["Job", "check_writable", "plan"]

_MARK = "-protected"


@dataclass(frozen=True)
class Job:
    """One photo, the file it becomes, and the folder whose manifest knows about it."""

    source: Path
    output: Path
    root: Path


def _expand(pattern: str | Path) -> list[Path]:
    """A path as it is, or, where none exists, the files that match it as a glob."""
    path = Path(pattern)
    if path.exists():
        return [path]
    if any(sign in str(path) for sign in "*?["):
        base = Path(path.anchor)
        if found := sorted(base.glob(str(path.relative_to(base)))):
            return found
    raise ConfigError(f"there is no photo or folder at {path}")


def _inside(folder: Path, out: Path | None) -> list[Path]:
    """Photos below a folder, sorted; not hidden ones, and not earlier results."""
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in READABLE or not path.is_file():
            continue
        if out is None and path.stem.endswith((_MARK, f"{_MARK}-sheet")):
            continue
        if out is not None and out.resolve() in path.resolve().parents:
            continue
        found.append(path)
    if not found:
        raise ConfigError(f"there are no photos in {folder}")
    return found


def _unknown(_path: Path) -> None:
    return


def plan(
    inputs: Sequence[str | Path],
    out: Path | None,
    *,
    suffix: str = ".png",
    made_from: Callable[[Path], Path | None] = _unknown,
) -> list[Job]:
    """Decide for every photo where its result goes; nothing is written yet.

    Args:
        inputs: Photos, folders (searched to the bottom) and globs.
        out: A file for a single photo, or a folder, whose tree follows that of the input; where
            left out, results lie beside their photos as NAME-protected.
        suffix: Of the results, with its dot.
        made_from: Tells the photo of an earlier result. A result that is named together with its
            photo, as a glob does when it is run again, is left out.

    Raises:
        ConfigError: An input is missing or empty, or a result would replace an original.
    """
    paths = [path for entry in inputs for path in _expand(entry)]
    folders = [path for path in paths if path.is_dir()]
    if out is not None and any(folder.resolve() == out.resolve() for folder in folders):
        raise ConfigError(
            f"{out} is input and output at once; choose another --out, or leave it out to get "
            f"NAME{_MARK}{suffix} beside each photo"
        )
    if out is not None and _names_a_file(out):
        if len(paths) != 1 or folders:
            raise ConfigError(f"several photos cannot become one file; name a folder, not {out}")
        jobs = [Job(paths[0], out, out.parent)]
    else:
        jobs = _spread(list(_sources(paths, len(folders), out)), out, suffix)
    originals = {job.source.resolve() for job in jobs}
    marked = [path for path in paths if out is None and path.stem.endswith(_MARK)]
    if results := [path for path in marked if path.is_file() and made_from(path) in originals]:
        rest = [path for path in paths if path not in results]
        return plan(rest, out, suffix=suffix, made_from=made_from)
    for job in jobs:
        if job.output.resolve() in originals:
            raise ConfigError(
                f"{job.output} is an original and is never written over; choose another --out"
            )
    return jobs


def _names_a_file(out: Path) -> bool:
    suffix = out.suffix.lower()
    if out.is_dir() or suffix not in READABLE:
        return False
    if suffix not in WRITABLE:
        raise ConfigError(f"results are {', '.join(WRITABLE)}; {out.name} is none of them")
    return True


def _sources(
    paths: Iterable[Path], folders: int, out: Path | None
) -> Iterator[tuple[Path, Path, Path]]:
    """(photo, its place in the tree, folder it was found from), every photo once."""
    seen = set()
    for path in paths:
        base = path if path.is_dir() else path.parent
        for photo in _inside(path, out) if path.is_dir() else [path]:
            if photo.resolve() in seen:
                continue
            seen.add(photo.resolve())
            place = photo.relative_to(base)
            # Several folders keep their own names, as a copy would.
            named = path.is_dir() and folders > 1 and out is not None
            yield photo, Path(base.resolve().name) / place if named else place, base


def _spread(sources: Sequence[tuple[Path, Path, Path]], out: Path | None, suffix: str) -> list[Job]:
    """Name the results so that no two are one file, whatever the case of letters."""
    mark = _MARK if out is None else ""

    def output(entry: tuple[Path, Path, Path], name: str) -> Path:
        return (entry[2] if out is None else out) / entry[1].parent / f"{name}{mark}{suffix}"

    def key(path: Path) -> str:
        return str(path.resolve()).casefold()

    outputs = [output(entry, entry[1].stem) for entry in sources]
    counts = Counter(key(path) for path in outputs)
    outputs = [
        path if counts[key(path)] == 1 else output(entry, entry[1].name)
        for entry, path in zip(sources, outputs, strict=True)
    ]
    jobs, taken = [], set[str]()
    for entry, wanted in zip(sources, outputs, strict=True):
        path, number = wanted, 1
        while key(path) in taken:
            number += 1
            path = wanted.with_name(f"{wanted.stem}-{number}{suffix}")
        taken.add(key(path))
        jobs.append(Job(entry[0], path, entry[2] if out is None else out))
    return jobs


def check_writable(folder: Path) -> None:
    """Make a folder where it is missing, and find out now whether files can be written there.

    Raises:
        OutputError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write to {folder}: {reason}; choose another --out") from error
