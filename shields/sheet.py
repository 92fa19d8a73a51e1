"""A picture for people: before, after, and the change made visible, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shields.errors import ImageError
from shields.photo import write
from shields.types import Photo

if TYPE_CHECKING:
    from shields.faces import Placement

__all__ = ["side_by_side", "write_sheet"]

_GAP, _CAPTION = 12, 34


def _view(shape: tuple[int, ...], placements: Sequence[Placement]) -> tuple[slice, slice]:
    """The rows and columns worth looking at: what holds every region, or the whole photo."""
    if not placements:
        return slice(0, shape[0]), slice(0, shape[1])
    top = min(box.top for box in placements)
    left = min(box.left for box in placements)
    bottom = max(box.top + box.height for box in placements)
    right = max(box.left + box.width for box in placements)
    return slice(top, bottom), slice(left, right)


def side_by_side(
    before: np.ndarray,
    after: np.ndarray,
    placements: Sequence[Placement] = (),
    *,
    side: int = 384,
    amplify: int | None = None,
) -> Image.Image:
    """Draw before, after and amplified change in one row with captions.

    Args:
        before: (H, W, 3) uint8.
        after: (H, W, 3) uint8.
        placements: Show only the rectangle around these.
        side: Longer side of each panel, pixels.
        amplify: Factor on the change, which is drawn around mid grey; where left out, the largest
            that overflows nowhere.

    Raises:
        ImageError: The two differ in size.
    """
    if before.shape != after.shape:
        raise ImageError(f"photos of one size are needed, got {before.shape} and {after.shape}")
    rows, columns = _view(before.shape, placements)
    before, after = before[rows, columns], after[rows, columns]
    change = after.astype(np.int16) - before
    factor = amplify or max(1, 127 // max(1, int(np.abs(change).max())))
    visible = np.clip(128 + change * factor, 0, 255).astype(np.uint8)
    scale = side / max(before.shape[:2])
    size = (max(1, round(before.shape[1] * scale)), max(1, round(before.shape[0] * scale)))
    panels = {"before": before, "after": after, f"change x{factor}": visible}
    sheet = Image.new(
        "RGB", (3 * size[0] + 4 * _GAP, size[1] + _GAP + _CAPTION), color=(255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    for index, (caption, pixels) in enumerate(panels.items()):
        left = _GAP + index * (size[0] + _GAP)
        sheet.paste(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), (left, _GAP))
        place = (left + size[0] / 2, size[1] + _GAP + _CAPTION / 2)
        draw.text(place, caption, fill=(40, 40, 40), font=font, anchor="mm")
    return sheet


def write_sheet(
    path: Path, before: np.ndarray, after: np.ndarray, placements: Sequence[Placement] = ()
) -> Path:
    """Write `side_by_side` as a PNG, through the same atomic writer as photos."""
    pixels = np.asarray(side_by_side(before, after, placements))
    return write(path, pixels, Photo(pixels=pixels))
