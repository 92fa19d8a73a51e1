"""Read and write photo files: orientation, colour, alpha, rounding, metadata.

Pixels stay 8 bit at full size throughout; nothing here makes a float copy of a whole photo.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageFile, UnidentifiedImageError
from torch import Tensor

from shields.budget import Budget
from shields.errors import ConfigError, ImageError, OutputError, ShieldsError
from shields.files import aside
from shields.registry import Registry
from shields.types import Mask, Perturbation, Photo

__all__ = ["READABLE", "WRITABLE", "quantize", "read", "write"]

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    # without `exact` the colours under transparent pixels are rewritten
    ".webp": ("WEBP", {"lossless": True, "exact": True}),
    ".tif": ("TIFF", {}),  # not compressed: libtiff's encoders refuse EXIF
    ".tiff": ("TIFF", {}),
    ".bmp": ("BMP", {}),
    ".jpg": ("JPEG", {"subsampling": 0}),
    ".jpeg": ("JPEG", {"subsampling": 0}),
}
#: suffixes that `write` knows; all are lossless but JPEG
WRITABLE = tuple(_FORMATS)
#: suffixes that a walk through a folder takes for photos; `read` itself goes by content
READABLE = (*WRITABLE, ".gif", ".avif", ".heic", ".heif", ".jp2", ".ppm", ".pgm")

#: Only formats that hold photos: others run foreign programs (EPS) or match anything at all (TGA).
_DECODERS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")
_READERS: Registry[Any] = Registry("reader", {"heic": "pillow_heif:register_heif_opener"})
_LEAST_SIDE = 16
_STRIP_ROWS = 256
_PILLOW_LOCK = threading.Lock()
_INTENT, _FLAGS = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
_MODES = {"1": "black and white", "L": "grey", "LA": "grey", "P": "palette", "PA": "palette"}
_TO_8_BIT = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)  # nearest value
#: what orientations 2 to 8 of EXIF ask for; 1 and nonsense ask for nothing
_TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))

#: What describes the photo. The rest describes the file (offsets, strips) or holds a thumbnail,
#: which would carry the unprotected face along; makers hide previews in their notes, too.
_KEPT_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 18246, 18249, 33432}
_KEPT_TAGS |= {40091, 40092, 40093, 40094, 40095}
_DROPPED_TAGS = {0x927C, 0xA005}  # maker note, interoperability


def read(path: str | os.PathLike[str], *, max_pixels: int = 120_000_000) -> Photo:
    """Read any photo: upright, sRGB, 8 bit, full size; alpha and EXIF are kept aside.

    Args:
        path: JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, JPEG 2000, PPM; HEIC with `shields[heic]`.
        max_pixels: Refuse files whose header announces more, before anything is decoded.

    Returns:
        The photo; `notes` says what reading changed.

    Raises:
        ImageError: The file is absent, damaged, animated, too large or too small, or no photo.
        MissingPackage: The file is HEIC and its optional reader is not installed.
    """
    path = Path(path)
    _check_file(path)
    with _strict_pillow(max_pixels) as messages:
        try:
            photo = _decode(path, max_pixels)
        except (ShieldsError, MemoryError):
            raise
        except Exception as error:  # decoders raise anything on damaged data
            raise ImageError(
                f"{path} is damaged or incomplete ({_reason(error)}); get the original file again"
            ) from error
    remarks = dict.fromkeys(f"decoder: {message.message}" for message in messages)
    return replace(photo, notes=photo.notes + tuple(remarks))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_file(path: Path) -> None:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ImageError(f"{path} is a folder or device; a photo file is needed")
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        reason = f"{error.strerror}; check its name and permissions"
        raise ImageError(f"{path} cannot be opened: {reason}") from error
    if empty:
        raise ImageError(f"{path} is empty (0 bytes); get the original file again")


@contextmanager
def _strict_pillow(max_pixels: int) -> Iterator[list[warnings.WarningMessage]]:
    """Lend Pillow our limits for one file and collect its warnings; both are global state."""
    with _PILLOW_LOCK, warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses above twice its limit
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield messages
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limits


def _decode(path: Path, max_pixels: int) -> Photo:
    notes: list[str] = []
    with _open(path, max_pixels) as image:
        _check_header(image, path, notes)
        if ";16" in str(image.tile):
            notes.append("16 bit to 8 bit")
        if _exif(image).get(ExifTags.Base.Orientation) in _TURNS:
            notes.append("rotated by EXIF")
        image.load()
        # asked again, because the TIFF decoder turns the picture itself
        exif = _exif(image)
        turn = _TURNS.get(exif.get(ExifTags.Base.Orientation, 1))
        if image.mode not in {"RGB", "RGBA"}:
            notes.append(f"{_MODES.get(image.mode, image.mode)} to RGB")
        colour, alpha = _split_alpha(image)
        colour = _to_srgb(colour, image.info.get("icc_profile"), notes)
    if turn is not None:
        colour = colour.transpose(turn)
        alpha = None if alpha is None else alpha.transpose(turn)
    return Photo(
        pixels=np.array(colour),
        alpha=None if alpha is None else np.array(alpha),
        path=path,
        exif=_kept_exif(exif, colour.size, notes),
        notes=tuple(notes),
    )


def _open(path: Path, max_pixels: int) -> ImageFile.ImageFile:
    with path.open("rb") as file:
        head = file.read(12)
    formats = [*_DECODERS]
    if head[4:8] == b"ftyp" and head[8:12] not in {b"avif", b"avis"}:
        _READERS["heic"]()
        formats.append("HEIF")
    try:
        return Image.open(path, formats=formats)
    except UnidentifiedImageError:
        raise ImageError(f"{path} is no photo; read are HEIC, {', '.join(_DECODERS)}") from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"{path} announces more than {max_pixels} pixels; if you trust the file, "
            "raise the limit with --max-pixels"
        ) from None


def _check_header(image: Image.Image, path: Path, notes: list[str]) -> None:
    width, height = image.size
    if min(width, height) < _LEAST_SIDE:
        raise ImageError(f"{path} is {width}x{height}; {_LEAST_SIDE} pixels a side are the least")
    if image.mode in {"I", "F"}:
        raise ImageError(f"{path} has 32-bit pixels of unknown range; save it with 8 or 16 bits")
    frames = getattr(image, "n_frames", 1)
    # cameras store previews, depth or gain maps behind the one picture that people see
    if frames > 1 and image.format not in {"MPO", "HEIF"}:
        raise ImageError(f"{path} holds {frames} frames; save the one you want as a PNG of its own")
    if frames > 1:
        notes.append(f"main one of {frames} pictures in the file")


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Separate colour (L, RGB, CMYK or LAB, 8 bit) from alpha (L)."""
    alpha = None
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        image = Image.fromarray(_TO_8_BIT[values])
    elif image.has_transparency_data:
        image = image if image.mode in {"RGBA", "LA"} else image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode not in {"L", "RGB", "CMYK", "LAB"}:
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image, alpha


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Convert L, RGB, CMYK or LAB to sRGB, by the embedded profile where it can be used."""
    if image.mode == "LAB":  # its numbers are absolute
        return _transform(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), notes)
    if profile:
        try:
            return _transform(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), notes)
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
            notes.append(f"colour profile not usable ({_reason(error)}), ignored")
    elif image.mode == "CMYK":
        notes.append("no colour profile, so CMYK colours are approximate")
    return image if image.mode == "RGB" else image.convert("RGB")


def _transform(
    image: Image.Image, source: ImageCms.ImageCmsProfile, notes: list[str]
) -> Image.Image:
    if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        image = image.convert("RGB")
    srgb = ImageCms.createProfile("sRGB")
    # optimised tables miss dark LAB colours by many levels
    flags = ImageCms.Flags.NOOPTIMIZE if image.mode == "LAB" else _FLAGS
    transform = ImageCms.buildTransform(source, srgb, image.mode, "RGB", _INTENT, flags)
    if image.mode == "RGB" and _is_identity(transform):
        return image
    notes.append(f"from {ImageCms.getProfileDescription(source).strip()} to sRGB")
    return transform.apply(image)


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether colours stay within a level: a profile that is sRGB by another name."""
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    result = np.asarray(transform.apply(Image.fromarray(lattice)))
    return int(np.abs(result.astype(np.int16) - lattice).max()) <= 1


