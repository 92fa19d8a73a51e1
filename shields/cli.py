"""The command `shields`; further commands are found by entry point."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import shields
from shields import cli_models, cli_spread
from shields.cli_common import AsJson, Format, Region, WeightsDir, errors, warn

__all__ = ["app", "main"]

PLUGINS = "shields.commands"
_PROTECTION, _FILES, _MACHINE = "What is done", "Files", "Machine and output"


class _Commands(TyperGroup):
    """Our commands, and those that other packages bring; theirs are loaded when looked up."""

    @staticmethod
    def _brought() -> dict[str, metadata.EntryPoint]:
        return {entry.name: entry for entry in metadata.entry_points(group=PLUGINS)}

    # typer's own context is what arrives; its base class has no public name
    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Ours in the order in which they are used, then the others by name."""
        ours = list(self.commands)
        return ours + sorted(set(self._brought()) - set(ours))

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Find a command; one that cannot be loaded is named in a warning and left out."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        entry = self._brought().get(cmd_name)
        if entry is None:
            return None
        try:
            loaded = entry.load()
            if not isinstance(loaded, typer.Typer):
                raise TypeError(f"{entry.value} is not a typer.Typer")
            command = typer.main.get_command(loaded)
        except Exception as error:  # a broken package must not take `protect` down
            warn(f"the command {cmd_name!r} cannot be loaded: {type(error).__name__}: {error}")
            return None
        command.name = cmd_name
        self.commands[cmd_name] = command
        return command


