"""Where a photo may be perturbed: masks of a face and its parts, from landmarks or from a parser.

Parts have names, `brows`, `eyes`, `nose`, …, and so have a few collections of them, `PRESETS`.
Left and right are never told apart: the networks that label them were trained on mirrored photos
whose labels were not swapped.

Example:
    >>> points = torch.tensor([[[24.0, 28], [40, 28], [32, 36], [26, 45], [38, 45]]])
    >>> face, eyes = (components(points, (64, 64), [name]) for name in ("face", "eyes"))
    >>> bool((eyes <= face).all()), eyes[0, 0, 28, 24].item(), eyes[0, 0, 28, 32].item()
    (True, 1.0, 0.0)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError, ImageError, UnknownName
from shields.registry import did_you_mean
from shields.types import Mask

__all__ = ["CLASSES", "FACE", "ID_GUARD_BINARY", "PARTS", "PRESETS", "TIP_RSR_FACE", "components",
           "feather", "from_labels"]  # fmt: skip

#: what the numbers of a label map mean, whichever network made it
CLASSES = (
    "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r",
    "nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat",
)  # fmt: skip

#: part -> the classes that make it up
PARTS: Mapping[str, tuple[str, ...]] = {
    "background": ("background",),
    "skin": ("skin",),
    "brows": ("l_brow", "r_brow"),
    "eyes": ("l_eye", "r_eye"),
    "glasses": ("eye_g",),
    "ears": ("l_ear", "r_ear"),
    "earrings": ("ear_r",),
    "nose": ("nose",),
    "mouth": ("mouth",),
    "lips": ("u_lip", "l_lip"),
    "neck": ("neck",),
    "necklace": ("neck_l",),
    "cloth": ("cloth",),
    "hair": ("hair",),
    "hat": ("hat",),
}
#: ID-Guard's "binary mask": what makes an expression, without skin and glasses
ID_GUARD_BINARY = ("brows", "eyes", "nose", "mouth", "lips")
#: TIP-RSR's face: from skin to neck, indices 1 to 14
TIP_RSR_FACE = ("skin", "brows", "eyes", "glasses", "ears", "earrings", "nose", "mouth", "lips",
                "neck")  # fmt: skip
#: the face without neck, hair and jewellery
FACE = ("skin", "brows", "eyes", "glasses", "ears", "nose", "mouth", "lips")
#: collections that may be given in place of parts
PRESETS: Mapping[str, tuple[str, ...]] = {
    "face": FACE,
    "id-guard-binary": ID_GUARD_BINARY,
    "tip-rsr-face": TIP_RSR_FACE,
}

#: what five landmarks can tell; their "face" is a hull, not a collection
_DRAWN = ("face", "brows", "eyes", "nose", "mouth", "lips")
#: Shifts, and half axes across and down, where the pupils of a frontal face are one unit apart:
#: measures of adult faces with some margin, looked at on portraits.
_EYE = (0.30, 0.16)
_BROW_ABOVE, _BROW_OUT, _BROW = 0.29, 0.05, (0.38, 0.12)
_NOSE_WIDTH, _NOSE_BELOW = 0.30, 0.15
_LIPS_BEYOND, _LIPS_BELOW, _LIPS_HEIGHT = 0.08, 0.06, 0.26
_MOUTH_SHARE = (0.85, 0.45)
_HULL_DOWN, _HULL = 0.3, (1.12, 1.45)
#: eyes seem closer where a head is turned; from eyes to mouth a face is about this many units
_DROP = 1.15


def components(
    landmarks: Tensor,
    size: tuple[int, int],
    names: Iterable[str] = ("face",),
    *,
    feather: float = 0.0,
) -> Mask:
    """Draw parts of faces from five landmarks, as ellipses that turn and scale with the face.

    Available for every photo with a face, but only roughly right: nothing is known of the outline
    of this very face. No part reaches beyond the hull of the face.

    Args:
        landmarks: (B, 5, 2) x, y, pixels.
        size: Height and width of the mask.
        names: What to unite, of "face" (the hull, forehead to chin), "brows", "eyes", "nose",
            "mouth" (between the lips) and "lips" (with the mouth); or "id-guard-binary".
        feather: Half the width of the soft edge, pixels; 0 gives a mask of zeros and ones.

    Returns:
        (B, 1, *size), float32, on the landmarks' device.

    Raises:
        ImageError: Landmarks of another shape, unknown ones, or eyes that coincide.
        UnknownName: Five landmarks tell nothing of such a part, or there is none.
    """
    wanted = _expanded(names, {"id-guard-binary": ID_GUARD_BINARY}, _DRAWN)
    points = _checked(landmarks)
    frame = _Frame(points, size)
    hull = _ellipse(frame, *_hull(frame))
    mask = torch.zeros_like(hull)
    for name in wanted:
        for centre, half in _PARTS_OF[name](frame):
            mask = mask | _ellipse(frame, centre, half)
    return _feathered((mask & hull)[:, None].float(), feather)


def from_labels(labels: Tensor, names: Iterable[str], *, feather: float = 0.0) -> Mask:
    """Unite parts of a label map.

    Args:
        labels: (B, H, W) int64, indices into `CLASSES`, as a face parser's `labels` returns them.
        names: Parts, of `PARTS`, or collections, of `PRESETS`.
        feather: Half the width of the soft edge, pixels; 0 gives a mask of zeros and ones.

    Returns:
        (B, 1, H, W), float32.

    Raises:
        ImageError: The labels have another shape or type, or are no indices into `CLASSES`.
        UnknownName: There is no such part.
    """
    wanted = _expanded(names, PRESETS, tuple(PARTS))
    if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.dtype != torch.int64:
        got = (tuple(labels.shape), labels.dtype) if isinstance(labels, Tensor) else type(labels)
        raise ImageError(f"`labels` must be (B, H, W) int64, got {got}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(CLASSES):
        raise ImageError(
            f"`labels` must be indices into the {len(CLASSES)} classes, got "
            f"[{int(labels.min())}, {int(labels.max())}]"
        )
    table = torch.zeros(len(CLASSES), device=labels.device)
    for name in wanted:
        table[[CLASSES.index(member) for member in PARTS[name]]] = 1
    return _feathered(table[labels][:, None], feather)


def feather(mask: Mask, radius: float) -> Mask:
    """Soften the edges of a mask by a raised cosine; an edge lies at 1/2 afterwards.

    Args:
        mask: (B, 1, H, W), [0, 1].
        radius: How far to either side an edge is felt, pixels; 0 changes nothing.

    Returns:
        (B, 1, H, W), [0, 1]. At the border of the photo the mask is continued, so it keeps its
        value there.

    Raises:
        ConfigError: A radius below 0, or none at all.
    """
    if not (math.isfinite(radius) and radius >= 0):
        raise ConfigError(f"`radius` of a soft edge must be 0 pixels or more, got {radius}")
    reach = math.ceil(radius)
    if reach == 0:
        return mask
    offsets = torch.arange(-reach, reach + 1, device=mask.device, dtype=mask.dtype)
    line = 1 + (offsets / radius).clamp(-1, 1).mul(math.pi).cos()
    line = (line / line.sum()).view(1, 1, -1)
    padded = functional.pad(mask, (reach,) * 4, mode="replicate")
    across = functional.conv2d(padded, line[:, :, None])
    return functional.conv2d(across, line[..., None]).clamp(0, 1)


def _feathered(mask: Mask, radius: float) -> Mask:
    # the functions above have an argument of that name
    return feather(mask, radius)


def _expanded(
    names: Iterable[str], presets: Mapping[str, tuple[str, ...]], known: Sequence[str]
) -> list[str]:
    """Replace collections by their parts, and refuse what is not known."""
    asked = [names] if isinstance(names, str) else list(names)
    wanted: list[str] = []
    for name in asked:
        if name not in presets and name not in known:
            why = "five landmarks tell nothing of" if name in (*PARTS, *PRESETS) else "there is no"
            hint = did_you_mean(name, [*known, *presets])
            raise UnknownName(f"{why} part {name!r}; {hint}")
        wanted += presets.get(name, (name,))
    return wanted


def _checked(landmarks: Tensor) -> Tensor:
    if not isinstance(landmarks, Tensor) or landmarks.ndim != 3 or landmarks.shape[1:] != (5, 2):
        got = tuple(landmarks.shape) if isinstance(landmarks, Tensor) else type(landmarks).__name__
        raise ImageError(f"`landmarks` must be (B, 5, 2), got {got}")
    points = landmarks.detach().float()
    if not bool(points.isfinite().all()):
        raise ImageError("`landmarks` must be finite; leave out the photos without a face")
    if bool((points[:, 0] == points[:, 1]).all(dim=1).any()):
        raise ImageError("the two eyes must not lie in one place: the roll of the face is unknown")
    return points


class _Frame:
    """The face's own coordinates: origin between the eyes, x along them, y towards the mouth."""

    def __init__(self, points: Tensor, size: tuple[int, int]) -> None:
        self._origin = points[:, :2].mean(dim=1, keepdim=True)
        along = points[:, 1] - points[:, 0]
        distance = along.norm(dim=1)[:, None, None]
        across = torch.stack([-along[:, 1], along[:, 0]], dim=1)
        drop = ((points[:, 3:] - self._origin).mean(dim=1) * across).sum(dim=1)[:, None, None]
        # Whichever eye comes first, y leads to the mouth.
        down = torch.where(drop < 0, -1.0, 1.0) * across[:, None]
        self._x, self._y = along[:, None] / distance, down / distance
        self._unit = torch.maximum(distance, drop.abs() / distance / _DROP)
        #: (B, 5, 2), the landmarks in units of the face
        self.points = self._turned(points)
        rows = torch.arange(size[0], device=points.device, dtype=torch.float32)
        columns = torch.arange(size[1], device=points.device, dtype=torch.float32)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        pixels = torch.stack([x, y], dim=-1).view(1, -1, 2)
        #: (B, H, W, 2), every pixel in units of the face
        self.pixels = self._turned(pixels).view(len(points), *size, 2)

    def _turned(self, places: Tensor) -> Tensor:
        """(B or 1, N, 2) pixels -> (B, N, 2) units of the face."""
        offset = places - self._origin
        turned = [(offset * axis).sum(dim=2) for axis in (self._x, self._y)]
        return torch.stack(turned, dim=2) / self._unit


