"""Files that are written at once or not at all."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from shields.errors import OutputError

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the destination, then rename: nobody ever sees half a file.

    Raises:
        OutputError: The place cannot be written.
    """
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # a folder that is none cannot be looked into
            part.unlink(missing_ok=True)
