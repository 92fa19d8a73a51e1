"""Files that are written at once or not at all."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["aside"]


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Give a name beside a destination to write to; it takes its place where all went well.

    Nobody ever sees half a file, and where writing fails, nothing of it stays.

    Args:
        path: The destination; its folder is made.
    """
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong is said already
            part.unlink(missing_ok=True)
