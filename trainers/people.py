"""Held-out people of a pack as photos, for `shields attack` and for whoever wants to look."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image as PILImage
from safetensors import safe_open

from shields.errors import ConfigError, OutputError
from shields.files import aside
from trainers.data import FacePack, middle
from trainers.scheme import resized

__all__ = ["write_people"]


def write_people(
    pack: Path, folder: Path, *, size: int, share: float = 0.9, limit: int = 0
) -> list[Path]:
    """Write one photo of each held-out person: `PERSON.png`.

    Args:
        pack: A file made by `trainers.pack`.
        folder: Is made; photos that are there already are left as they are.
        size: Side of the photos, pixels.
        share: Side of the middle that is cut out, in sides of the packed face.
        limit: How many people, the first by name; 0 for all.

    Returns:
        The photos, by name.

    Raises:
        ConfigError: There is nobody, or a number makes no sense.
        OutputError: The folder cannot be written.
    """
    if size < 16 or not 0 < share <= 1 or limit < 0:
        raise ConfigError(
            "`size` must be 16 pixels or more, `share` in (0, 1] and `limit` 0 or more, "
            f"got {size}, {share:g}, {limit}"
        )
    faces = FacePack(pack, validation=True)
    with safe_open(pack, "pt") as archive:
        names = json.loads(archive.metadata()["identities"])
    first: dict[str, int] = {}
    for item, row in enumerate(faces.index.tolist()):
        first.setdefault(names[int(faces.identity[row])], item)
    if not first:
        raise ConfigError(f"nobody is held out in {pack}; pack more people")
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, item in sorted(first.items())[: limit or None]:
            path = folder / f"{Path(name).name}.png"
            if not path.exists():
                cut = middle(faces[item]["face"][None], share)[0].float() / 255
                levels = (resized(cut, size)[0].clamp(0, 1) * 255).round().to(torch.uint8)
                with aside(path) as part:
                    PILImage.fromarray(levels.permute(1, 2, 0).numpy()).save(part, "PNG")
            written.append(path)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error}") from error
    return written
