"""Take one network out of a training checkpoint that holds several, and optimizers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shields.errors import WeightsError
from shields.weights import read_state_dict

__all__ = ["read_part"]


def read_part(path: Path, parts: Sequence[str] = ("G",)) -> dict[str, Tensor]:
    """Read the first of the named state dicts that the file holds, or the file as a bare one.

    A file that is itself a state dict, safetensors included, reads as `read_state_dict` reads it.
    A `module.` before **every** key of the part is dropped; the rest of the file is not looked at.

    Args:
        path: The file.
        parts: Names under which the wanted network may be stored, the best first.

    Returns:
        Names and tensors, float32 on the CPU.

    Raises:
        WeightsError: The file is damaged, holds anything but tensors in that part, or a value is
            not finite.
    """
    content = _opened(path)
    for part in parts:
        found = content.get(part) if isinstance(content, Mapping) else None
        if isinstance(found, Mapping) and found:
            return _tensors(found, part, path)
    if isinstance(content, Mapping) and _holds_dicts(content):
        raise WeightsError(
            f"{path} holds no {' or '.join(map(repr, parts))} but "
            f"{', '.join(sorted(map(str, content)))}; save the network's own state dict"
        )
    return read_state_dict(path)


def _opened(path: Path) -> object:
    """What a pickle of tensors holds; nothing for safetensors, which have no parts."""
    if path.suffix == ".safetensors":
        return None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    # Many types for a damaged file; the reader of bare ones opens it again and says what is wrong.
    except Exception:
        return None
    return content


def _holds_dicts(content: Mapping[Any, Any]) -> bool:
    if isinstance(content.get("state_dict"), Mapping):
        return False
    return any(isinstance(value, Mapping) for value in content.values())


def _tensors(found: Mapping[Any, Any], part: str, path: Path) -> dict[str, Tensor]:
    keys = [str(key) for key in found]
    wrapped = all(key.startswith("module.") for key in keys)
    names = [key.removeprefix("module.") if wrapped else key for key in keys]
    return {
        name: _checked(value, f"{part}.{name}", path)
        for name, value in zip(names, found.values(), strict=True)
    }


def _checked(value: object, key: str, path: Path) -> Tensor:
    if not isinstance(value, Tensor):
        raise WeightsError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
    if not value.is_floating_point():
        return value
    if not bool(torch.isfinite(value).all()):
        raise WeightsError(f"{path}: {key!r} holds values that are not finite")
    return value.float()
