"""Turn a finished run into what ships: half-precision safetensors and a card that says how."""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from shields.errors import OutputError
from shields.files import aside
from shields.provenance import hardware, revision

__all__ = ["Recipe", "export", "export_checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a card says about how a network came about."""

    name: str
    role: str
    architecture: str
    summary: str
    licence: str
    #: where the training photos come from, and how they were split
    data: str
    #: the network that was distilled, or that judged what was learned; empty if none
    teacher: str
    #: the command that trains it
    command: str
    seed: int
    steps: int
    remarks: str = ""


def _toml(value: object) -> str:
    """Write a scalar or a list as TOML; JSON's strings, numbers and lists are TOML's."""
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def export(
    state: dict[str, Tensor],
    config: dict[str, Any],
    recipe: Recipe,
    results: dict[str, float],
    folder: Path,
) -> Path:
    """Write `NAME.safetensors` in half precision and `NAME.toml` beside it.

    Args:
        state: The network's parameters and buffers.
        config: Its constructor's arguments.
        recipe: How it was made.
        results: What was measured on held-out data, as the trainer logged it.
        folder: Usually `checkpoints/`.

    Returns:
        The card's path.

    Raises:
        OutputError: The folder cannot be written.
    """
    weights = folder / f"{recipe.name}.safetensors"
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for name, value in state.items()
    }
    try:
        with aside(weights) as part:
            save_file(half, part)
    except OSError as error:
        raise OutputError(f"cannot write {weights}: {error}") from error
    fields = {
        "name": recipe.name,
        "role": recipe.role,
        "architecture": recipe.architecture,
        "summary": recipe.summary,
        "file": weights.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "bytes": weights.stat().st_size,
        "licence": recipe.licence,
        "source": "trained by this project",
        "remarks": recipe.remarks,
    }
    training = {
        "data": recipe.data,
        "teacher": recipe.teacher,
        "command": recipe.command,
        "commit": revision(),
        "seed": recipe.seed,
        "steps": recipe.steps,
        "hardware": hardware(),
    }
    measured = {name.removeprefix("val_"): round(value, 4) for name, value in results.items()}
    tables = {"config": config, "training": training, "results": measured}
    lines = [f"{key} = {_toml(value)}" for key, value in fields.items()]
    for title, table in tables.items():
        lines += ["", f"[{title}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    card = folder / f"{recipe.name}.toml"
    try:
        with aside(card) as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {card}: {error}") from error
    return card


def export_checkpoint(
    name: str,
    checkpoint: Path,
    pack: Path,
    folder: Path,
    recipe: Path,
    *,
    remarks: str = "",
    called: str = "",
) -> Path:
    """Measure a Lightning checkpoint on the held-out people of a pack, then `export` it.

    Args:
        name: The trainer's name in `TRAINERS`.
        checkpoint: What the trainer saved.
        pack: A file made by `trainers.pack`.
        folder: Usually `checkpoints/`.
        recipe: The config that it was trained with, as the card shall name it.
        remarks: What the card shall say beside what is known here.
        called: The card's name; the trainer's if left out.
    """
    import pytorch_lightning as pl

    from trainers import TRAINERS
    from trainers.data import FacePacks

    kind: Any = TRAINERS[name]
    module = kind.load_from_checkpoint(checkpoint, map_location="cpu")
    with torch.no_grad():  # measure what is shipped: half precision
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    # One device: several would each measure a part of the people, and each write.
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, devices=1)
    held_out = FacePacks([pack], attributes=tuple(module.hparams.get("attributes", ())))
    (results,) = trainer.validate(module, held_out, verbose=False)
    state, config = module.export()
    facts = Recipe(
        name=called or name,
        command=_command(name, recipe, kind, module.hparams),
        seed=int(module.seed),
        steps=_batches(checkpoint),
        remarks=remarks,
        **module.CARD,
    )
    card = export(state, config, facts, dict(results), folder)
    if hasattr(module, "measure"):  # what can be measured on the shipped file alone
        card = export(state, config, facts, {**results, **module.measure(card, pack)}, folder)
    return card


def _command(name: str, recipe: Path, kind: type, settings: Mapping[str, Any]) -> str:
    """The command that trains it: the recipe, and what was set otherwise than it says."""
    written: dict[str, Any] = {}
    if recipe.is_file():
        written = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("model") or {}
    words = ["shields", "train", name, "fit"]
    words += ["--config", recipe.as_posix()] if recipe.is_file() else []
    for key, parameter in inspect.signature(kind).parameters.items():
        expected = _plain(written.get(key, parameter.default))
        if key in settings and _plain(settings[key]) != expected:
            words += [f"--model.{key}", json.dumps(_plain(settings[key]))]
    return " ".join(shlex.quote(word) for word in words)


def _plain(value: Any) -> Any:  # noqa: ANN401  whatever a constructor takes
    """A setting as a recipe would hold it: lists for tuples, text for paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    return value


def _batches(checkpoint: Path) -> int:
    """Batches trained on; `global_step` counts a GAN's two optimizers."""
    loops = torch.load(checkpoint, map_location="cpu", weights_only=True)["loops"]
    return int(loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"])
