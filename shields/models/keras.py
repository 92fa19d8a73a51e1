"""Read RelGAN's published Keras weights: the only ones there are.

Source:
    https://github.com/willylulu/RelGAN-Keras, `generator519.h5` and `generator577.h5`; the
    licence of both is CC BY-NC 4.0, and so is what they are converted to.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shields.errors import MissingPackage, WeightsError
from shields.models.relgan import PRESETS, sizes
from shields.models.relgan_network import RelganGenerator
from shields.weights import load_strictly

__all__ = ["convert_relgan"]

#: Keras trains on target minus source: +1 adds an attribute
_SIGN = 1
_STAGES = ("conv_in", "down1", "down2", "up2", "up1", "conv_out")
#: norm of a residual block: number of the block from 1, place in the block
_BLOCK = re.compile(r"block(\d+)_([01])")
_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "mean_weights": "mean_weight",
    "variance_weights": "var_weight",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

#: what a layer holds, by Keras's name of the variable
_Layer = dict[str, Tensor]


def convert_relgan(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...], int]:
    """Turn a Keras generator of RelGAN into a state dict of `RelganGenerator`.

    Nothing but arrays is read from the file. Its second output, an encoder's feature map, has no
    weights of its own.

    Args:
        path: An `.h5` file, of the weights alone or of the whole model.

    Returns:
        The state dict, float32; the attributes, in the order of the relative vector; and the sign
        that adds an attribute, for the card.

    Raises:
        MissingPackage: h5py is not installed.
        WeightsError: The file cannot be read, or holds another network.

    Differs:
        Keras takes the biased variance per image, PyTorch's RelGAN the unbiased one: relative
        1 / (pixels - 1), at most 1 in 4095 at the published 256 x 256.
    """
    layers = _layers(path)
    state: dict[str, Tensor] = {}
    for stage in _STAGES:
        state |= _convolution(f"{stage}.0", _named(layers, stage, "kernel", path))
        if stage != "conv_out":
            state |= _norm(f"{stage}.1", _named(layers, stage, "gamma", path))
    for place, layer in _residual_convolutions(layers):
        state |= _convolution(place, layer)
    for place, layer in _residual_norms(layers):
        state |= _norm(place, layer)
    found = sizes(state, path.name)
    attributes = PRESETS.get(found["attributes"])
    if attributes is None:
        raise WeightsError(
            f"{path} takes {found['attributes']} attributes; the authors' models take "
            f"{', '.join(map(str, sorted(PRESETS)))}, and the names of others are not in the file"
        )
    with torch.random.fork_rng(devices=[]):
        load_strictly(RelganGenerator(**found), state, path.name)
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{path}: {key!r} holds values that are not finite")
    return state, attributes, _SIGN


def _layers(path: Path) -> dict[str, _Layer]:
    """Layer name -> its variables, of all layers that have any."""
    try:
        h5py: Any = importlib.import_module("h5py")
    except ImportError as error:
        raise MissingPackage(
            "Keras weights (.h5) need the package h5py: pip install 'shields[keras]'"
        ) from error
    try:
        with h5py.File(path, "r") as archive:
            # A whole model keeps its weights in a folder, beside the optimizer's.
            root = archive.get("model_weights", archive)
            layers = {name: dict(_variables(root[name])) for name in root}
    # h5py and numpy raise many types on a damaged file; none may get through.
    except Exception as error:
        raise WeightsError(f"{path} cannot be read as Keras weights: {error}") from error
    return {name: layer for name, layer in layers.items() if layer}


def _variables(group: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401  h5py has no types
    """Name and value of all arrays below, however deep Keras put them."""
    for name, item in group.items():
        if hasattr(item, "items"):
            yield from _variables(item)
        else:
            yield name.partition(":")[0], torch.from_numpy(item[()]).float()


def _named(layers: dict[str, _Layer], stage: str, variable: str, path: Path) -> _Layer:
    for name, layer in layers.items():
        if name.startswith(f"{stage}_") and variable in layer:
            return layer
    raise WeightsError(
        f"{path} is no generator of RelGAN: no layer {stage} with {variable}; "
        f"it holds {', '.join(sorted(layers)) or 'none'}"
    )


def _residual_convolutions(layers: dict[str, _Layer]) -> Iterator[tuple[str, _Layer]]:
    """Those that Keras named itself, `conv2d_N`: N grows in the order of creation."""
    automatic = [
        name
        for name, layer in layers.items()
        if "kernel" in layer and not name.startswith(tuple(f"{stage}_" for stage in _STAGES))
    ]
    for index, name in enumerate(sorted(automatic, key=_number)):
        yield f"resb.{index // 2}.f.{3 * (index % 2)}", layers[name]


def _number(name: str) -> int:
    tail = name.rpartition("_")[2]
    return int(tail) if tail.isdecimal() else 0


def _residual_norms(layers: dict[str, _Layer]) -> Iterator[tuple[str, _Layer]]:
    for name, layer in layers.items():
        match = _BLOCK.fullmatch(name)
        if match:
            yield f"resb.{int(match[1]) - 1}.f.{3 * int(match[2]) + 1}", layer


def _convolution(place: str, layer: _Layer) -> dict[str, Tensor]:
    """(h, w, in, out) -> (out, in, h, w); transposed: (h, w, out, in) -> (in, out, h, w)."""
    kernel = layer["kernel"]
    if kernel.ndim != 4 or "bias" not in layer:
        raise WeightsError(f"the layer for {place} is no convolution with a bias")
    return {
        f"{place}.weight": kernel.permute(3, 2, 0, 1).contiguous(),
        f"{place}.bias": layer["bias"],
    }


def _norm(place: str, layer: _Layer) -> dict[str, Tensor]:
    absent = [variable for variable in _NORM if variable not in layer]
    if absent:
        raise WeightsError(f"the layer for {place} lacks {', '.join(absent)}")
    shapes: dict[str, tuple[int, ...]] = {
        "gamma": (1, -1, 1, 1), "beta": (1, -1, 1, 1),
        "moving_mean": (1, -1, 1), "moving_variance": (1, -1, 1),
    }  # fmt: skip
    return {
        f"{place}.{ours}": layer[theirs].reshape(shapes.get(theirs, (-1,)))
        for theirs, ours in _NORM.items()
    }
