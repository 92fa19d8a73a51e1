"""Every image that a suite makes, kept as a PNG named by what it was made from.

A key is a hash of the step, its settings, its weights, its seed and the content of what goes in.
An image that is there is never computed again, by this run or the next; it is written aside and
moved into place, so a run that is killed leaves nothing half-written. Images are 8 bit, as files
that people pass on are: a forgery is rounded once before it is measured.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import PngImagePlugin
from torch import nn

import shields
from robustness.files import write_whole
from shields.errors import OutputError
from shields.types import Image, Photo

__all__ = ["ImageStore", "Stored", "code_of", "digest_of", "key_of", "networks_of",
           "state_of", "weights_of"]  # fmt: skip


#: what no network hides in
_PLAIN = (torch.Tensor, np.ndarray, str, bytes, int, float, type, Path)


def digest_of(pixels: np.ndarray) -> str:
    """Hash of the size and values of (H, W, 3) uint8."""
    head = f"{pixels.shape}{pixels.dtype}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def key_of(
    step: str,
    inputs: Sequence[str],
    *,
    settings: Mapping[str, Any] | None = None,
    weights: Sequence[str] = (),
    seed: int | None = None,
) -> str:
    """Name of what a step makes of its inputs: 32 hex digits.

    Args:
        step: What is done, "handle".
        inputs: Hashes of what goes in.
        settings: How it is done, ready for JSON.
        weights: Hashes of the networks that do it.
        seed: Of its draws.
    """
    facts = [shields.__version__, step, list(inputs), settings or {}, list(weights), seed]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def networks_of(*holders: object) -> list[nn.Module]:
    """All networks that some objects are or hold, outermost only."""
    found: list[nn.Module] = []
    seen: set[int] = set()

    def search(value: object, depth: int) -> None:
        if id(value) in seen or depth > 6 or isinstance(value, _PLAIN):
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
            return
        if isinstance(value, Mapping):
            parts: list[object] = list(value.values())
        elif isinstance(value, tuple | list):
            parts = list(value)
        else:
            parts = list(getattr(value, "__dict__", {}).values())
        for part in parts:
            search(part, depth + 1)

    for holder in holders:
        search(holder, 0)
    return found


def weights_of(*holders: object) -> tuple[str, ...]:
    """Hashes of all networks that some objects are or hold, whatever files they came from."""
    return tuple(sorted(map(state_of, networks_of(*holders))))


def code_of(address: str) -> str:
    """Hash of the file of a plug-in, `module:factory`; empty for what is none.

    What that file imports is not looked at.
    """
    module = sys.modules.get(address.partition(":")[0]) if ":" in address else None
    path = Path(getattr(module, "__file__", None) or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def state_of(network: nn.Module) -> str:
    """Hash of a network's state; kept on the network, whose weights are frozen."""
    known = getattr(network, "_state_digest", None)
    if known is None:
        total = hashlib.sha256(type(network).__qualname__.encode())
        for name, value in network.state_dict().items():
            if isinstance(value, torch.Tensor):
                bits = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
                total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
                total.update(bits.numpy().data)
        known = total.hexdigest()
        object.__setattr__(network, "_state_digest", known)
    return str(known)


@dataclass(frozen=True)
class Stored:
    """An image in the store."""

    path: Path
    #: (H, W, 3) uint8
    pixels: np.ndarray
    #: what it took to make it
    seconds: float

    @cached_property
    def digest(self) -> str:
        """Hash of the content."""
        return digest_of(self.pixels)

    def image(self, device: torch.device | str = "cpu") -> Image:
        """(1, 3, H, W), [0, 1]."""
        return Photo(pixels=self.pixels).image(device)


class ImageStore:
    """A folder of images by key.

    Args:
        folder: Made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {folder}: {error.strerror}") from error

    def path(self, key: str) -> Path:
        """Where an image is or will be; a folder for each first two digits."""
        return self.folder / key[:2] / f"{key[2:]}.png"

    def find(self, key: str) -> Stored | None:
        """The image of a key; None where it is not there, or where its file is damaged."""
        path = self.path(key)
        try:
            with PillowImage.open(path, formats=["PNG"]) as image:
                pixels = np.array(image.convert("RGB"))
                seconds = float(image.info.get("seconds", 0))
        except (OSError, SyntaxError, ValueError):
            return None
        return Stored(path, pixels, seconds)

    def make(self, key: str, build: Callable[[], np.ndarray]) -> Stored:
        """The image of a key, built where it is not there yet.

        Raises:
            OutputError: It cannot be written; and whatever `build` raises.
        """
        found = self.find(key)
        if found is not None:
            return found
        began = time.perf_counter()
        pixels = build()
        seconds = time.perf_counter() - began
        self._write(self.path(key), pixels, seconds)
        return Stored(self.path(key), pixels, round(seconds, 4))

    def _write(self, path: Path, pixels: np.ndarray, seconds: float) -> None:
        facts = PngImagePlugin.PngInfo()
        facts.add_text("seconds", f"{seconds:.4f}")
        content = io.BytesIO()
        PillowImage.fromarray(pixels).save(content, "PNG", pnginfo=facts, compress_level=1)
        write_whole(path, content.getvalue())