app = typer.Typer(
    cls=_Commands,
    name="shields",
    help="Protect portrait photos against generative editing, and prove it.",
    epilog="Begin with: [bold]shields protect photo.jpg[/]",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _network(help: str) -> Any:  # noqa: ANN401  what typer's options are
    return typer.Option(metavar="NAME", help=help, rich_help_panel=_PROTECTION)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shields {shields.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Options of `shields` itself; all the work is done by its commands."""


@app.command(
    epilog="""
[bold]Examples[/]\n
[cyan]shields protect photo.jpg[/]  every face, 8 levels; result: photo-protected.png\n
[cyan]shields protect photos/ --out protected/[/]  a folder, its tree kept; run it again to go on\n
[cyan]shields protect me.jpg --levels 4 --robust --sheet look.png[/]  fainter, survives sharing\n
[cyan]shields protect me.jpg --method photoguard --preset paper[/]  another method, as published\n
[cyan]shields protect me.jpg --set steps=50 --set step=0.5[/]  any setting; `shields list facelock`
names them\n
[bold]Exit status[/]  0 all done, 1 some photos failed, 2 wrong usage, 130 stopped by Ctrl-C
"""
)
def protect(
    photos: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTO_OR_FOLDER...", help="Photos, folders (with all below them) or globs."
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Protector; `shields list protectors` shows them.",
            rich_help_panel=_PROTECTION,
        ),
    ] = "facelock",
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Named settings of the method, such as paper; `shields list NAME` shows them.",
            rich_help_panel=_PROTECTION,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any setting of the method; may be repeated.",
            rich_help_panel=_PROTECTION,
        ),
    ] = None,
    levels: Annotated[
        float | None,
        typer.Option(
            help="How far a colour value may move, of 255; more protects more and shows more. "
            "[dim]default: 8, or the preset's[/]",
            rich_help_panel=_PROTECTION,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Updates of an iterative method; time grows in proportion. "
            "[dim]default: the method's[/]",
            rich_help_panel=_PROTECTION,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="The same seed, photo and settings give the same bits on a CPU.",
            rich_help_panel=_PROTECTION,
        ),
    ] = 0,
    region: Annotated[
        Region,
        typer.Option(
            help="Protect every face, the whole photo, or faces where there are any.",
            rich_help_panel=_PROTECTION,
        ),
    ] = Region.auto,
    size: Annotated[
        int,
        typer.Option(
            help="Side in pixels at which a region is worked on; the photo keeps its own.",
            rich_help_panel=_PROTECTION,
        ),
    ] = 256,
    robust: Annotated[
        bool,
        typer.Option(
            "--robust",
            help="Survive JPEG, resizing and networks not seen; takes longer.",
            rich_help_panel=_PROTECTION,
        ),
    ] = False,
    stealth: Annotated[
        bool,
        typer.Option(
            "--stealth",
            help="Move each pixel less where people would notice; protects less.",
            rich_help_panel=_PROTECTION,
        ),
    ] = False,
    autoencoder: Annotated[
        str | None,
        _network("Autoencoder to protect against: a card, a folder or a Hugging Face id."),
    ] = None,
    recognizer: Annotated[str | None, _network("Face recognizer to protect against.")] = None,
    perceptual: Annotated[str | None, _network("Perceptual distance of the method.")] = None,
    diffusion: Annotated[
        str | None, _network("Latent diffusion model, for the methods that use one.")
    ] = None,
    manipulator: Annotated[
        str | None,
        _network("Manipulator to protect against: a card, or module:factory of your own."),
    ] = None,
    generator: Annotated[
        str | None, _network("Trained generator, for the learned methods: a card or its file.")
    ] = None,
    condition: Annotated[
        str | None,
        _network("What the manipulator would be asked for, such as blond_hair; default: all."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE_OR_FOLDER",
            help="Result file of one photo, or result folder. Left out: NAME-protected.png beside "
            "each photo.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="Of the results; png and webp are lossless, jpg costs protection. "
            "[dim]default: png, or the suffix of --out[/]",
            rich_help_panel=_FILES,
        ),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Of --format jpg.", rich_help_panel=_FILES),
    ] = None,
    keep_metadata: Annotated[
        bool,
        typer.Option(
            "--keep-metadata",
            help="Keep EXIF, GPS position included; dropped otherwise.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG_OR_FOLDER",
            help="Also draw before, after and the change amplified, side by side.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Also write what --json prints; `shields verify --report` reads it.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Redo finished photos and replace files that are in the way; never an original.",
            rich_help_panel=_FILES,
        ),
    ] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Refuse larger photos: a guard against decompression bombs.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    weights_dir: WeightsDir = None,
    device: Annotated[
        str,
        typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=_MACHINE),
    ] = "auto",
    engine: cli_spread.EngineName = cli_spread.Engine.serial,
    workers: cli_spread.WorkerCount = None,
    gpus_per_worker: cli_spread.GpusPerWorker = None,
    ray_address: cli_spread.RayAddress = None,
    as_json: AsJson = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="Print errors only.", rich_help_panel=_MACHINE),
    ] = False,
) -> None:
    """Protect photos: add a change that people hardly see and networks stumble over.

    The photo keeps its size; faces are found, protected and put back, and every result is read
    again from disk and checked. Metadata such as the GPS position is left out.
    """
    from shields import cli_protect

    networks = {
        "autoencoder": autoencoder,
        "recognizer": recognizer,
        "perceptual": perceptual,
        "diffusion": diffusion,
        "manipulator": manipulator,
        "generator": generator,
    }
    asked = [] if condition is None else [f"conditions={condition}"]
    request = cli_protect.Request(
        photos=photos,
        out=out,
        method=method,
        preset=preset,
        settings=[*(settings or []), *asked],
        levels=levels,
        steps=steps,
        seed=seed,
        region=region.value,
        size=size,
        robust=robust,
        stealth=stealth,
        networks={role: name for role, name in networks.items() if name is not None},
        format=None if format is None else format.value,
        quality=quality,
        keep_metadata=keep_metadata,
        sheet=sheet,
        report=report,
        overwrite=overwrite,
        max_pixels=max_pixels,
        weights_dir=weights_dir,
        device=device,
        as_json=as_json,
        quiet=quiet,
    )
    with errors(as_json=as_json):
        team = cli_spread.workers_of(engine, workers, gpus_per_worker, ray_address, device)
        code = cli_protect.run(request, team)
    raise typer.Exit(code)


@app.command(
    epilog="""
[bold]Examples[/]\n
[cyan]shields verify photo.jpg photo-protected.png[/]  budget and regions come from the manifest\n
[cyan]shields verify photo.jpg other.png --levels 8[/]  a photo protected elsewhere\n
[bold]Exit status[/]  0 good, 1 the budget is broken or the sizes differ, 2 wrong usage
"""
)
def verify(
    original: Annotated[Path, typer.Argument(help="The photo as it was.")],
    protected: Annotated[Path, typer.Argument(help="The file that was written.")],
    levels: Annotated[
        float | None,
        typer.Option(help="Allowed change. [dim]default: what the photo was made with, or 8[/]"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT.json",
            help="What `shields protect --json` printed; tells regions and method. "
            "[dim]default: the manifest of the result's folder[/]",
        ),
    ] = None,
    weights_dir: WeightsDir = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Refuse larger photos.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a protected photo with its original, both read back from disk.

    Reports the largest change in whole levels, changes outside the protected regions, fidelity
    (PSNR, SSIM, and LPIPS where its weights are) and the method's objective before and after.
    """
    from shields import cli_verify

    with errors(as_json=as_json):
        code = cli_verify.run(
            original,
            protected,
            levels=levels,
            document=report,
            weights_dir=weights_dir,
            device=device,
            max_pixels=max_pixels,
            as_json=as_json,
        )
    raise typer.Exit(code)


app.command(name="list")(cli_models.list_entries)
app.add_typer(cli_models.app, name="models")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
