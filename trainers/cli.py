"""`shields train`: pack photos, run a trainer through LightningCLI, export what it made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from shields.errors import OutputError, ShieldsError
from trainers import TRAINERS
from trainers.cli_pack import pack

__all__ = ["app"]

#: LightningCLI's subcommands, all of whose flags are passed on
_VERBS = {
    "fit": "Train; --config FILE, any --trainer.*, --data.*, --model.* flag, --ckpt_path last.",
    "validate": "Measure a checkpoint on held-out people: --ckpt_path FILE.",
}

app = typer.Typer(
    help="Train the networks that protections are made of.",
    epilog="First `shields train pack lfw.tar .data/lfw.safetensors`, then "
    "`shields train portrait-ae fit --config trainers/configs/portrait-ae.yaml`.",
    no_args_is_help=True,
    add_completion=False,
)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ShieldsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


app.command()(pack)


@app.command()
def sheet(
    manipulators: Annotated[list[str], typer.Argument(help="Cards of manipulators.")],
    pack_file: Annotated[Path, typer.Option("--pack", help="Held-out people to show.")],
    output: Annotated[Path, typer.Option("--to", help="The picture to write, PNG or JPEG.")],
    attribute: Annotated[str, typer.Option(help="What is changed.")] = "Smiling",
    people: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
) -> None:
    """Draw people that no manipulator was trained on, and what each manipulator makes of them."""
    import torch

    from shields.models import load
    from shields.weights import WeightStore
    from trainers.manipulator_measure import draw_sheet

    with _one_line_errors():
        store, device = WeightStore(), torch.device("cpu")
        models = [load("manipulator", name, store=store, device=device) for name in manipulators]
        picture = draw_sheet(models, pack_file, attribute, people=people)
        try:
            picture.save(output)
        except (OSError, ValueError) as error:
            raise OutputError(f"cannot write {output}: {error}") from error
    typer.echo(output)


@app.command()
def people(
    pack_file: Annotated[Path, typer.Argument(metavar="PACK", help="What `pack` made.")],
    folder: Annotated[Path, typer.Argument(help="Where to write; is made.")],
    size: Annotated[int, typer.Option(help="Side of a photo, pixels.")] = 256,
    share: Annotated[float, typer.Option(help="How much of a packed face is shown.")] = 0.9,
    limit: Annotated[int, typer.Option(help="How many people; 0 for all.")] = 0,
) -> None:
    """Write the people of a pack that no network was trained on as photos, to measure on."""
    from trainers.people import write_people

    with _one_line_errors():
        written = write_people(pack_file, folder, size=size, share=share, limit=limit)
    typer.echo(f"{len(written)} people in {folder}")


def _lightning(name: str, verb: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        from pytorch_lightning.cli import LightningCLI

        from trainers.data import FacePacks
        from trainers.interruption import SaveOnSigterm
        from trainers.parallel import PlayersInTurn

        with _one_line_errors():
            LightningCLI(
                TRAINERS[name],
                FacePacks,
                args=[verb, *context.args],
                seed_everything_default=0,
                trainer_defaults={"callbacks": [PlayersInTurn(), SaveOnSigterm()]},
                save_config_kwargs={"overwrite": True},
            )

    return command


def _export(name: str) -> Callable[..., None]:
    def command(
        checkpoint: Annotated[Path, typer.Argument(help="A Lightning checkpoint of this trainer.")],
        pack_file: Annotated[Path, typer.Option("--pack", help="Held-out people to measure on.")],
        folder: Annotated[Path, typer.Option("--to", help="Where to write.")] = Path("checkpoints"),
        recipe: Annotated[
            Path | None,
            typer.Option(
                exists=True, help="Its config; trainers/configs/NAME.yaml where left out."
            ),
        ] = None,
        remarks: Annotated[str, typer.Option(help="What the card shall say beside.")] = "",
        called: Annotated[
            str, typer.Option("--name", help="The card's name; the trainer's where left out.")
        ] = "",
    ) -> None:
        """Measure a checkpoint on held-out people and write safetensors and card."""
        from trainers.export import export_checkpoint

        with _one_line_errors():
            config = recipe or Path("trainers/configs") / f"{name}.yaml"
            card = export_checkpoint(
                name, checkpoint, pack_file, folder, config, remarks=remarks, called=called
            )
            typer.echo(card)

    return command


for _name in TRAINERS:
    _trainer = typer.Typer(help=f"Train, measure and export {_name}.", no_args_is_help=True)
    for _verb, _help in _VERBS.items():
        _trainer.command(
            _verb,
            help=_help,
            add_help_option=False,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(_lightning(_name, _verb))
    _trainer.command("export")(_export(_name))
    app.add_typer(_trainer, name=_name)
