"""`shields models check` and `shields models convert`: is this network what it should be?"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shields.cli_common import (
    AsJson,
    WeightsDir,
    errors,
    out,
    plain,
    progress_console,
    say,
    store_at,
    write_json,
)
from shields.errors import ConfigError

if TYPE_CHECKING:
    from shields.models.base import Frozen, Recognizer
    from shields.models.manipulation import Manipulator
    from shields.models.verification import Verification
    from shields.weights import WeightStore

__all__ = ["check", "convert"]

_BAR = 40


def _role(name: str, store: WeightStore, lfw: Path | None) -> str:
    """The role of a card; anything else is what the other options are for."""
    if name in store.names():
        return store.card(name).role
    return "manipulator" if lfw is None else "recognizer"


def check(
    name: Annotated[str, typer.Argument(help="A card, or module:factory of your own.")],
    lfw: Annotated[
        Path | None,
        typer.Option(help="A folder or a tar with a folder of photos per person, for recognizers."),
    ] = None,
    pairs: Annotated[int, typer.Option(min=4, help="Pairs of photos to compare at most.")] = 600,
    size: Annotated[int, typer.Option(help="Side of the image, pixels, for manipulators.")] = 256,
    condition: Annotated[str, typer.Option(help="What a manipulator is asked for.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    weights_dir: WeightsDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure a recognizer on pairs of faces, or hold a manipulator to its contract.

    [cyan]shields models check mobilefacenet --lfw lfw.tar[/]  accuracy, threshold, histograms;
    [cyan]shields models check my_module:psp[/]  shape, range, gradient, repetition, speed.

    Exits 1 where a manipulator breaks a promise.
    """
    from shields import models
    from shields.shield import choose_device

    with errors(as_json=as_json):
        store = store_at(weights_dir)
        role = _role(name, store, lfw)
        if role not in {"recognizer", "manipulator"}:
            raise ConfigError(
                f"{name} has the role {role}; recognizers and manipulators can be checked, "
                f"and `shields models verify {name}` looks at its weights"
            )
        if role == "recognizer" and lfw is None:
            raise ConfigError("a recognizer is checked on photos: --lfw FOLDER, or a tar")
        if role == "manipulator" and lfw is not None:
            raise ConfigError(f"--lfw is for recognizers, {name} is a manipulator; leave it out")
        network: Any = models.load(role, name, store=store, device=choose_device(device))
        if lfw is not None:
            _check_recognizer(network, lfw, pairs, as_json=as_json)
            return
        passed = _check_manipulator(network, size, condition, as_json=as_json)
    if not passed:
        raise typer.Exit(1)


def _check_recognizer(recognizer: Recognizer, source: Path, pairs: int, *, as_json: bool) -> None:
    from rich.progress import Progress

    from shields.models.verification import check_lfw

    with Progress(console=progress_console, transient=True) as bar:
        task = bar.add_task("embedding faces", total=None)
        found = check_lfw(
            recognizer, source, pairs=pairs,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        write_json(dataclasses.asdict(found))
        return
    _tell_verification(found)


def _tell_verification(found: Verification) -> None:
    from shields.models.verification import histogram_rows

    out.print(f"[bold]{plain(found.recognizer)}[/]: {plain(found.protocol)}")
    out.print(
        f"accuracy {found.accuracy:.4f} ± {found.accuracy_deviation:.4f} ({found.folds} folds, "
        f"threshold chosen on the others); best on all {found.best_accuracy:.4f} at a cosine of "
        f"{found.threshold:.3f}"
    )
    for rate in found.rates:
        out.print(
            f"at {rate.false_accepts:.1%} false accepts: {rate.true_accepts:.1%} true accepts, "
            f"threshold {rate.threshold:.3f}"
        )
    out.print(f"mean cosine: {found.genuine_mean:.3f} one person, {found.impostor_mean:.3f} two")
    rows = histogram_rows(found)
    most = max(max(same, other) for _, _, same, other in rows)
    out.print("cosine          one person (█), two people (░)")
    for low, high, same, other in rows:
        if same or other:
            bars = "█" * round(_BAR * same / most) + "░" * round(_BAR * other / most)
            out.print(f"{low:5.2f} .. {high:5.2f}  {bars}  {same} {other}")
    if found.failed:
        say(f"{len(found.failed)} photos could not be used, {found.lost} pairs with them:")
        for photo, reason in list(found.failed.items())[:5]:
            say(f"  {photo}: {reason}")


def _check_manipulator(network: Frozen, size: int, condition: str, *, as_json: bool) -> bool:
    import torch

    from shields.models.inspection import inspect
    from shields.models.manipulation import Manipulator

    if not isinstance(network, Manipulator):
        raise ConfigError(f"{network.name} is no manipulator but a {type(network).__name__}")
    rng = torch.Generator().manual_seed(0)
    found = inspect(network, size=size, condition=condition, rng=rng)
    if as_json:
        checks = [row._asdict() for row in found.checks]
        write_json({"name": found.name, "passed": found.passed, "checks": checks,
                    "seconds": found.seconds, "memory": found.memory})  # fmt: skip
        return found.passed
    for row in found.checks:
        mark = "[green]yes[/]" if row.passed else "[red]NO [/]"
        out.print(f"{mark} {plain(row.name)}{': ' if row.detail else ''}{plain(row.detail)}")
    out.print(
        f"forward and backward: {found.seconds:.2f} s, {found.memory / 2**20:.0f} MiB at the peak"
    )
    out.print("conditions: " + ", ".join(_conditions(network)), markup=False)
    return found.passed


def _conditions(network: Manipulator) -> list[str]:
    return list(network.conditions)


def convert(
    name: Annotated[str, typer.Argument(help="The card of the network, e.g. stargan.")],
    source: Annotated[Path, typer.Argument(help="The official file: .ckpt, .pt, .pth, .h5.")],
    target: Annotated[
        Path | None,
        typer.Argument(help="Where to write; where the card expects it if left out."),
    ] = None,
    weights_dir: WeightsDir = None,
    as_json: AsJson = False,
) -> None:
    """Check an official weights file and keep it as safetensors; nothing in it is run."""
    from shields.models.conversion import convert as run

    with errors(as_json=as_json):
        store = store_at(weights_dir)
        card = store.card(name)
        if target is None and not card.file.endswith(".safetensors"):
            raise ConfigError(f"{name!r} is used as published, in {card.file or card.repository}")
        written = run(card, source, target or store.cache() / card.file)
        if as_json:
            write_json({"name": name, "path": str(written)})
        else:
            out.print(f"{name}: {written}", markup=False)
