"""TIP-RSR: shrink and compress the face and restore it, enlarge and shrink the rest, and fuse.

With x the protected photo, J a JPEG, f and g the networks for faces and for anything:

    face       = (1 - blend) * f(Down(J(x))) + blend * y
    general    = Down(g(x))
    purified   = mask * face + (1 - mask) * general

Source:
    Transformation-Induced Purification via Region-wise Super-Resolution ("TIP-RSR"), Eqs. 6 to 8,
    Table 7 (the variants), and the code that its authors published.

Differs:
    What y is has three readings. As printed, the protected photo is added on top, by which every
    face brightens by a fifth, so nobody can mean it: `reading="printed"`. In the paper's words it
    is a weighted mean with the protected photo, which brings a fifth of the perturbation back:
    "protected". In the code y is the shrunk photo enlarged again by Lanczos: "transformed".
    `preset="ours"` works at the photo's own size with the code's y, a soft edge, and no JPEG but
    J. `preset="paper"` takes the paper's y. `preset="code"` also does what only the code does: a
    square of 512 whatever the photo's shape, further JPEGs after the shrinking (95), the face
    network (95), the blend (75) and the fusion (75), values cut off rather than rounded, results of
    1024, the mask's hard edge. They are then brought to the photo's size, by Lanczos.
    `scale` is not used by it.
    Faces are found in what the face network made. The parser sees each of them with its
    surroundings rather than the whole photo, and a photo without any is `general` everywhere.
    Without a parser the mask is a hull about the five landmarks.
    The two networks of a class default are one, and no restorer of aligned faces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from robustness.attacks import scaled
from robustness.purifiers import Purifier, PurifierConfig
from robustness.purifiers.super_resolution import (
    FaceFinder,
    compressed,
    enlarged,
    find_faces,
    load_restorer,
    whole_levels,
)
from shields.codec import carry, resize
from shields.errors import WeightsError
from shields.masks import components, feather, from_labels
from shields.models import load as load_network
from shields.models.restoration import Restorer
from shields.models.super_resolution import FaceRestorer
from shields.transforms import Jpeg
from shields.types import Face, Image, Mask
from shields.weights import WeightStore

if TYPE_CHECKING:
    from shields.models.parsing import Parser

__all__ = ["Parts", "TipRsr", "TipRsrConfig", "face_mask"]

#: what the preset fills in where it is not given
_AS_PRESET: Any = None
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ours": {"reading": "transformed", "feather": 0.01},
    "paper": {"reading": "protected", "feather": 0.01},
    "code": {"reading": "transformed", "feather": 0.0},
}
#: the code's sizes before and after the face network, and its qualities: after the shrinking and
#: the face network, and of what it hands on
_SQUARE, _RESULT, _BETWEEN, _SAVED = (512, 512), (1024, 1024), 95, 75
#: parsers that are looked for, the method's own first
_PARSERS = ("bisenet-celebamask", "segformer-face-parsing")
#: side of what the parser sees of a face, in longer sides of its box
_SURROUNDINGS = 2.0


@dataclass(frozen=True, kw_only=True)
class TipRsrConfig(PurifierConfig):
    """Settings of TIP-RSR; the class default runs on what ships with the package."""

    #: what fills in `reading` and `feather`, and whether the code's further steps are taken
    preset: Literal["ours", "paper", "code"] = "ours"
    #: g, a card of role "purifier" or a weights file that spandrel reads
    general: str = "portrait-restorer"
    #: f, likewise; may be a restorer of aligned faces
    face: str = "portrait-restorer"
    #: what enlarges the photo around faces that such a restorer makes; empty for Lanczos
    background: str = ""
    #: a card of a face parser; "none" for the landmarks' hull, "auto" for the first that is there
    parser: str = "auto"
    #: of J, libjpeg's scale
    quality: int = 75
    #: sides after Down as a share of the photo's
    scale: float = 0.5
    #: the share of y, lambda in the paper
    blend: float = 0.2
    #: y: see the module
    reading: Literal["transformed", "protected", "printed"] = _AS_PRESET
    #: half the width of the mask's soft edge, in shorter sides of the photo
    feather: float = _AS_PRESET
    #: "full", or Table 7's: general alone, face alone, both fused; the last two without a blend
    variant: Literal["full", "general", "face", "fused"] = "full"
    #: photos with a longer side run in tiles, pixels
    tile: int = 512
    #: photos, tiles or faces that run at once
    batch: int = 4

    limits: ClassVar = {
        "quality": (1, 100), "scale": (0.05, 1), "blend": (0, 1), "feather": (0, 0.5),
        "tile": (128, 65536), "batch": (1, 4096),
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name, value in _PRESETS.get(self.preset, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    @classmethod
    def paper(cls) -> Self:
        """The paper's words with the networks it names."""
        return cls(
            preset="paper", general="realesrgan-x4plus", face="gfpgan-v1.3",
            parser="bisenet-celebamask",
        )  # fmt: skip

    @classmethod
    def code(cls) -> Self:
        """What the authors' code does, with its networks."""
        return cls(
            preset="code", general="realesrgan-x4plus", face="gfpgan-v1.3",
            background="realesrgan-x2plus", parser="bisenet-celebamask",
        )  # fmt: skip


