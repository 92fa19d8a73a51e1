"""`shields train`: pack photos, run a trainer through LightningCLI, export what it made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shields.errors import ShieldsError
from trainers import TRAINERS

__all__ = ["app"]

app = typer.Typer(
    help="Train the networks that protections are made of.",
    epilog="First pack photos (`shields train pack lfw.tar .data/lfw.safetensors`), then "
    "`shields train run portrait-ae fit --config trainers/configs/portrait-ae.yaml`.",
    no_args_is_help=True,
)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A folder of photos, or a tar of them.")],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    size: Annotated[int, typer.Option(help="Side of a packed face, pixels.")] = 160,
    margin: Annotated[float, typer.Option(help="Side of the cut, in face boxes.")] = 1.8,
) -> None:
    """Cut the faces out of photos once, so that training never decodes an image again."""
    from trainers.pack import pack as run

    if not source.exists():
        raise typer.BadParameter(f"there is no {source}")
    report = run(source, output, size=size, margin=margin)
    typer.echo(f"{report.faces} faces of {report.identities} people in {output}")
    for name, reason in report.skipped.items():
        typer.echo(f"left out {name}: {reason}", err=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def run(context: typer.Context, name: str) -> None:
    """Run a trainer: every LightningCLI subcommand and Trainer flag works.

    `shields train run portrait-ae fit --config trainers/configs/portrait-ae.yaml`; the subcommand
    `--help` lists all flags, `--ckpt_path last` resumes.
    """
    from pytorch_lightning.cli import LightningCLI

    from trainers.data import FacePacks

    try:
        module = TRAINERS[name]
        LightningCLI(
            module,
            FacePacks,
            args=context.args,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )
    except ShieldsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@app.command()
def export(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(TRAINERS)}.")],
    checkpoint: Annotated[Path, typer.Argument(help="A Lightning checkpoint of that trainer.")],
    pack_file: Annotated[Path, typer.Option("--pack", help="Held-out people to measure on.")],
    folder: Annotated[Path, typer.Option("--to", help="Where to write.")] = Path("checkpoints"),
) -> None:
    """Measure a checkpoint on held-out people and write safetensors and card."""
    import pytorch_lightning as pl

    from trainers.data import FacePacks
    from trainers.export import Recipe
    from trainers.export import export as write

    try:
        module = TRAINERS[name].load_from_checkpoint(checkpoint, map_location="cpu")  # type: ignore[attr-defined]
        data = FacePacks([pack_file])
        trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="auto")
        (results,) = trainer.validate(module, data, verbose=False)
        state, config = module.export()
        steps = int(_steps_of(checkpoint))
        recipe = Recipe(
            name=name,
            command=f"shields train run {name} fit --config trainers/configs/{name}.yaml",
            seed=int(module.hparams.seed),
            steps=steps,
            **module.CARD,
        )
        card = write(state, config, recipe, dict(results), folder)
    except ShieldsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    sys.stdout.write(f"{card}\n")


def _steps_of(checkpoint: Path) -> int:
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return int(content["global_step"])