def _exif(image: Image.Image) -> Image.Exif:
    try:
        return image.getexif()
    except Exception:  # a broken block raises anything, and the picture is whole
        return Image.Exif()


def _kept_exif(source: Image.Exif, size: tuple[int, int], notes: list[str]) -> bytes | None:
    """EXIF that describes the photo: no orientation, thumbnail, maker note or file structure."""
    try:
        # What is true of the pixels as written: width, height, and 1 for sRGB.
        kept, ours = Image.Exif(), dict(zip((0xA002, 0xA003, 0xA001), (*size, 1), strict=True))
        for tag in _KEPT_TAGS & set(source):
            kept[tag] = source[tag]
        for block in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            values = {k: v for k, v in source.get_ifd(block).items() if k not in _DROPPED_TAGS}
            if values:
                kept[block] = values | {k: v for k, v in ours.items() if k in values}
        return kept.tobytes() if len(kept) else None
    except Exception as error:  # as above
        notes.append(f"EXIF not usable ({_reason(error)}), dropped")
        return None


def write(
    path: str | os.PathLike[str],
    pixels: np.ndarray,
    photo: Photo,
    *,
    keep_metadata: bool = False,
    quality: int | None = None,
) -> Path:
    """Write pixels with the photo's alpha, at once or not at all, tagged as sRGB.

    Args:
        path: Where to; the suffix chooses the format. All are lossless but JPEG (4:4:4).
        pixels: (H, W, 3) uint8, of the photo's size.
        photo: What was read: brings alpha and, if kept, EXIF.
        keep_metadata: Write the photo's EXIF, GPS included; a thumbnail is never written.
        quality: JPEG's, 1 to 100; 95 if left out.

    Raises:
        ConfigError: A quality that is out of range, or for a format that has none.
        ImageError: The pixels do not fit the photo, or the format cannot hold what it must.
        OutputError: The place is missing, not writable, full, or the photo read itself.
    """
    path = Path(path)
    options = _options(path, photo, keep_metadata=keep_metadata, quality=quality)
    if pixels.shape != photo.pixels.shape or pixels.dtype != np.uint8:
        raise ImageError(
            f"`pixels` must be {photo.pixels.shape} uint8, got {pixels.shape} {pixels.dtype}"
        )
    if photo.alpha is not None and options["format"] not in {"JPEG", "BMP"}:
        pixels = np.dstack([pixels, photo.alpha])
    _save(Image.fromarray(pixels), path, photo.path, options)
    return path