class Parts(NamedTuple):
    """What is fused, all of one size."""

    #: (B, 3, h, w): restored from the small photo, y blended in
    face: Image
    #: (B, 3, h, w): enlarged and shrunk again
    general: Image
    #: (B, 1, h, w): 1 where `face` is taken; 0 everywhere where no face was found
    mask: Mask


class TipRsr(Purifier):
    """Restore faces from a small copy, all else from the photo itself."""

    Config = TipRsrConfig
    config: TipRsrConfig

    def __init__(
        self,
        config: TipRsrConfig | None = None,
        *,
        general: Restorer,
        face: Restorer,
        background: Restorer | None = None,
        finder: FaceFinder,
        parser: Parser | None = None,
    ) -> None:
        super().__init__(config)
        self.general, self.face, self.background = general, face, background
        self.finder, self.parser = finder, parser

    @classmethod
    def load(cls, config: TipRsrConfig, *, store: WeightStore, device: torch.device) -> Self:
        """Load the networks that the config names; the config kept says which parser was found."""
        names = {config.general, config.face, config.background} - {""}
        loaded = {name: load_restorer(name, store=store, device=device) for name in sorted(names)}
        found = config.parser if config.parser != "auto" else _first_parser(store)
        finder: Any = load_network("detector", "mtcnn", store=store, device=device)
        parser = None
        if found != "none":
            parser = load_network("parser", found, store=store, device=device)
        return cls(
            dataclasses.replace(config, parser=found),
            general=loaded[config.general],
            face=loaded[config.face],
            background=loaded.get(config.background),
            finder=finder,
            parser=parser,
        )

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        if self.config.variant == "general":
            fused = self._general(image)
        elif self.config.variant == "face":
            fused, _ = self._face(image)
        else:
            fused = _fused(self.parts(image))
        if self._coded:
            fused = _saved(fused)
        return resize(fused, (image.shape[2], image.shape[3]))

    def parts(self, image: Image) -> Parts:
        """The two branches and the mask between them, of (B, 3, H, W), [0, 1]."""
        face, found = self._face(image)
        radius = self.config.feather * min(face.shape[2:])
        mask = face_mask(face, found, self.parser, radius=radius)
        return Parts(face, self._general(image), mask)

    @property
    def _coded(self) -> bool:
        return self.config.preset == "code"

    def _size(self, image: Image) -> tuple[int, int]:
        """Height and width of the branches."""
        return _RESULT if self._coded else (image.shape[2], image.shape[3])

    def _general(self, image: Image) -> Image:
        made = self._enlarged(self.general, image, self._size(image))
        return whole_levels(made) if self._coded else made

    def _enlarged(self, network: Restorer, image: Image, size: tuple[int, int]) -> Image:
        return enlarged(network, image, size, tile=self.config.tile, batch=self.config.batch)

    def _face(self, image: Image) -> tuple[Image, list[list[Face]]]:
        """Restore from a small copy and blend; also the faces in it, in its pixels."""
        config, size = self.config, self._size(image)
        small_size = scaled(image.shape[2], config.scale), scaled(image.shape[3], config.scale)
        small = compressed(image, config.quality, _SQUARE if self._coded else small_size)
        if self._coded:
            small = Jpeg().apply(small, quality=_BETWEEN)
        made, found = self._restored(small, size)
        if self._coded:
            made = Jpeg().apply(made, quality=_BETWEEN)
        if config.variant == "full":
            made = self._blended(made, small, image)
        return made, found

    def _restored(self, small: Image, size: tuple[int, int]) -> tuple[Image, list[list[Face]]]:
        if not isinstance(self.face, FaceRestorer):
            made = self._enlarged(self.face, small, size)
            return made, find_faces(self.finder, made)
        if self.background is None:
            base = resize(small, size).clamp(0, 1)
        else:
            base = self._enlarged(self.background, small, size)
        found = find_faces(self.finder, base)
        return self.face.paste(base, found, self.config.batch), found

    def _blended(self, made: Image, small: Image, image: Image) -> Image:
        config, size = self.config, (made.shape[2], made.shape[3])
        other = resize(small if config.reading == "transformed" else image, size).clamp(0, 1)
        if self._coded:
            other = whole_levels(other)
        kept = 1.0 if config.reading == "printed" else 1 - config.blend
        blended = (kept * made + config.blend * other).clamp(0, 1)
        return _saved(blended) if self._coded else blended


