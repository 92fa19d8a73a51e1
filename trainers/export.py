"""Turn a finished run into what ships: half-precision safetensors and a card that says how."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shields.errors import OutputError
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
    if isinstance(value, float):
        return repr(round(value, 4))
    return json.dumps(value, ensure_ascii=False)


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
        folder.mkdir(parents=True, exist_ok=True)
        save_file(half, weights)
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
    measured = {name.removeprefix("val_"): value for name, value in results.items()}
    tables = {"config": config, "training": training, "results": measured}
    lines = [f"{key} = {_toml(value)}" for key, value in fields.items()]
    for title, table in tables.items():
        lines += ["", f"[{title}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    card = folder / f"{recipe.name}.toml"
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
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
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="auto")
    held_out = FacePacks([pack], attributes=tuple(module.hparams.get("attributes", ())))
    (results,) = trainer.validate(module, held_out, verbose=False)
    state, config = module.export()
    facts = Recipe(
        name=called or name,
        command=f"shields train {name} fit --config {recipe.as_posix()}",
        seed=int(module.seed),
        steps=_batches(checkpoint),
        remarks=remarks,
        **module.CARD,
    )
    card = export(state, config, facts, dict(results), folder)
    if hasattr(module, "measure"):  # what can be measured on the shipped file alone
        card = export(state, config, facts, {**results, **module.measure(card, pack)}, folder)
    return card


def _batches(checkpoint: Path) -> int:
    """Batches trained on; `global_step` counts a GAN's two optimizers."""
    loops = torch.load(checkpoint, map_location="cpu", weights_only=True)["loops"]
    return int(loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"])
