"""`shields attack`: what is left of a protection once the world has handled the photo."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperGroup

from robustness.rows import Row, Run, load
from shields.cli_common import (
    AsJson,
    WeightsDir,
    errors,
    fail,
    out,
    plain,
    progress_console,
    say,
    warn,
    write_json,
)
from shields.cli_spread import (
    Engine,
    EngineName,
    GpusPerWorker,
    RayAddress,
    WorkerCount,
    workers_of,
)
from shields.errors import ConfigError, UnknownName
from shields.spread import Workers

if TYPE_CHECKING:
    from robustness.suite import Suite

__all__ = ["app"]

_INTERRUPTED = 130
#: what is run where photos are given instead of a suite: networks that come with the project
_EVERYDAY: dict[str, Any] = {
    "name": "everyday",
    "protectors": ["facelock"],
    "attacks": ["jpeg:90", "jpeg:75", "resize:0.5", "cr", "whatsapp", "screenshot-phone",
                "median:3", "tip-rsr"],
    "manipulators": ["portrait-ae"],
    "metrics": ["psnr@photo", "ssim@photo", "mse@edits", "fr:face-embedder@source",
                "recognised:face-embedder@source"],
}  # fmt: skip
_WHAT, _WHERE = "What is run", "Files and machine"


class _DefaultCommand(TyperGroup):
    """`shields attack offline` is short for `shields attack run offline`."""

    # typer's own context is what arrives; its base class has no public name
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401
        """Put the name of the usual command before arguments that name none."""
        if args and args[0] not in {*self.commands, *self.get_help_option_names(ctx)}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultCommand,
    help="Measure what is left of a protection after sharing, purifying and forging.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _option(help: str, *names: str, panel: str = _WHAT, metavar: str = "NAME") -> Any:  # noqa: ANN401
    return typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)


@app.command(
    epilog="""
