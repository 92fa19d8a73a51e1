"""What depends on a photo alone and is computed once: maps of a face's parts, and heat maps.

Both are kept beside the faces of a pack, where ID-Guard's trainer finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from shields.errors import ConfigError
from shields.masks import CLASSES, PARTS, components
from shields.models import load
from shields.models.heatmaps import heat_map
from shields.weights import WeightStore
from trainers.data import whole_entries
from trainers.draft import Draft

__all__ = ["HEAT_METHODS", "Wanted", "add_layers", "drawn_parts"]

HEAT_METHODS = ("grad-cam++", "grad-cam")
_BATCH = 8
#: painted one over the other; their union is what `components` draws of them at once
_DRAWN = ("brows", "eyes", "nose", "lips", "mouth")
#: maps of faces (B, 3, S, S), [0, 1], with landmarks (B, 5, 2): (B, S, S) uint8
_Maps = Callable[[Tensor, Tensor], Tensor]


class Wanted:
    """Which maps a pack shall hold.

    Args:
        masks: "landmarks", "parser:NAME", "source" (the source's own), or "" for none.
        heat: "METHOD:RECOGNIZER", such as "grad-cam++:face-embedder", or "" for none.
        device: Where networks run.

    Raises:
        ConfigError: They are written otherwise.
    """

    def __init__(self, masks: str = "", heat: str = "", device: str = "cpu") -> None:
        kind, _, name = masks.partition(":")
        if kind not in {"", "landmarks", "parser", "source"} or bool(name) != (kind == "parser"):
            raise ConfigError(
                f"masks are `landmarks`, `source` or `parser:NAME`, such as "
                f"`parser:bisenet-celebamask`; got {masks!r}"
            )
        method, _, recognizer = heat.partition(":")
        if heat and (method not in HEAT_METHODS or not recognizer):
            raise ConfigError(
                f"a heat map is METHOD:RECOGNIZER, METHOD one of {', '.join(HEAT_METHODS)}, such "
                f"as `grad-cam++:face-embedder`; got {heat!r}"
            )
        self.masks, self.heat, self.device = masks, heat, torch.device(device)

    @property
    def from_source(self) -> bool:
        """Whether the source's own masks are wanted."""
        return self.masks == "source"

    @cached_property
    def maps(self) -> dict[str, _Maps]:
        """Name of the tensor in the pack -> how it is computed. Networks are loaded once, here."""
        wanted: dict[str, _Maps] = {}
        kind, _, parser = self.masks.partition(":")
        if kind == "landmarks":
            wanted["parts"] = lambda face, points: drawn_parts(points, face.shape[-1])
        elif kind == "parser":
            wanted["parts"] = _parsed(parser, self.device)
        if self.heat:
            method, _, recognizer = self.heat.partition(":")
            name, maps = _heated(method, recognizer, self.device)
            wanted[name] = maps
        return wanted


def drawn_parts(landmarks: Tensor, size: int) -> Tensor:
    """Draw a map of the parts that five landmarks tell of.

    Args:
        landmarks: (B, 5, 2), pixels.
        size: Side, pixels.

    Returns:
        (B, size, size) uint8, indices into `CLASSES`; of a pair, the left one stands for both.
    """
    skin = components(landmarks, (size, size), ["face"])[:, 0]
    drawn = (skin * CLASSES.index("skin")).to(torch.uint8)
    for name in _DRAWN:
        part = components(landmarks, (size, size), [name])[:, 0] > 0
        drawn[part] = CLASSES.index(PARTS[name][0])
    return drawn


def _parsed(name: str, device: torch.device) -> _Maps:
    parser = load("parser", name, store=WeightStore(), device=device)
    return lambda face, _: parser.labels(face.to(device)).to(torch.uint8).cpu()


def _heated(method: Any, name: str, device: torch.device) -> tuple[str, _Maps]:  # noqa: ANN401  a literal
    recognizer = load("recognizer", name, store=WeightStore(), device=device)

    def maps(face: Tensor, landmarks: Tensor) -> Tensor:
        warm = heat_map(recognizer, face.to(device), landmarks.to(device), method=method)
        return (warm[:, 0] * 255).round().to(torch.uint8).cpu()

    return f"heat:{method}:{recognizer.name}", maps


def add_layers(
    draft: Draft, tensors: Mapping[str, Tensor], people: int, wanted: Wanted
) -> dict[str, Tensor]:
    """Compute the maps that are wanted, with a bar.

    Args:
        draft: Keeps them, so that an interrupted call goes on.
        tensors: `faces`, `landmarks` and `identity`, as in a pack.
        people: How many there are.
        wanted: Which maps.

    Returns:
        Name in the pack -> (N, S, S) uint8. A face whose landmarks are damaged gets maps of zeros;
        who reads the pack leaves it out.
    """
    faces, landmarks = tensors["faces"], tensors["landmarks"]
    whole = whole_entries(landmarks, tensors["identity"], people)
    made: dict[str, Tensor] = {}
    for name, maps in wanted.maps.items():
        worker = _Worker(name, maps, faces, landmarks, whole)
        kind = f"{name}-{wanted.masks}" if name == "parts" else name
        made[name] = draft.layer(kind, faces.shape[1], len(faces), worker)
    return made


class _Worker:
    """Computes maps batch by batch."""

    def __init__(
        self, name: str, maps: _Maps, faces: Tensor, landmarks: Tensor, whole: Tensor
    ) -> None:
        self._name, self._maps = name, maps
        self._faces, self._landmarks, self._whole = faces, landmarks, whole

    def __call__(self, start: int, stop: int) -> Iterator[np.ndarray]:
        starts: Iterable[int] = range(start, stop, _BATCH)
        bar = track(starts, description=f"adding {self._name}", console=Console(stderr=True))
        for first in bar:
            rows = slice(first, min(first + _BATCH, stop))
            good = self._whole[rows]
            face = self._faces[rows].permute(0, 3, 1, 2).float() / 255
            made = torch.zeros(len(face), *face.shape[2:], dtype=torch.uint8)
            if bool(good.any()):
                made[good] = self._maps(face[good], self._landmarks[rows][good])
            yield made.numpy()
