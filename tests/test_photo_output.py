"""Writing: metadata, transparency, quality, and files that appear whole or not at all."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from shields.errors import ConfigError, ImageError, OutputError, ShieldsError
from shields.photo import WRITABLE, read, write
from tests.photos import ALPHA, NOISE, photo_of, saved, smooth

# --- metadata -----------------------------------------------------------------------------------


def _metadata() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Model] = "Camera 1"
    camera = {0x9003: "2024:05:06 07:08:09", 0x927C: b"preview" * 9, 0xA001: 65535, 0xA002: 32}
    exif[ExifTags.IFD.Exif] = camera
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 51.0, 30.0)}
    return exif


def _with_metadata(folder: Path, name: str = "in.jpg") -> Path:
    # as bytes, as a file brings it: the TIFF encoder takes no fresh blocks
    return saved(folder, Image.fromarray(smooth()), name, exif=_metadata().tobytes())


@pytest.mark.parametrize("suffix", sorted(set(WRITABLE) - {".bmp"}))
def test_metadata_is_dropped_by_default(tmp_path: Path, suffix: str) -> None:
    photo = read(_with_metadata(tmp_path))
    path = write(tmp_path / f"out{suffix}", photo.pixels, photo)
    with Image.open(path) as image:
        exif = image.getexif()
        assert not {ExifTags.Base.Model, ExifTags.Base.Orientation} & set(exif)
        assert not exif.get_ifd(ExifTags.IFD.GPSInfo)
    data = path.read_bytes()
    assert not any(secret in data for secret in (b"Camera 1", b"2024:05", b"preview"))


@pytest.mark.parametrize("suffix", sorted(set(WRITABLE) - {".bmp"}))
def test_metadata_is_kept_on_request_without_orientation(tmp_path: Path, suffix: str) -> None:
    photo = read(_with_metadata(tmp_path))
    path = write(tmp_path / f"out{suffix}", photo.pixels, photo, keep_metadata=True)
    with Image.open(path) as image:
        exif = image.getexif()
        assert exif[ExifTags.Base.Model] == "Camera 1"
        assert exif.get(ExifTags.Base.Orientation, 1) == 1
        camera = exif.get_ifd(ExifTags.IFD.Exif)
        assert camera[0x9003] == "2024:05:06 07:08:09"
        assert camera[0xA002] == photo.width == 24
        assert camera[0xA001] == 1, "whatever the photo's colours were, the pixels are sRGB now"
        assert exif.get_ifd(ExifTags.IFD.GPSInfo)[2] == (48.0, 51.0, 30.0)
    assert b"preview" not in path.read_bytes()
    assert np.array_equal(read(path).pixels.shape, photo.pixels.shape)


def test_a_thumbnail_of_the_original_is_never_written(tmp_path: Path) -> None:
    source = Image.Exif()
    source[ExifTags.Base.Model] = "Camera 1"
    block = bytearray(source.tobytes())
    # append a second directory by hand: its one entry is a marker text that a thumbnail would hold
    tiff = block[6:]
    little = tiff[:2] == b"II"
    order = "<" if little else ">"
    first = struct.unpack(order + "I", tiff[4:8])[0]
    count = struct.unpack(order + "H", tiff[first : first + 2])[0]
    link = first + 2 + 12 * count
    second = len(tiff) + len(tiff) % 2
    tiff = bytearray(tiff.ljust(second, b"\0"))
    tiff[link : link + 4] = struct.pack(order + "I", second)
    marker = b"THUMBNAIL-BYTES\0"
    tiff += struct.pack(order + "HHHIII", 1, 270, 2, len(marker), second + 18, 0) + marker
    path = saved(tmp_path, Image.fromarray(smooth()), "in.jpg", exif=bytes(block[:6] + tiff))
    with Image.open(path) as image:  # the test is worth something only if it is there to begin with
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1)[270] == "THUMBNAIL-BYTES"
    photo = read(path)
    out = write(tmp_path / "out.jpg", photo.pixels, photo, keep_metadata=True)
    assert b"THUMBNAIL-BYTES" not in out.read_bytes()
    with Image.open(out) as image:
        assert image.getexif()[ExifTags.Base.Model] == "Camera 1"


def test_a_tiffs_own_structure_does_not_travel(tmp_path: Path) -> None:
    photo = read(_with_metadata(tmp_path, "in.tif"))
    path = write(tmp_path / "out.png", photo.pixels, photo, keep_metadata=True)
    with Image.open(path) as image:
        exif = image.getexif()
        assert exif[ExifTags.Base.Model] == "Camera 1"
        assert ExifTags.Base.StripOffsets not in exif


def test_broken_exif_does_not_cost_the_photo(tmp_path: Path) -> None:
    broken = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\1" * 20
    photo = read(saved(tmp_path, Image.fromarray(smooth()), "a.jpg", exif=broken))
    assert photo.pixels.shape == (24, 32, 3)
    assert photo.exif is None


# --- alpha, quality, determinism ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_restored_and_hidden_colours_survive(tmp_path: Path, suffix: str) -> None:
    alpha = np.where(ALPHA < 128, 0, ALPHA).astype(np.uint8)
    photo = read(write(tmp_path / f"a{suffix}", NOISE, photo_of(NOISE, alpha=alpha)))
    assert np.array_equal(photo.alpha, alpha)
    assert np.array_equal(photo.pixels, NOISE)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_transparency_is_never_dropped_silently(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ImageError, match=r"transparency; write a \.png"):
        write(tmp_path / f"a{suffix}", NOISE, photo_of(NOISE, alpha=ALPHA))
    opaque = np.full_like(ALPHA, 255)
    assert write(tmp_path / f"a{suffix}", NOISE, photo_of(NOISE, alpha=opaque)).exists()


def test_jpeg_is_4_4_4_and_better_at_95_than_at_50(tmp_path: Path) -> None:
    high = write(tmp_path / "a.jpg", NOISE, photo_of(NOISE))
    low = write(tmp_path / "b.jpg", NOISE, photo_of(NOISE), quality=50)
    with Image.open(high) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    errors = [np.abs(read(path).pixels.astype(int) - NOISE).mean() for path in (high, low)]
    assert errors[0] < 4 < 8 < errors[1]


@pytest.mark.parametrize(
    ("name", "quality", "message"),
    [("a.jpg", 0, "1 to 100"), ("a.jpg", 101, "1 to 100"), ("a.png", 90, "lossless")],
)
def test_impossible_quality(tmp_path: Path, name: str, quality: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / name, NOISE, photo_of(NOISE), quality=quality)


def test_equal_pixels_give_equal_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.png", NOISE, photo_of(NOISE)).read_bytes()
    assert write(tmp_path / "b.png", NOISE, photo_of(NOISE)).read_bytes() == first
    with Image.open(io.BytesIO(first)) as image:  # the profile carries no time of creation
        assert image.info["icc_profile"][24:36] == struct.pack(">6H", 2000, 1, 1, 0, 0, 0)


# --- writing ------------------------------------------------------------------------------------


def _leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing/a.png", OutputError, "does not exist"),
        ("folder.png", OutputError, "is a folder"),
        ("in.png", OutputError, "is the original"),
        ("link.png", OutputError, "is the original"),
        ("a.xyz", ImageError, ".webp"),
        ("noending", ImageError, ".webp"),
        ("n" * 300 + ".png", OutputError, "name too long"),
    ],
)
def test_impossible_destinations(
    tmp_path: Path, name: str, error: type[ShieldsError], message: str
) -> None:
    original = saved(tmp_path, Image.fromarray(NOISE), "in.png")
    before = original.read_bytes()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(original)
    with pytest.raises(error, match=message):
        write(tmp_path / name, NOISE, read(original))
    assert original.read_bytes() == before
    assert _leftovers(tmp_path) == []


def test_a_place_that_takes_no_files() -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write("/proc/a.png", NOISE, photo_of(NOISE))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write(path, NOISE, photo_of(NOISE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert _leftovers(tmp_path) == []


def test_an_interrupt_leaves_no_half_written_file(tmp_path: Path, monkeypatch: object) -> None:
    path = tmp_path / "a.png"
    seen = []

    def interrupt(_: int) -> None:
        seen.extend(_leftovers(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, NOISE, photo_of(NOISE))
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_pixels_of_another_size_or_type_are_refused(tmp_path: Path) -> None:
    for wrong in (NOISE[:-1], NOISE.astype(np.float32)):
        with pytest.raises(ImageError, match="uint8, got"):
            write(tmp_path / "a.png", wrong, photo_of(NOISE))


def test_too_large_for_the_format_is_an_output_error(tmp_path: Path) -> None:
    wide = np.zeros((16, 17000, 3), dtype=np.uint8)
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "a.webp", wide, photo_of(wide))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_reading_50_megapixels_makes_no_float_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8660, 5774), (90, 120, 150)).save(path)
    code = """
import re, sys
from pathlib import Path
from shields.photo import read

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before = peak()
photo = read(sys.argv[1])
assert photo.width == 8660
print(peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert 143 < float(result.stdout) < 550  # MiB: 143 are the result, a float32 copy is 572