def _options(
    path: Path, photo: Photo, *, keep_metadata: bool, quality: int | None
) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ImageError(f"{path} ends in nothing that is written; known: {', '.join(WRITABLE)}")
    name, extra = _FORMATS[suffix]
    options = {"format": name, **extra}
    if name in {"JPEG", "BMP"} and photo.alpha is not None and photo.alpha.min() < 255:
        raise ImageError(f"{name} cannot hold the photo's transparency; write a .png")
    if name == "JPEG":
        options["quality"] = 95 if quality is None else quality
        if not 1 <= options["quality"] <= 100:
            raise ConfigError(f"`quality` must lie in 1 to 100, got {quality}")
    elif quality is not None:
        raise ConfigError(f"`quality` is for JPEG; {suffix} is lossless, leave it out")
    if name != "BMP":  # which Pillow writes without a profile; viewers take that for sRGB
        options["icc_profile"] = _srgb_profile()
    if keep_metadata and photo.exif is not None:
        if name == "BMP":
            raise ImageError("BMP cannot hold the photo's metadata; write a .png")
        options["exif"] = photo.exif
    return options


def _srgb_profile() -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # bytes 24 to 36 are the time of creation: fixed, so that equal pixels give equal files
    return profile[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]


def _check_place(path: Path, original: Path | None) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; the name of a file is needed")
    if original is not None and path.exists() and original.exists() and path.samefile(original):
        raise OutputError(f"{path} is the original photo; choose another name")


def _save(image: Image.Image, path: Path, original: Path | None, options: dict[str, Any]) -> None:
    """Write whole, and onto the disk before the name is there."""
    try:
        _check_place(path, original)
        with aside(path) as part, part.open("xb") as file:
            image.save(file, **options)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, ValueError, struct.error) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise OutputError(f"{path} cannot be written: {reason}") from error


def quantize(
    pixels: np.ndarray, perturbation: Perturbation, budget: Budget, mask: Mask | None = None
) -> np.ndarray:
    """Add a perturbation to 8-bit pixels, strip by strip, so that the result obeys the budget.

    Rounds to the nearest level (under an L2 budget towards the clean pixel, so that the length
    never grows), then clamps to whole levels within the budget times the mask, and to [0, 255].

    Args:
        pixels: (H, W, 3) uint8, the clean region.
        perturbation: (1, 3, H, W), image units.
        budget: What the result obeys.
        mask: (1, 1, H, W), [0, 1]; scales the budget. Everywhere 1 if left out.

    Returns:
        (H, W, 3) uint8, equal to `pixels` wherever the perturbation or the mask is 0.

    Raises:
        ImageError: Shapes that do not fit, or a perturbation that is not finite.
    """
    height, width = pixels.shape[:2]
    for tensor, channels in ((perturbation, 3), (mask, 1)):
        if tensor is not None and tensor.shape != (1, channels, height, width):
            raise ImageError(f"(1, {channels}, {height}, {width}) is needed, got {tensor.shape}")
    if pixels.dtype != np.uint8 or not bool(perturbation.isfinite().all()):
        raise ImageError(f"uint8 and a finite perturbation are needed, got {pixels.dtype}")
    reach = 255.0 if budget.norm == "none" else min(budget.levels, 255.0)
    result = np.empty_like(pixels)
    for top in range(0, height, _STRIP_ROWS):
        rows = slice(top, top + _STRIP_ROWS)
        limit: np.ndarray | int = budget.whole_levels
        if mask is not None:
            # half a mask times eight levels may come out a hair under four
            limit = np.floor(_rows(mask, rows) * reach + 1e-4)
        levels = _rows(perturbation, rows) * 255
        levels = np.trunc(levels) if budget.norm == "l2" else np.rint(levels)
        changed = pixels[rows] + np.clip(levels, -limit, limit)
        result[rows] = np.clip(changed, 0, 255).astype(np.uint8)
    return result


def _rows(tensor: Tensor, rows: slice) -> np.ndarray:
    """Rows of (1, C, H, W) as (rows, W, C) float64: exact products, whatever came."""
    return tensor.detach()[0, :, rows].permute(1, 2, 0).to("cpu", torch.float64).numpy()
