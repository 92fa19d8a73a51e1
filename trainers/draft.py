"""A pack while it is made: a folder beside the output that survives an interruption.

Frames are appended to plain files, and a journal gets one line a photo after its frame is written,
so that whatever stands in the journal is whole; what a power cut left behind it is cut off.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from shields.errors import ConfigError, OutputError

__all__ = ["Draft", "Frames"]


class Frames:
    """Arrays of one shape, uint8, one behind the other in a file.

    Args:
        path: The file; it need not exist.
        shape: Of one frame.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape, self._bytes = path, shape, math.prod(shape)

    @property
    def count(self) -> int:
        """Whole frames in the file."""
        return self.path.stat().st_size // self._bytes if self.path.is_file() else 0

    def cut(self, count: int) -> None:
        """Keep the first frames only."""
        if self.path.is_file():
            with self.path.open("r+b") as stream:
                stream.truncate(count * self._bytes)

    def append(self, frames: np.ndarray) -> None:
        """Add frames (..., *shape)."""
        assert frames.dtype == np.uint8, "frames are bytes"
        assert frames.size % self._bytes == 0, "only whole frames are added"
        with self.path.open("ab") as stream:
            stream.write(np.ascontiguousarray(frames).tobytes())

    def tensor(self) -> Tensor:
        """All frames (N, *shape), memory-mapped; changes do not reach the file."""
        if not self.count:
            return torch.zeros(0, *self.shape, dtype=torch.uint8)
        shape = (self.count, *self.shape)
        return torch.from_numpy(np.memmap(self.path, np.uint8, mode="c", shape=shape))


class Draft:
    """What is known of the photos so far. Use it as a context: an exception leaves it resumable.

    Args:
        output: The pack that it becomes.
        settings: What the pack depends on; a draft of other settings is not gone on with.
        size: Side of a face, pixels.
        parts: Whether every face comes with a map of its parts.

    Raises:
        ConfigError: There is a draft of other settings.
        OutputError: The folder cannot be written.
    """

    def __init__(
        self, output: Path, settings: Mapping[str, object], size: int, *, parts: bool = False
    ) -> None:
        self.output, self.folder = output, output.with_name(f"{output.name}.part")
        self.settings = {key: str(value) for key, value in settings.items()}
        self.faces = Frames(self.folder / "faces", (size, size, 3))
        self.parts = Frames(self.folder / "parts", (size, size)) if parts else None
        self._journal = self.folder / "journal.jsonl"
        #: of each photo that is done: its `name`, and `skipped`, or what is known of its face
        self.rows: list[dict[str, Any]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._go_on()
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        begun = any(path.stat().st_size for path in self.folder.iterdir() if path != self._journal)
        if kind is None or not begun:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _go_on(self) -> None:
        lines = self._lines()
        if lines and lines[0] != self.settings:
            differing = [key for key in self.settings if lines[0].get(key) != self.settings[key]]
            raise ConfigError(
                f"{self.folder} holds an unfinished pack made with another "
                f"{', '.join(differing) or 'version'}; finish it as it was begun, or remove it"
            )
        room = min(frames.count for frames in (self.faces, self.parts) if frames is not None)
        for row in lines[1:]:
            if "skipped" not in row and not room:
                break
            room -= "skipped" not in row
            self.rows.append(row)
        self._keep()

    def _lines(self) -> list[dict[str, Any]]:
        """Whole lines of the journal; the last one may be torn."""
        if not self._journal.is_file():
            return []
        found: list[dict[str, Any]] = []
        for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def _keep(self) -> None:
        """Write the journal anew and cut off the frames that it does not know."""
        text = "".join(json.dumps(row) + "\n" for row in (self.settings, *self.rows))
        fresh = self._journal.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self._journal)
        faces = sum("skipped" not in row for row in self.rows)
        for frames in (self.faces, self.parts):
            if frames is not None:
                frames.cut(faces)

    def _note(self, row: dict[str, Any]) -> None:
        with self._journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self.rows.append(row)

    def add(
        self, name: str, face: np.ndarray, parts: np.ndarray | None, known: Mapping[str, object]
    ) -> None:
        """Keep a face (S, S, 3), its parts (S, S) and what else is known, ready for JSON."""
        self.faces.append(face)
        if self.parts is not None:
            assert parts is not None, "the source has masks"
            self.parts.append(parts)
        self._note({"name": name, **known})

    def skip(self, name: str, reason: str) -> None:
        """Note a photo that is left out."""
        self._note({"name": name, "skipped": reason})

    def layer(
        self, name: str, size: int, count: int, make: Callable[[int, int], Iterable[np.ndarray]]
    ) -> Tensor:
        """Compute one map a face, going on where an earlier call ended.

        Args:
            name: Of the layer.
            size: Side of a map, pixels.
            count: How many there shall be.
            make: From the first to behind the last face that is wanted, yields maps (n, S, S).

        Returns:
            (count, size, size), uint8, memory-mapped.
        """
        plain = "".join(sign if sign.isalnum() else "-" for sign in name)
        frames = Frames(self.folder / f"layer-{plain}", (size, size))
        frames.cut(frames.count)
        for maps in make(frames.count, count):
            frames.append(maps)
        return frames.tensor()

    def finish(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
        """Write the pack beside its place, then rename: nobody ever sees half a file.

        Raises:
            OutputError: It cannot be written; the draft stays.
        """
        whole = self.folder / "pack.safetensors"
        notes = {key: json.dumps(value) for key, value in metadata.items()}
        try:
            save_file(dict(tensors), whole, metadata=notes)
            whole.replace(self.output)
        except Exception as error:  # safetensors has errors of its own
            raise OutputError(f"cannot write {self.output}: {error}") from error
