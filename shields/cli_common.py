"""What the commands share: two consoles, one shape of error, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from shields.errors import ConfigError, ShieldsError

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = [
    "AsJson",
    "Format",
    "Region",
    "WeightsDir",
    "errors",
    "fail",
    "out",
    "plain",
    "progress_console",
    "say",
    "store_at",
    "warn",
    "write_json",
]

#: results; rich drops colour and style by itself where this is no terminal
out = Console(soft_wrap=True, highlight=False)
progress_console = Console(stderr=True, soft_wrap=True, highlight=False)

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to stdout and nothing else there.")
]
WeightsDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Look for weights here first; then in $SHIELDS_CHECKPOINTS, checkpoints/, the cache.",
    ),
]


class Region(StrEnum):
    """Where a photo is protected."""

    face = "face"
    photo = "photo"
    auto = "auto"


class Format(StrEnum):
    """File format of a result."""

    png = "png"
    webp = "webp"
    jpg = "jpg"


def plain(text: str) -> str:
    """Text for the consoles: no markup, and names of files that are not valid text made so."""
    return escape(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def say(text: str) -> None:
    """Print a line of plain text to stderr."""
    progress_console.print(plain(text))


def warn(text: str) -> None:
    """Print a warning of one line to stderr."""
    progress_console.print(f"[yellow]warning:[/] {plain(text)}")


def fail(text: str) -> None:
    """Print an error of one line to stderr."""
    progress_console.print(f"[red]error:[/] {plain(' '.join(text.split()))}")


def write_json(document: dict[str, Any]) -> None:
    """Print a document to stdout; names of any encoding survive."""
    typer.echo(json.dumps(document, indent=2, allow_nan=False))


@contextmanager
def errors(*, as_json: bool, code: int = 2) -> Iterator[None]:
    """Turn a known error, or one of the file system, into its message and an exit code."""
    try:
        yield
    except BrokenPipeError:  # a reader that has seen enough, such as `head`; typer knows that
        raise
    except (ShieldsError, OSError) as error:
        fail(str(error))
        if as_json:
            write_json({"error": str(error), "kind": type(error).__name__})
        raise typer.Exit(code) from error


def store_at(folder: Path | None, *, download: bool = False) -> WeightStore:
    """The weight store of a command; a folder that was named has to exist."""
    from shields.weights import WeightStore

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--weights-dir {folder} is not a folder")
    return WeightStore(folder, download=download)