def _fused(parts: Parts) -> Image:
    return parts.mask * parts.face + (1 - parts.mask) * parts.general


def _saved(image: Image) -> Image:
    """As the code saves in between: values cut off to whole levels, then JPEG."""
    # A thousandth of a level, so that what is whole already stays what it is.
    cut = (image.detach() * 255 + 1e-3).floor() / 255
    return Jpeg().apply(carry(cut, image), quality=_SAVED)


def _first_parser(store: WeightStore) -> str:
    """Name of the first face parser whose weights are on this machine, or "none"."""
    here = WeightStore(store.folder)
    for name in _PARSERS:
        try:
            here.find(here.card(name))
        except WeightsError:
            continue
        return name
    return "none"


@torch.no_grad()
def face_mask(
    image: Image, faces: list[list[Face]], parser: Parser | None, *, radius: float
) -> Mask:
    """Tell faces from everything else.

    Args:
        image: (B, 3, H, W), [0, 1].
        faces: Of each image, in its pixels.
        parser: Says what belongs to a face (skin to neck, no hair), or None for a hull about the
            landmarks.
        radius: Half the width of the soft edge, pixels.

    Returns:
        (B, 1, H, W), [0, 1]; 0 everywhere where there is no face.
    """
    size = (image.shape[2], image.shape[3])
    mask = image.new_zeros(len(image), 1, *size)
    places = [
        (index, face, _around(face, size)) for index, found in enumerate(faces) for face in found
    ]
    if parser is not None and places:
        parts = _parsed([image[index, :, *place] for index, _, place in places], parser)
    else:
        parts = [_hull(face, place, image) for _, face, place in places]
    for (index, _, place), part in zip(places, parts, strict=True):
        there = mask[index, 0, *place]
        torch.maximum(there, part, out=there)
    return feather(mask, radius)


def _around(face: Face, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a face and its surroundings, inside the photo."""
    left, top, right, bottom = face.box
    reach = _SURROUNDINGS * max(right - left, bottom - top) / 2
    spans = []
    for low, high, side in ((top, bottom, size[0]), (left, right, size[1])):
        middle = min(max((low + high) / 2, 0), side - 1)
        start, stop = math.floor(middle - reach), math.ceil(middle + reach) + 1
        spans.append(slice(max(start, 0), min(stop, side)))
    return spans[0], spans[1]


def _hull(face: Face, place: tuple[slice, slice], image: Image) -> Tensor:
    rows, columns = place
    points = torch.as_tensor(face.landmarks).to(image) - image.new_tensor(
        [columns.start, rows.start]
    )
    size = (rows.stop - rows.start, columns.stop - columns.start)
    return components(points[None], size, ["face"])[0, 0]


def _parsed(crops: list[Tensor], parser: Parser) -> list[Tensor]:
    """Parse (3, h, w) of any sizes at once: (h, w) each."""
    sides = (parser.size, parser.size)
    squares = [
        functional.interpolate(crop[None], sides, mode="bilinear", antialias=True) for crop in crops
    ]
    masks = from_labels(parser.labels(torch.cat(squares)), ["tip-rsr-face"])
    return [
        functional.interpolate(mask[None], crop.shape[1:], mode="bilinear", antialias=True)[0, 0]
        for mask, crop in zip(masks, crops, strict=True)
    ]