[bold]Examples[/]\n
[cyan]shields attack photo.jpg --protected photo-protected.png[/]  what survives what, in words\n
[cyan]shields attack offline --photos photos/ --out report/[/]  a suite that comes along\n
[cyan]shields attack suite.yaml[/]  a suite of your own; run it again to go on after a stop\n
[cyan]shields attack --photos photos/ --protector facelock:robust=true --attack jpeg:75+resize:0.5
--manipulator taef2 --metric fr:mobilefacenet@source --out report/[/]\n
[bold]Exit status[/]  0 all done, 1 some cells failed, 2 wrong usage, 130 stopped by Ctrl-C
"""
)
def run(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SUITE | PHOTO_OR_FOLDER...",
            help="A suite, as a file or by name (`shields attack suites`), or photos.",
        ),
    ] = None,
    photos: Annotated[list[str] | None, _option("Photos or a folder.", metavar="PATH")] = None,
    protected: Annotated[
        Path | None,
        _option("The same photos protected, by any tool: a file or a folder.", metavar="PATH"),
    ] = None,
    protector: Annotated[
        list[str] | None,
        _option("Protect by this: facelock, facelock:robust=true,levels=4; may be repeated."),
    ] = None,
    attack: Annotated[
        list[str] | None,
        _option("Handle like this: jpeg:75+resize:0.5, tip-rsr; may be repeated."),
    ] = None,
    manipulator: Annotated[
        list[str] | None,
        _option("Forge with this manipulator, autoencoder or editor; may be repeated."),
    ] = None,
    condition: Annotated[
        list[str] | None,
        _option("What every manipulator is asked for, or a prompt.", metavar="TEXT"),
    ] = None,
    metric: Annotated[
        list[str] | None, _option("Measure this: fr:face-embedder@source; may be repeated.")
    ] = None,
    seeds: Annotated[
        list[int] | None,
        _option("Of handling and forging; may be repeated.", "--repeat-seed", metavar="N"),
    ] = None,
    seed: Annotated[int | None, _option("Of the protectors.", metavar="N")] = None,
    limit: Annotated[int | None, _option("Only the first N photos.", metavar="N")] = None,
    size: Annotated[
        int | None, _option("First cut photos to squares of N pixels.", metavar="N")
    ] = None,
    out_folder: Annotated[
        Path | None,
        _option(
            "Folder of the report, rows and images. [dim]default: out/NAME of a suite; photos "
            "alone are answered on the terminal[/]",
            "--out",
            panel=_WHERE,
            metavar="FOLDER",
        ),
    ] = None,
    weights_dir: WeightsDir = None,
    device: Annotated[
        str, _option("auto, cpu, cuda, cuda:1 or mps.", panel=_WHERE, metavar="NAME")
    ] = "auto",
    engine: EngineName = Engine.serial,
    workers: WorkerCount = None,
    gpus_per_worker: GpusPerWorker = None,
    ray_address: RayAddress = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Protect, handle, forge and measure; whatever fails is said in its cell, the rest goes on."""
    with errors(as_json=as_json):
        from robustness import handling

        for text in attack or ():
            handling.check(text)
        changes = {
            "attacks": attack, "metrics": metric, "seeds": seeds, "seed": seed, "limit": limit,
            "size": size, "photos": photos, "manipulators": _forgings(manipulator, condition),
            "protectors": _protectors(protector, protected),
        }  # fmt: skip
        changes = {key: value for key, value in changes.items() if value is not None}
        team = workers_of(engine, workers, gpus_per_worker, ray_address, device)
        suite, everyday = _suite(list(targets or ()), changes)
        keep = out_folder or (None if everyday else Path("out") / suite.name)
        made = nullcontext(str(keep)) if keep else tempfile.TemporaryDirectory(prefix="shields-")
        with made as folder:
            code = _run(
                suite, Path(folder), weights_dir, device, team,
                kept=keep is not None, everyday=everyday, as_json=as_json, quiet=quiet,
            )  # fmt: skip
    raise typer.Exit(code)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Write the report of a run again from its rows."""
    with errors(as_json=as_json):
        path = _report(folder, *load(folder / "rows.json"))
        if as_json:
            write_json({"report": str(path)})
        else:
            out.print(plain(f"report: {path}"))


@app.command()
def suites(as_json: AsJson = False) -> None:
    """List the suites that come along, and what attacks and metrics are called."""
    from robustness.attacks import ATTACKS
    from robustness.metrics import METRICS
    from robustness.purifiers import PURIFIERS
    from robustness.suite import SUITES, Suite

    with errors(as_json=as_json):
        read = {path.stem: Suite.read(path).summary for path in sorted(SUITES.glob("*.yaml"))}
    names = {"attacks": list(ATTACKS), "purifiers": list(PURIFIERS), "metrics": list(METRICS)}
    if as_json:
        write_json({"suites": read, **names})
        return
    for name, summary in read.items():
        out.print(plain(f"{name}: {summary}"))
    for what, entries in names.items():
        out.print(plain(f"{what}: {', '.join(entries)}"))


def _suite(targets: list[str], changes: dict[str, Any]) -> tuple[Suite, bool]:
    """The suite that was named, changed by the flags, or one about photos; and whether it is that.

    Raises:
        ConfigError: There is no such suite, or neither suite nor photos were given.
    """
    from robustness.suite import SUITES, Suite, find_suite

    names = {path.stem for path in SUITES.glob("*.yaml")}
    first = Path(targets[0]) if targets else None
    if first is not None and (
        first.suffix in {".yaml", ".yml"} or (targets[0] in names and not first.exists())
    ):
        if len(targets) > 1:
            raise ConfigError(f"one suite at a time; photos of {targets[0]} follow --photos")
        return Suite.read(find_suite(targets[0]), changes), False
    if not targets and "photos" not in changes:
        raise ConfigError(
            f"name a suite ({', '.join(sorted(names))}, or a .yaml) or photos; see --help"
        )
    if len(targets) == 1 and first is not None and not first.exists() and not first.suffix:
        find_suite(targets[0])  # for its hint
    everyday = {**_EVERYDAY, "attacks": [text for text in _EVERYDAY["attacks"] if _known(text)]}
    found = [*targets, *changes.get("photos", ())]
    return Suite.from_dict({**everyday, **changes, "photos": found}), True


def _known(text: str) -> bool:
    from robustness import handling

    try:
        handling.check(text)
    except UnknownName:
        return False
    return True


def _protectors(names: Sequence[str] | None, protected: Path | None) -> list[Any] | None:
    """Entries of a suite from `facelock`, `facelock:robust=true,levels=4` and --protected."""
    if names is None and protected is None:
        return None
    entries: list[Any] = []
    if protected is not None:
        if not protected.exists():
            raise ConfigError(f"--protected {protected} is neither a file nor a folder")
        entries.append({"label": "protected", "folder": str(protected)})
    for name in names or ():
        method, colon, settings = name.partition(":")
        entries.append({"method": method, "label": name, **_settings(settings)} if colon else name)
    return entries


def _settings(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--protector wants NAME:key=value,…, got {part!r}")
        value = value.strip()
        words: dict[str, Any] = {"true": True, "false": False}
        values[key.strip()] = int(value) if value.isdecimal() else words.get(value, value)
    return values


def _forgings(names: Sequence[str] | None, conditions: Sequence[str] | None) -> list[Any] | None:
    if conditions and not names:
        raise ConfigError("--condition is for a --manipulator; name one")
    if names is None:
        return None
    return [{"name": name, "conditions": list(conditions or ())} for name in names]


def _run(
    suite: Suite,
    folder: Path,
    weights_dir: Path | None,
    device: str,
    team: Workers | None,
    *,
    kept: bool,
    everyday: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    from robustness.ray_engine import on_ray
    from robustness.runner import Place, run_suite, serial
    from shields.shield import choose_device

    if weights_dir is not None and not weights_dir.is_dir():
        raise ConfigError(f"--weights-dir {weights_dir} is not a folder")
    place = Place(out=folder, weights_dir=weights_dir, device=str(choose_device(device)))
    command = shlex.join(["shields", "attack", *sys.argv[_first(sys.argv) :]])
    try:
        # Ray tells of processes that died on stdout, which is for results.
        with _bar(hidden=quiet) as tell, redirect_stdout(sys.stderr):
            engine = serial if team is None else on_ray(team)
            done, rows = run_suite(suite, place, command=command, engine=engine, progress=tell)
    except KeyboardInterrupt:
        again = "the same command goes on from here" if kept else "nothing is kept without --out"
        say(f"stopped; {again}")
        return _INTERRUPTED
    path = _report(folder, done, rows) if kept else None
    _tell(suite, done, rows, path, everyday=everyday, as_json=as_json, quiet=quiet)
    return 1 if any(row.error for row in rows) else 0


def _first(words: Sequence[str]) -> int:
    """Where the arguments of `attack` begin in what was typed."""
    return words.index("attack") + 1 if "attack" in words else 1


@contextmanager
def _bar(*, hidden: bool) -> Iterator[Any]:
    """A bar over units; a photo under one protector moves it as its attacks are done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(),
               TextColumn("{task.fields[count]}"), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    disable = hidden or not progress_console.is_terminal
    with Progress(*columns, console=progress_console, transient=True, disable=disable) as progress:
        task = progress.add_task("", total=None, count="")

        def tell(done: int, total: int, share: float, name: str) -> None:
            progress.update(
                task, description=name, completed=done + share, total=total,
                count=f"{done}/{total}",
            )  # fmt: skip

        yield tell


def _report(folder: Path, done: Run, rows: Sequence[Row]) -> Path:
    from robustness import report as reports

    return reports.write(folder, done, rows)


def _tell(
    suite: Suite,
    done: Run,
    rows: Sequence[Row],
    path: Path | None,
    *,
    everyday: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from robustness.everyday import sentences, survivals, table

    problems = Counter(row.error for row in rows if row.error)
    found = survivals(rows) if everyday else []
    said = sentences(found)
    if as_json:
        write_json(
            {
                "name": suite.name, "rows": len(rows), "failed": sum(problems.values()),
                "errors": dict(problems), "seconds": done.seconds, "sentences": said,
                "report": None if path is None else str(path),
            }
        )  # fmt: skip
        return
    for text, count in problems.most_common(10):
        fail(f"{count} of {len(rows)} rows: {text}")
    if len(problems) > 10:
        warn(f"{len(problems) - 10} further reasons stand in rows.json")
    if quiet:
        return
    if found:
        out.print(table(found))
        for sentence in said:
            out.print(plain(sentence))
    if path is not None:
        out.print(plain(f"{len(rows)} rows in {done.seconds:.1f} s; report: {path}"))


if __name__ == "__main__":
    app()
