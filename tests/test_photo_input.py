"""Reading: whatever comes in is upright, 8 bit and of full size, or one clear error."""

from __future__ import annotations

import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile

from shields.errors import ImageError, MissingPackage
from shields.photo import READABLE, read, write
from tests.photos import ALPHA, NOISE, chunk, photo_of, saved, smooth


def _png(values: np.ndarray, *, depth: int, kind: int, extra: bytes = b"") -> bytes:
    """A PNG made by hand, for depths that Pillow cannot write."""
    height, width = values.shape[:2]
    rows = b"".join(
        b"\0" + values[row].astype(f">u{depth // 8}").tobytes() for row in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".tiff", ".bmp"])
def test_lossless_formats_return_the_pixels(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", NOISE, photo_of(NOISE))
    photo = read(path)
    assert np.array_equal(photo.pixels, NOISE)
    assert photo.pixels.dtype == np.uint8
    assert photo.notes == ()
    assert photo.path == path


def test_pixels_can_become_a_tensor_without_a_warning(tmp_path: Path) -> None:
    photo = read(write(tmp_path / "a.png", NOISE, photo_of(NOISE)))
    assert torch.equal(
        (photo.image() * 255).round().byte()[0], torch.tensor(NOISE).permute(2, 0, 1)
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
    rgba = np.ascontiguousarray(stored(np.dstack([NOISE, ALPHA])))
    photo = read(saved(tmp_path, Image.fromarray(rgba), "a.png", exif=exif))
    assert np.array_equal(photo.pixels, NOISE)
    assert np.array_equal(photo.alpha, ALPHA)
    assert ("rotated by EXIF" in photo.notes) == (orientation != 1)
    assert photo.exif is None


def test_a_turned_tiff_is_turned_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(NOISE)))
    photo = read(saved(tmp_path, stored, "a.tif", exif=exif))
    assert np.array_equal(photo.pixels, NOISE)
    assert "rotated by EXIF" in photo.notes


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_rounded_to_the_nearest_level(tmp_path: Path, suffix: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    photo = read(saved(tmp_path, Image.fromarray(values), f"a{suffix}"))
    expected = np.round(values.astype(float) / 257).astype(np.uint8)
    assert np.array_equal(photo.pixels, np.repeat(expected[..., None], 3, axis=2))
    assert "16 bit to 8 bit" in photo.notes


def test_16_bit_grey_keeps_its_transparent_value(tmp_path: Path) -> None:
    values = np.full((16, 16), 1000, dtype=np.uint16)
    values[3, 4] = 40000
    data = _png(values, depth=16, kind=0, extra=chunk(b"tRNS", struct.pack(">H", 40000)))
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
    image = Image.fromarray(ALPHA).convert(mode)
    photo = read(saved(tmp_path, image, "a.png"))
    assert np.array_equal(photo.pixels, np.asarray(image.convert("RGB")))
    assert photo.alpha is None
    assert any(note.endswith("to RGB") for note in photo.notes)


def test_grey_with_alpha_is_split(tmp_path: Path) -> None:
    stored = Image.merge("LA", [Image.fromarray(NOISE[..., 0]), Image.fromarray(ALPHA)])
    photo = read(saved(tmp_path, stored, "a.png"))
    assert np.array_equal(photo.pixels, np.repeat(NOISE[..., :1], 3, axis=2))
    assert np.array_equal(photo.alpha, ALPHA)


def test_palette_with_transparency(tmp_path: Path) -> None:
    indices = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 4
    palette = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    photo = read(saved(tmp_path, image, "a.png", transparency=2))
    assert np.array_equal(photo.pixels, palette[indices])
    assert np.array_equal(photo.alpha, np.where(indices == 2, 0, 255))
    assert read(saved(tmp_path, image, "b.png")).alpha is None


def test_one_transparent_colour_becomes_alpha(tmp_path: Path) -> None:
    pixels = smooth()
    path = saved(
        tmp_path, Image.fromarray(pixels), "a.png", transparency=tuple(pixels[5, 6].tolist())
    )
    photo = read(path)
    assert np.array_equal(photo.pixels, pixels)
    assert np.array_equal(photo.alpha == 0, (pixels == pixels[5, 6]).all(axis=2))


def test_cmyk_without_a_profile(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(smooth()).convert("CMYK"), "a.tif")
    photo = read(path)
    assert np.abs(photo.pixels.astype(int) - smooth()).max() <= 1
    assert any("approximate" in note for note in photo.notes)


def test_lab_comes_back_as_the_colours_it_was_made_of(tmp_path: Path) -> None:
    lab = ImageCms.profileToProfile(
        Image.fromarray(smooth()),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    photo = read(saved(tmp_path, lab, "a.tif"))
    assert np.abs(photo.pixels.astype(int) - smooth()).max() <= 4


@pytest.mark.parametrize("name", ["a.gif", "a.avif", "a.jp2", "a.ppm", "a.jpg"])
def test_formats_that_are_read_but_need_no_writing(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, Image.fromarray(smooth()), name)
    assert np.abs(read(path).pixels.astype(int) - smooth()).mean() < 4
    assert path.suffix in READABLE


# --- bad input ----------------------------------------------------------------------------------


def _bad(folder: Path, case: str) -> Path:
    image = Image.fromarray(NOISE)
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
        whole = saved(folder, image, f"whole.{case.split()[1]}").read_bytes()
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif case.startswith("animated"):
        path = folder / f"moving.{case.split()[1]}"
        image.save(path, save_all=True, append_images=[Image.fromarray(smooth())])
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
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(ImageError, match="--max-pixels"):
        read(path)
    small = saved(tmp_path, Image.fromarray(NOISE), "a.png")
    with pytest.raises(ImageError, match="more than 766 pixels"):
        read(small, max_pixels=766)
    assert read(small, max_pixels=768).width == 32


def test_a_limit_above_pillows_own_is_obeyed(tmp_path: Path, monkeypatch: object) -> None:
    path = saved(tmp_path, Image.fromarray(NOISE), "a.png")
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
    path = saved(tmp_path, Image.fromarray(NOISE), "a.png")
    path.chmod(0)
    with pytest.raises(ImageError, match="permissions"):
        read(path)


def test_a_camera_file_with_a_second_picture_gives_the_first(tmp_path: Path) -> None:
    extra = [Image.fromarray(np.zeros((24, 32, 3), dtype=np.uint8))]
    image = Image.fromarray(smooth())
    image.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=extra)
    photo = read(tmp_path / "a.jpg")
    assert np.abs(photo.pixels.astype(int) - smooth()).mean() < 4
    assert "main one of 2 pictures in the file" in photo.notes


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="the HEIC reader is installed")
def test_heic_without_the_reader_names_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + b"\0" * 40)
    with pytest.raises(MissingPackage, match=r"pip install 'shields\[heic\]'"):
        read(path)
