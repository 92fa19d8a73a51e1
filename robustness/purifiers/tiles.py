"""Overlapping tiles: a photo of any size for a network that knows one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from shields.types import Image

__all__ = ["Piece", "Tiles"]


class Piece(NamedTuple):
    """A square that lies in a tile and in the photo."""

    tile: int
    in_tile: tuple[slice, slice]
    in_photo: tuple[slice, slice]


class Tiles:
    """Overlapping squares that cover a photo, and the way back.

    Args:
        height: Of the photo, pixels; `size` or more.
        width: Likewise.
        size: Side of a tile, pixels.
        stride: Distance of neighbouring tiles, pixels; the last is flush with the border.
        corner_tile: One further tile of the four corners, where there is more than one tile.
    """

    def __init__(
        self, height: int, width: int, *, size: int, stride: int, corner_tile: bool
    ) -> None:
        self.size, self.shape = size, (height, width)
        self.pieces = [
            Piece(index, _square(0, 0, size), _square(top, left, size))
            for index, (top, left) in enumerate(
                (top, left)
                for top in _starts(height, size, stride)
                for left in _starts(width, size, stride)
            )
        ]
        self.count = len(self.pieces)
        if corner_tile and self.count > 1:
            half = size // 2
            self.pieces += [
                Piece(self.count, _square(y, x, half), _square(top, left, half))
                for y, top in ((0, 0), (half, height - half))
                for x, left in ((0, 0), (half, width - half))
            ]
            self.count += 1

    def cut(self, image: Image) -> Tensor:
        """Cut (B, 3, H, W) into (B * count, 3, size, size), one photo's tiles after another's."""
        tiles = image.new_zeros(len(image), self.count, 3, self.size, self.size)
        for index, in_tile, in_photo in self.pieces:
            tiles[:, index, :, *in_tile] = image[:, :, *in_photo]
        return tiles.flatten(0, 1)

    def merge(self, tiles: Tensor) -> Image:
        """Average what (B * count, 3, size, size) say of each pixel: (B, 3, H, W)."""
        tiles = tiles.reshape(-1, self.count, *tiles.shape[1:])
        total = tiles.new_zeros(len(tiles), 3, *self.shape)
        covered = tiles.new_zeros(self.shape)
        for index, in_tile, in_photo in self.pieces:
            total[:, :, *in_photo] += tiles[:, index, :, *in_tile]
            covered[in_photo] += 1
        return total / covered


def _square(top: int, left: int, side: int) -> tuple[slice, slice]:
    return slice(top, top + side), slice(left, left + side)


def _starts(length: int, size: int, stride: int) -> list[int]:
    last = length - size
    return [*range(0, last, stride), last]
