"""Photos as they are: whatever comes in is upright sRGB of full size, or one clear error."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile

from shields.budget import Budget
from shields.errors import ConfigError, ImageError, MissingPackage, OutputError, ShieldsError
from shields.photo import READABLE, WRITABLE, quantize, read, write
from shields.types import Photo

_RNG = np.random.default_rng(0)
_NOISE = _RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
_ALPHA = _RNG.integers(0, 256, (24, 32), dtype=np.uint8)


def _smooth(height: int = 24, width: int = 32) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    red, green = 40 + rows * 160 / height, 60 + columns * 120 / width
    return np.stack([red, green, np.full(rows.shape, 110.0)], axis=-1).round().astype(np.uint8)


def _saved(folder: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def _photo(pixels: np.ndarray, **fields: object) -> Photo:
    return Photo(pixels=pixels, **fields)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(values: np.ndarray, *, depth: int, kind: int, extra: bytes = b"") -> bytes:
    """A PNG made by hand, for depths that Pillow cannot write."""
    height, width = values.shape[:2]
    rows = b"".join(
        b"\0" + values[row].astype(f">u{depth // 8}").tobytes() for row in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + extra
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".tiff", ".bmp"])
def test_lossless_formats_return_the_pixels(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", _NOISE, _photo(_NOISE))
    photo = read(path)
    assert np.array_equal(photo.pixels, _NOISE)
    assert photo.pixels.dtype == np.uint8
    assert photo.notes == ()
    assert photo.path == path


def test_pixels_can_become_a_tensor_without_a_warning(tmp_path: Path) -> None:
    photo = read(write(tmp_path / "a.png", _NOISE, _photo(_NOISE)))
    assert torch.equal(
        (photo.image() * 255).round().byte()[0], torch.tensor(_NOISE).permute(2, 0, 1)
    )
    photo.pixels[0, 0] = 0  # raises if the array belongs to the decoder


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_pixels_and_alpha(tmp_path: Path, orientation: int) -> None:
    # the inverse of what each orientation asks for, written without Pillow's table
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.swapaxes(a, 0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    rgba = np.ascontiguousarray(stored(np.dstack([_NOISE, _ALPHA])))
    photo = read(_saved(tmp_path, Image.fromarray(rgba), "a.png", exif=exif))
    assert np.array_equal(photo.pixels, _NOISE)
    assert np.array_equal(photo.alpha, _ALPHA)
    assert ("rotated by EXIF" in photo.notes) == (orientation != 1)
    assert photo.exif is None


def test_a_turned_tiff_is_turned_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(_NOISE)))
    photo = read(_saved(tmp_path, stored, "a.tif", exif=exif))
    assert np.array_equal(photo.pixels, _NOISE)
    assert "rotated by EXIF" in photo.notes


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_rounded_to_the_nearest_level(tmp_path: Path, suffix: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    photo = read(_saved(tmp_path, Image.fromarray(values), f"a{suffix}"))
    expected = np.round(values.astype(float) / 257).astype(np.uint8)
    assert np.array_equal(photo.pixels, np.repeat(expected[..., None], 3, axis=2))
    assert "16 bit to 8 bit" in photo.notes


def test_16_bit_grey_keeps_its_transparent_value(tmp_path: Path) -> None:
    values = np.full((16, 16), 1000, dtype=np.uint16)
    values[3, 4] = 40000
    data = _png(values, depth=16, kind=0, extra=_chunk(b"tRNS", struct.pack(">H", 40000)))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    photo = read(path)
    assert photo.alpha is not None
    assert np.argwhere(photo.alpha == 0).tolist() == [[3, 4]]


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)])
def test_16_bit_colour_is_within_a_level(tmp_path: Path, kind: int, channels: int) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (16, 20, channels))
    path = tmp_path / "a.png"
    path.write_bytes(_png(values, depth=16, kind=kind))
    photo = read(path)
    assert np.abs(photo.pixels - values[..., :3] / 257).max() <= 1
    assert (photo.alpha is not None) == (channels == 4)
    assert "16 bit to 8 bit" in photo.notes


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_has_three_equal_channels(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(_ALPHA).convert(mode)
    photo = read(_saved(tmp_path, image, "a.png"))
    assert np.array_equal(photo.pixels, np.asarray(image.convert("RGB")))
    assert photo.alpha is None
    assert any(note.endswith("to RGB") for note in photo.notes)


def test_grey_with_alpha_is_split(tmp_path: Path) -> None:
    stored = Image.merge("LA", [Image.fromarray(_NOISE[..., 0]), Image.fromarray(_ALPHA)])
    photo = read(_saved(tmp_path, stored, "a.png"))
    assert np.array_equal(photo.pixels, np.repeat(_NOISE[..., :1], 3, axis=2))
    assert np.array_equal(photo.alpha, _ALPHA)


def test_palette_with_transparency(tmp_path: Path) -> None:
    indices = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 4
    palette = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    photo = read(_saved(tmp_path, image, "a.png", transparency=2))
    assert np.array_equal(photo.pixels, palette[indices])
    assert np.array_equal(photo.alpha, np.where(indices == 2, 0, 255))
    assert read(_saved(tmp_path, image, "b.png")).alpha is None


def test_one_transparent_colour_becomes_alpha(tmp_path: Path) -> None:
    pixels = _smooth()
    path = _saved(
        tmp_path, Image.fromarray(pixels), "a.png", transparency=tuple(pixels[5, 6].tolist())
    )
    photo = read(path)
    assert np.array_equal(photo.pixels, pixels)
    assert np.array_equal(photo.alpha == 0, (pixels == pixels[5, 6]).all(axis=2))


def test_cmyk_without_a_profile(tmp_path: Path) -> None:
    path = _saved(tmp_path, Image.fromarray(_smooth()).convert("CMYK"), "a.tif")
    photo = read(path)
    assert np.abs(photo.pixels.astype(int) - _smooth()).max() <= 1
    assert any("approximate" in note for note in photo.notes)


def test_lab_comes_back_as_the_colours_it_was_made_of(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(_smooth()),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    photo = read(_saved(tmp_path, lab, "a.tif"))
    assert np.abs(photo.pixels.astype(int) - _smooth()).max() <= 4


@pytest.mark.parametrize("name", ["a.gif", "a.avif", "a.jp2", "a.ppm", "a.jpg"])
def test_formats_that_are_read_but_need_no_writing(tmp_path: Path, name: str) -> None:
    path = _saved(tmp_path, Image.fromarray(_smooth()), name)
    assert np.abs(read(path).pixels.astype(int) - _smooth()).mean() < 4
    assert path.suffix in READABLE


# --- colour -------------------------------------------------------------------------------------


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
    photo = read(_saved(tmp_path, Image.fromarray(pixels), "a.png", icc_profile=profile))
    assert np.abs(photo.pixels[0, 0].astype(int) - 100).max() <= 4
    red, green, _ = photo.pixels[0, 15].astype(int)
    assert red > 190
    assert green < 95
    assert "from Wide test to sRGB" in photo.notes


def test_a_profile_changes_tones_as_its_gamma_says(tmp_path: Path) -> None:
    grey = np.repeat(np.full((16, 16, 1), 128, dtype=np.uint8), 3, axis=2)
    profile = _matrix_profile(1.0, _SRGB_PRIMARIES)
    photo = read(_saved(tmp_path, Image.fromarray(grey), "a.png", icc_profile=profile))
    expected = 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(photo.pixels - expected).max() <= 2


def test_an_srgb_profile_leaves_every_bit(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = read(_saved(tmp_path, Image.fromarray(_NOISE), "a.png", icc_profile=profile))
    assert np.array_equal(photo.pixels, _NOISE)
    assert photo.notes == ()


def test_grey_with_a_colour_profile_is_converted(tmp_path: Path) -> None:
    profile = _matrix_profile(1.0, _SRGB_PRIMARIES)
    grey = Image.fromarray(np.full((16, 16), 128, dtype=np.uint8))
    photo = read(_saved(tmp_path, grey, "a.png", icc_profile=profile))
    assert photo.pixels.min() > 180


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_broken_or_foreign_profile_is_noted_and_ignored(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(_smooth()).convert(mode)
    profile = b"nonsense" * 40 if mode == "RGB" else _matrix_profile(1.0, _SRGB_PRIMARIES)
    photo = read(_saved(tmp_path, image, "a.tif", icc_profile=profile))
    assert np.abs(photo.pixels.astype(int) - _smooth()).max() <= 1
    assert any("colour profile not usable" in note for note in photo.notes)


@pytest.mark.parametrize("suffix", sorted(set(WRITABLE) - {".bmp"}))
def test_every_format_is_tagged_as_srgb(tmp_path: Path, suffix: str) -> None:
    foreign = _matrix_profile(1.0, _SRGB_PRIMARIES)
    photo = read(_saved(tmp_path, Image.fromarray(_smooth()), "in.png", icc_profile=foreign))
    path = write(tmp_path / f"out{suffix}", photo.pixels, photo)
    with Image.open(path) as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    assert read(path).notes == ()


# --- metadata -----------------------------------------------------------------------------------


def _metadata() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Model] = "Camera 1"
    exif[ExifTags.IFD.Exif] = {0x9003: "2024:05:06 07:08:09", 0x927C: b"preview" * 9, 0xA002: 32}
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (48.0, 51.0, 30.0)}
    return exif


def _with_metadata(folder: Path, name: str = "in.jpg") -> Path:
    # as bytes, as a file brings it: the TIFF encoder takes no fresh blocks
    return _saved(folder, Image.fromarray(_smooth()), name, exif=_metadata().tobytes())


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
    path = _saved(tmp_path, Image.fromarray(_smooth()), "in.jpg", exif=bytes(block[:6] + tiff))
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
    photo = read(_saved(tmp_path, Image.fromarray(_smooth()), "a.jpg", exif=broken))
    assert photo.pixels.shape == (24, 32, 3)
    assert photo.exif is None


# --- alpha, quality, determinism ----------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_restored_and_hidden_colours_survive(tmp_path: Path, suffix: str) -> None:
    alpha = np.where(_ALPHA < 128, 0, _ALPHA).astype(np.uint8)
    photo = read(write(tmp_path / f"a{suffix}", _NOISE, _photo(_NOISE, alpha=alpha)))
    assert np.array_equal(photo.alpha, alpha)
    assert np.array_equal(photo.pixels, _NOISE)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp"])
def test_transparency_is_never_dropped_silently(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ImageError, match=r"transparency; write a \.png"):
        write(tmp_path / f"a{suffix}", _NOISE, _photo(_NOISE, alpha=_ALPHA))
    opaque = np.full_like(_ALPHA, 255)
    assert write(tmp_path / f"a{suffix}", _NOISE, _photo(_NOISE, alpha=opaque)).exists()


def test_jpeg_is_4_4_4_and_better_at_95_than_at_50(tmp_path: Path) -> None:
    high = write(tmp_path / "a.jpg", _NOISE, _photo(_NOISE))
    low = write(tmp_path / "b.jpg", _NOISE, _photo(_NOISE), quality=50)
    with Image.open(high) as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3
    errors = [np.abs(read(path).pixels.astype(int) - _NOISE).mean() for path in (high, low)]
    assert errors[0] < 4 < 8 < errors[1]


@pytest.mark.parametrize(
    ("name", "quality", "message"),
    [("a.jpg", 0, "1 to 100"), ("a.jpg", 101, "1 to 100"), ("a.png", 90, "lossless")],
)
def test_impossible_quality(tmp_path: Path, name: str, quality: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write(tmp_path / name, _NOISE, _photo(_NOISE), quality=quality)


def test_equal_pixels_give_equal_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.png", _NOISE, _photo(_NOISE)).read_bytes()
    assert write(tmp_path / "b.png", _NOISE, _photo(_NOISE)).read_bytes() == first
    with Image.open(io.BytesIO(first)) as image:  # the profile carries no time of creation
        assert image.info["icc_profile"][24:36] == struct.pack(">6H", 2000, 1, 1, 0, 0, 0)


# --- bad input ----------------------------------------------------------------------------------


def _bad(folder: Path, case: str) -> Path:
    image = Image.fromarray(_NOISE)
    path = folder / "bad.png"
    if case == "folder":
        path.mkdir()
    elif case == "empty":
        path.touch()
    elif case == "text":
        path = folder / "text.jpg"
        path.write_text("this is no photo\n" * 50)
    elif case == "pipe":
        os.mkfifo(path)
    elif case.startswith("truncated"):
        whole = _saved(folder, image, f"whole.{case.split()[1]}").read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif case.startswith("animated"):
        path = folder / f"moving.{case.split()[1]}"
        image.save(path, save_all=True, append_images=[Image.fromarray(_smooth())])
    elif case == "1x1":
        Image.new("RGB", (1, 1)).save(path)
    elif case == "20000x1":
        Image.new("RGB", (20000, 1)).save(path)
    elif case == "float":
        path = folder / "float.tif"
        Image.fromarray(np.ones((16, 16), dtype=np.float32)).save(path)
    elif case == "postscript":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n")
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "No such file"),
        ("folder", "folder"),
        ("pipe", "device"),
        ("empty", "0 bytes"),
        ("text", "is no photo; read are HEIC, JPEG"),
        ("postscript", "is no photo; read are HEIC, JPEG"),
        ("truncated png", "damaged or incomplete"),
        ("truncated jpg", "damaged or incomplete"),
        ("truncated webp", "damaged or incomplete|no photo"),
        ("truncated tif", "damaged or incomplete"),
        ("truncated gif", "damaged or incomplete"),
        ("truncated avif", "damaged or incomplete|no photo"),
        ("animated gif", "2 frames"),
        ("animated webp", "2 frames"),
        ("animated png", "2 frames"),
        ("animated tif", "2 frames"),
        ("1x1", "16 pixels"),
        ("20000x1", "16 pixels"),
        ("float", "unknown range"),
    ],
)
def test_bad_input_is_one_line_that_names_the_file(tmp_path: Path, case: str, message: str) -> None:
    path = _bad(tmp_path, case)
    with pytest.raises(ImageError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_by_its_header_and_the_limit_can_be_raised(tmp_path: Path) -> None:
    # a header only: decoding it would fail with another message
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b""))
    with pytest.raises(ImageError, match="--max-pixels"):
        read(path)
    small = _saved(tmp_path, Image.fromarray(_NOISE), "a.png")
    with pytest.raises(ImageError, match="more than 766 pixels"):
        read(small, max_pixels=766)
    assert read(small, max_pixels=768).width == 32


def test_a_limit_above_pillows_own_is_obeyed(tmp_path: Path, monkeypatch: object) -> None:
    path = _saved(tmp_path, Image.fromarray(_NOISE), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read(path).width == 32
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pillows_globals_are_as_before_even_after_an_error(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    for case in ("truncated png", "1x1"):
        with pytest.raises(ImageError):
            read(_bad(tmp_path, case), max_pixels=10_000)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_truncated_files_are_refused_even_if_someone_allowed_them(
    tmp_path: Path, monkeypatch: object
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="damaged"):
        read(_bad(tmp_path, "truncated jpg"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = _saved(tmp_path, Image.fromarray(_NOISE), "a.png")
    path.chmod(0)
    with pytest.raises(ImageError, match="permissions"):
        read(path)


def test_a_camera_file_with_a_second_picture_gives_the_first(tmp_path: Path) -> None:
    extra = [Image.fromarray(np.zeros((24, 32, 3), dtype=np.uint8))]
    image = Image.fromarray(_smooth())
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=extra)
    photo = read(tmp_path / "a.jpg")
    assert np.abs(photo.pixels.astype(int) - _smooth()).mean() < 4
    assert "main one of 2 pictures in the file" in photo.notes


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="the HEIC reader is installed")
def test_heic_without_the_reader_names_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    with pytest.raises(MissingPackage, match=r"pip install 'shields\[heic\]'"):
        read(path)


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
    original = _saved(tmp_path, Image.fromarray(_NOISE), "in.png")
    before = original.read_bytes()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(original)
    with pytest.raises(error, match=message):
        write(tmp_path / name, _NOISE, read(original))
    assert original.read_bytes() == before
    assert _leftovers(tmp_path) == []


def test_a_place_that_takes_no_files() -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write("/proc/a.png", _NOISE, _photo(_NOISE))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match="File too large"):
            write(path, _NOISE, _photo(_NOISE))
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
        write(path, _NOISE, _photo(_NOISE))
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_pixels_of_another_size_or_type_are_refused(tmp_path: Path) -> None:
    for wrong in (_NOISE[:-1], _NOISE.astype(np.float32)):
        with pytest.raises(ImageError, match="uint8, got"):
            write(tmp_path / "a.png", wrong, _photo(_NOISE))


def test_too_large_for_the_format_is_an_output_error(tmp_path: Path) -> None:
    wide = np.zeros((16, 17000, 3), dtype=np.uint8)
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "a.webp", wide, _photo(wide))


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


# --- rounding -----------------------------------------------------------------------------------


def _tensor(levels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(levels / 255).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("levels", [0.0, 0.5, 4.0, 6.375, 7.65, 8.0])
def test_rounding_never_exceeds_whole_levels(levels: float) -> None:
    change = np.random.default_rng(2).uniform(-levels, levels, _NOISE.shape)
    result = quantize(_NOISE, _tensor(change), Budget(levels=levels)).astype(int)
    assert np.abs(result - _NOISE).max() <= int(levels)
    # independently: nearest, then clamped
    expected = np.clip(np.round(change), -int(levels), int(levels)) + _NOISE
    assert np.abs(result - np.clip(expected, 0, 255)).max() == 0


def test_the_budget_is_reached_where_there_is_room() -> None:
    grey = np.full((4, 5, 3), 100, dtype=np.uint8)
    for sign in (1, -1):
        result = quantize(grey, torch.full((1, 3, 4, 5), sign * 8 / 255), Budget(levels=8))
        assert (result == 100 + sign * 8).all()


def test_zero_perturbation_or_mask_keeps_every_bit() -> None:
    change = np.random.default_rng(3).uniform(-8, 8, _NOISE.shape)
    change[::2] = 0
    mask = torch.ones(1, 1, *_NOISE.shape[:2])
    mask[..., 1::4] = 0
    result = quantize(_NOISE, _tensor(change), Budget(levels=8), mask)
    assert np.array_equal(result[::2], _NOISE[::2])
    assert np.array_equal(result[:, 1::4], _NOISE[:, 1::4])
    assert not np.array_equal(result, _NOISE)


def test_a_mask_scales_the_budget() -> None:
    grey = np.full((2, 2, 3), 100, dtype=np.uint8)
    mask = torch.tensor([[[[1.0, 0.5], [0.49, 0.1]]]])
    result = quantize(grey, torch.full((1, 3, 2, 2), 1.0), Budget(levels=8), mask)
    assert (result[..., 0] - 100).tolist() == [[8, 4], [3, 0]]


def test_l2_rounding_never_lengthens() -> None:
    rng = np.random.default_rng(4)
    for seed in range(5):
        change = rng.normal(size=_NOISE.shape) * (seed + 1)
        tensor = _tensor(change)
        length = float(tensor.double().mul(255).norm())
        result = quantize(_NOISE, tensor, Budget(levels=length, norm="l2"))
        assert 0 < np.linalg.norm(result.astype(float) - _NOISE) <= length


def test_extremes_do_not_wrap() -> None:
    ends = np.array([[[0, 255, 128]]], dtype=np.uint8)
    for sign, expected in ((-1, [0, 247, 120]), (1, [8, 255, 136])):
        result = quantize(ends, torch.full((1, 3, 1, 1), sign * 8 / 255), Budget(levels=8))
        assert result[0, 0].tolist() == expected
    free = quantize(ends, torch.full((1, 3, 1, 1), -1.0), Budget(norm="none"))
    assert free.max() == 0


def test_strips_agree_with_the_whole() -> None:
    rng = np.random.default_rng(5)
    tall = rng.integers(0, 256, (700, 3, 3), dtype=np.uint8)
    change = rng.uniform(-8, 8, tall.shape)
    mask = torch.from_numpy(rng.uniform(0, 1, (1, 1, 700, 3))).float()
    whole = quantize(tall, _tensor(change), Budget(levels=8), mask)
    rows = [
        quantize(
            tall[i : i + 1], _tensor(change[i : i + 1]), Budget(levels=8), mask[:, :, i : i + 1]
        )
        for i in range(700)
    ]
    assert np.array_equal(whole, np.concatenate(rows))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    broken = torch.zeros(1, 3, 24, 32)
    broken[0, 1, 2, 3] = value
    with pytest.raises(ImageError, match="finite"):
        quantize(_NOISE, broken, Budget())


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ImageError, match="is needed, got"):
        quantize(_NOISE, torch.zeros(1, 3, 24, 31), Budget())
    with pytest.raises(ImageError, match="is needed, got"):
        quantize(_NOISE, torch.zeros(1, 3, 24, 32), Budget(), torch.ones(1, 3, 24, 32))
