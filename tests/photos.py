"""Pictures that the tests of reading and writing photos share."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from shields.types import Photo

_RNG = np.random.default_rng(0)
NOISE = _RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
ALPHA = _RNG.integers(0, 256, (24, 32), dtype=np.uint8)


def smooth(height: int = 24, width: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 40 + rows * 160 / height, 60 + columns * 120 / width
    return np.stack([red, green, np.full(rows.shape, 110.0)], axis=-1).round().astype(np.uint8)


def saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def photo_of(pixels: np.ndarray, **fields: object) -> Photo:
    return Photo(pixels=pixels, **fields)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
