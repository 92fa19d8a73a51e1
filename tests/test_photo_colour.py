"""Colour: whatever profile comes in, sRGB comes out and is tagged as such."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from shields.photo import WRITABLE, read, write
from tests.photos import NOISE, saved, smooth


def _matrix_profile(gamma: float, primaries: tuple[tuple[float, float], ...]) -> bytes:
    """A small ICC profile written by hand: primaries (x, y) under D50, one gamma for all."""
    white = np.array([0.9642, 1.0, 0.8249])
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    columns = columns * np.linalg.solve(columns, white)

    def xyz(values: np.ndarray) -> bytes:
        fixed = [round(value * 65536) for value in values]
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *fixed)

    text = b"Wide test"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + b"\0" * 78
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": description, b"wtpt": xyz(white), b"cprt": b"text\0\0\0\0none\0"}
    for index, letter in enumerate("rgb"):
        tags[f"{letter}XYZ".encode()] = xyz(columns[:, index])
        tags[f"{letter}TRC".encode()] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        offset = 132 + 12 * len(tags) + len(body)
        table += name + struct.pack(">II", offset, len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


_SRGB_PRIMARIES = ((0.6484, 0.3309), (0.3212, 0.5979), (0.1559, 0.0660))
_WIDE = ((0.70, 0.30), (0.25, 0.68), (0.14, 0.05))


def test_a_wide_profile_makes_colours_stronger_in_srgb(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 3), 100, dtype=np.uint8)
    pixels[:, 8:, 0] = 180
    profile = _matrix_profile(2.2, _WIDE)
    photo = read(saved(tmp_path, Image.fromarray(pixels), "a.png", icc_profile=profile))
    assert np.abs(photo.pixels[0, 0].astype(int) - 100).max() <= 4
    red, green, _ = photo.pixels[0, 15].astype(int)
    assert red > 190
    assert green < 95
    assert "from Wide test to sRGB" in photo.notes


def test_a_profile_changes_tones_as_its_gamma_says(tmp_path: Path) -> None:
    grey = np.repeat(np.full((16, 16, 1), 128, dtype=np.uint8), 3, axis=2)
    profile = _matrix_profile(1.0, _SRGB_PRIMARIES)
    photo = read(saved(tmp_path, Image.fromarray(grey), "a.png", icc_profile=profile))
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(photo.pixels - expected).max() <= 2


def test_an_srgb_profile_leaves_every_bit(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = read(saved(tmp_path, Image.fromarray(NOISE), "a.png", icc_profile=profile))
    assert np.array_equal(photo.pixels, NOISE)
    assert photo.notes == ()


def test_grey_with_a_colour_profile_is_converted(tmp_path: Path) -> None:
    profile = _matrix_profile(1.0, _SRGB_PRIMARIES)
    grey = Image.fromarray(np.full((16, 16), 128, dtype=np.uint8))
    photo = read(saved(tmp_path, grey, "a.png", icc_profile=profile))
    assert photo.pixels.min() > 180


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_broken_or_foreign_profile_is_noted_and_ignored(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(smooth()).convert(mode)
    profile = b"nonsense" * 40 if mode == "RGB" else _matrix_profile(1.0, _SRGB_PRIMARIES)
    photo = read(saved(tmp_path, image, "a.tif", icc_profile=profile))
    assert np.abs(photo.pixels.astype(int) - smooth()).max() <= 1
    assert any("colour profile not usable" in note for note in photo.notes)


@pytest.mark.parametrize("suffix", sorted(set(WRITABLE) - {".bmp"}))
def test_every_format_is_tagged_as_srgb(tmp_path: Path, suffix: str) -> None:
    foreign = _matrix_profile(1.0, _SRGB_PRIMARIES)
    photo = read(saved(tmp_path, Image.fromarray(smooth()), "in.png", icc_profile=foreign))
    path = write(tmp_path / f"out{suffix}", photo.pixels, photo)
    with Image.open(path) as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    assert read(path).notes == ()
