"""Files that are written at once or not at all."""

from __future__ import annotations

from pathlib import Path

from shields.errors import OutputError
from shields.files import aside

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the destination, then rename: nobody ever sees half a file.

    Raises:
        OutputError: The place cannot be written.
    """
    try:
        with aside(path) as part:
            part.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
