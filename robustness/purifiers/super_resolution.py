"""Networks that enlarge or restore photos as purifiers, in tiles where photos are large.

Photos larger than a tile run in tiles; what a tile knows too little of is taken from its neighbour.
Each tile is brought to its place's size at once: a fourfold photo is never stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from robustness.attacks import scaled
from robustness.purifiers import Purifier, PurifierConfig
from robustness.purifiers.tiles import Tiles
from shields.codec import carry, resize
from shields.errors import ConfigError, UnknownName, WeightsError
from shields.models import load as load_network
from shields.models.restoration import Restorer
from shields.models.super_resolution import FaceRestorer, SpandrelRestorer, restored
from shields.registry import did_you_mean
from shields.transforms import Jpeg
from shields.types import Face, Image
from shields.weights import Card, WeightStore

if TYPE_CHECKING:
    pass

__all__ = ["FaceFinder", "SuperResolution",
           "SuperResolutionConfig", "compressed", "enlarged", "find_faces", "load_restorer",
           "whole_levels"]  # fmt: skip

#: what a tile shares with its neighbour on each side and does not give itself, pixels
_MARGIN = 24


class FaceFinder(Protocol):
    """What this package asks of a detector."""

    def detect_batch(self, images: Image) -> list[list[Face]]:
        """Find the faces in each of (B, 3, H, W), [0, 1]."""


def load_restorer(name: str, *, store: WeightStore, device: torch.device) -> Restorer:
    """Load a network that restores or enlarges.

    Args:
        name: A card of role "purifier", or a weights file without a card, which spandrel has to
            recognise.
        store: Where weights are looked for.
        device: Where the network is put.

    Raises:
        UnknownName: Neither a card nor a file.
        ConfigError: The card describes something else.
        WeightsError: The weights are absent, damaged, or of no known network.
    """
    path = Path(name).expanduser()
    known = name in store.names()
    if not known and not path.is_file():
        if path.suffix:
            raise WeightsError(f"there is no weights file {path}; give its path or a card's name")
        # A damaged card that nobody asked for must not spoil the hint: all names are offered.
        raise UnknownName(f"no restorer is called {name!r}; {did_you_mean(name, store.names())}")
    beside = path.with_suffix(".toml")
    card = Card(name=path.stem, role="purifier", architecture="spandrel", file=path.name)
    if known or beside.is_file():
        card = store.card(name) if known else Card.read(beside)
    if card.role == "purifier" and card.architecture == "spandrel":
        network: Any = SpandrelRestorer.load(store.find(card) if known else path, card).to(device)
        network.name = card.name
        return network
    network = load_network(card.role, name, store=store, device=device)
    if not isinstance(network, Restorer):
        raise ConfigError(f"{name!r} has role {card.role!r}; needed is one that restores photos")
    return network


def enlarged(
    network: Restorer, image: Image, size: tuple[int, int], *, tile: int = 512, batch: int = 4
) -> Image:
    """Run a network over whole photos, and resample what it makes to a size.

    Args:
        network: Not one of aligned faces.
        image: (B, 3, H, W), [0, 1].
        size: Height and width wanted, pixels.
        tile: Photos with a longer side than this run in tiles of about this side, pixels.
        batch: Photos or tiles that run at once.

    Returns:
        (B, 3, *size), [0, 1]; a gradient flows, at the price of a second run in the backward pass.
    """
    if isinstance(network, FaceRestorer):
        raise ConfigError(f"{network.name!r} restores aligned faces, not whole photos")
    height, width = image.shape[2:]
    # A whole factor, so that tiles meet on whole pixels; the rest is resampled at the end.
    factor = min(network.scale, max(1, round(size[0] / height)))
    side = _tile_side(height, width, tile)
    if not side:
        wanted = (height * factor, width * factor)
        parts = [restored(network, part, wanted) for part in torch.split(image, batch)]
        return resize(torch.cat(parts), size).clamp(0, 1)
    tiles = Tiles(height, width, size=side, stride=side - 2 * _MARGIN, corner_tile=False)
    parts = [
        restored(network, part, (side * factor,) * 2)
        for part in torch.split(tiles.cut(image), batch)
    ]
    return resize(_joined(tiles, torch.cat(parts), factor), size).clamp(0, 1)


def _tile_side(height: int, width: int, tile: int) -> int:
    """Side of tiles that cover the longer side evenly; 0 where the photo runs as a whole."""
    longer, shorter = max(height, width), min(height, width)
    if longer <= tile:
        return 0
    count = math.ceil((longer - 2 * _MARGIN) / (tile - 2 * _MARGIN))
    side = min(math.ceil((longer - 2 * _MARGIN) / count) + 2 * _MARGIN, shorter)
    return side if side > 4 * _MARGIN else 0


def _joined(tiles: Tiles, parts: Tensor, factor: int) -> Image:
    """Put (B * count, 3, S, S) together, each without its margins inside the photo."""
    parts = parts.reshape(-1, tiles.count, *parts.shape[1:])
    height, width = tiles.shape
    result = parts.new_zeros(len(parts), 3, height * factor, width * factor)
    for index, _, (rows, columns) in tiles.pieces:
        (top, bottom), (left, right) = _kept(rows, height), _kept(columns, width)
        down = slice((top - rows.start) * factor, (bottom - rows.start) * factor)
        across = slice((left - columns.start) * factor, (right - columns.start) * factor)
        there = result[..., top * factor : bottom * factor, left * factor : right * factor]
        there.copy_(parts[:, index, :, down, across])
    return result


def _kept(span: slice, end: int) -> tuple[int, int]:
    """Where a tile begins and ends without its margins inside a photo that ends at `end`."""
    return span.start + _MARGIN * (span.start > 0), span.stop - _MARGIN * (span.stop < end)


def whole_levels(image: Image) -> Image:
    """Round to levels as a file does; the gradient passes by."""
    image = image.clamp(0, 1)
    return carry((image.detach() * 255).round() / 255, image)


def compressed(image: Image, quality: int, size: tuple[int, int]) -> Image:
    """JPEG by the codec itself, then Lanczos to a size: Down(J(x)), in whole levels.

    Args:
        image: (B, 3, H, W), [0, 1].
        quality: libjpeg's scale; 0 leaves JPEG out.
        size: Height and width wanted, pixels.

    Returns:
        (B, 3, *size); to a gradient the codec is the identity.
    """
    coded = Jpeg().apply(image, quality=quality) if quality else image
    return whole_levels(resize(coded, size))


@torch.no_grad()
def find_faces(finder: FaceFinder, image: Image) -> list[list[Face]]:
    """Faces of each of (B, 3, H, W), [0, 1]; whatever the image is, it gets no gradient."""
    return finder.detect_batch(image.detach().clamp(0, 1))


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig(PurifierConfig):
    """Which network, and what is done to the photo before."""

    #: a card of role "purifier", or a weights file that spandrel reads
    network: str = "portrait-restorer"
    #: of a JPEG before it, libjpeg's scale; 0 for none
    quality: int = 0
    #: sides that the network sees as a share of the photo's
    scale: float = 1.0
    #: photos with a longer side run in tiles, pixels
    tile: int = 512
    #: photos, tiles or faces that run at once
    batch: int = 4

    limits: ClassVar = {
        "quality": (0, 100), "scale": (0.05, 1), "tile": (128, 65536), "batch": (1, 4096),
    }  # fmt: skip


class SuperResolution(Purifier):
    """One network on the whole photo, and Lanczos to the photo's size; or a restorer on its faces.

    With the class default this is TIP-RSR's Eq. 7 for the whole photo, its ablation "ESRGAN".
    """

    Config = SuperResolutionConfig
    config: SuperResolutionConfig

    def __init__(
        self,
        config: SuperResolutionConfig | None = None,
        *,
        network: Restorer,
        finder: FaceFinder | None = None,
    ) -> None:
        super().__init__(config)
        self.network, self.finder = network, finder
        if isinstance(network, FaceRestorer) and finder is None:
            raise ConfigError(f"{network.name!r} restores aligned faces and needs a detector")

    @classmethod
    def load(
        cls, config: SuperResolutionConfig, *, store: WeightStore, device: torch.device
    ) -> Self:
        """Load the network that the config names, and a detector where it works on faces."""
        network = load_restorer(config.network, store=store, device=device)
        finder: Any = None
        if isinstance(network, FaceRestorer):
            finder = load_network("detector", "mtcnn", store=store, device=device)
        return cls(config, network=network, finder=finder)

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        config, size = self.config, (image.shape[2], image.shape[3])
        small = (scaled(size[0], config.scale), scaled(size[1], config.scale))
        given = compressed(image, config.quality, small)
        if not isinstance(self.network, FaceRestorer):
            return enlarged(self.network, given, size, tile=config.tile, batch=config.batch)
        assert self.finder is not None, "checked on construction"
        base = resize(given, size).clamp(0, 1)
        return self.network.paste(base, find_faces(self.finder, base), config.batch)