#: centre (B, 2) and half axes (B or 1, 2), in units of the face
_Ellipse = tuple[Tensor, Tensor]


def _ellipse(frame: _Frame, centre: Tensor, half: Tensor) -> Tensor:
    """Pixels whose centres lie in an ellipse: (B, H, W), bool."""
    away = (frame.pixels - centre[:, None, None]) / half[:, None, None]
    return away.square().sum(dim=-1) <= 1


def _pair(frame: _Frame, axes: tuple[float, float]) -> Tensor:
    return frame.points.new_tensor([axes])


def _hull(frame: _Frame) -> _Ellipse:
    centre = frame.points[:, 3:].mean(dim=1) * _HULL_DOWN
    return centre, _pair(frame, _HULL)


def _face(frame: _Frame) -> list[_Ellipse]:
    return [_hull(frame)]


def _eyes(frame: _Frame) -> list[_Ellipse]:
    return [(frame.points[:, side], _pair(frame, _EYE)) for side in (0, 1)]


def _brows(frame: _Frame) -> list[_Ellipse]:
    shifts = (_pair(frame, (sign * _BROW_OUT, -_BROW_ABOVE)) for sign in (-1, 1))
    return [
        (frame.points[:, side] + shift, _pair(frame, _BROW)) for side, shift in enumerate(shifts)
    ]


def _nose(frame: _Frame) -> list[_Ellipse]:
    """From between the eyes to a little below the tip."""
    tip = frame.points[:, 2]
    below = _pair(frame, (0.0, _NOSE_BELOW))
    height = (tip.norm(dim=1) + _NOSE_BELOW) / 2
    half = torch.stack([torch.full_like(height, _NOSE_WIDTH), height], dim=1)
    return [((tip + below) / 2, half)]


def _lips(frame: _Frame) -> list[_Ellipse]:
    left, right = frame.points[:, 3], frame.points[:, 4]
    width = (right - left).norm(dim=1) / 2 + _LIPS_BEYOND
    half = torch.stack([width, torch.full_like(width, _LIPS_HEIGHT)], dim=1)
    # a smile lifts the corners
    return [((left + right) / 2 + _pair(frame, (0.0, _LIPS_BELOW)), half)]


def _mouth(frame: _Frame) -> list[_Ellipse]:
    return [(centre, half * _pair(frame, _MOUTH_SHARE)) for centre, half in _lips(frame)]


_PARTS_OF = {
    "face": _face,
    "brows": _brows,
    "eyes": _eyes,
    "nose": _nose,
    "mouth": _mouth,
    "lips": _lips,
}
