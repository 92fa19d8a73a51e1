"""`shields protect`: from options to finished files, with progress on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import shields
from shields.batch import Batch, Outcome, Writing, made_from, process_all
from shields.cli_common import fail, out, plain, progress_console, say, store_at, warn, write_json
from shields.cli_verify import lpips, rows, table
from shields.errors import ConfigError, OutputError
from shields.files import aside
from shields.folders import Job, check_writable, plan
from shields.photo import WRITABLE
from shields.protectors import PROTECTORS
from shields.protectors.base import Protector, ProtectorConfig
from shields.registry import did_you_mean
from shields.shield import RegionMode, Shield, choose_device
from shields.spread import Workers

if TYPE_CHECKING:
    from shields.types import Progress as OnStep
    from shields.weights import WeightStore

__all__ = ["Request", "configure", "run"]

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Request:
    """The command's options as they were given."""

    photos: Sequence[str]
    out: Path | None
    method: str
    preset: str | None
    settings: Sequence[str]
    levels: float | None
    steps: int | None
    seed: int
    region: RegionMode
    size: int
    robust: bool
    stealth: bool
    networks: dict[str, str]
    format: str | None
    quality: int | None
    keep_metadata: bool
    sheet: Path | None
    report: Path | None
    overwrite: bool
    max_pixels: int | None
    weights_dir: Path | None
    device: str
    as_json: bool
    quiet: bool


def configure(
    method: str,
    *,
    preset: str | None = None,
    settings: Sequence[str] = (),
    levels: float | None = None,
    steps: int | None = None,
    robust: bool = False,
    stealth: bool = False,
) -> ProtectorConfig:
    """Build a method's config from what the command line offers.

    Raises:
        UnknownName: There is no such method.
        ConfigError: No such preset or setting, or an impossible value.
    """
    kind = PROTECTORS[method].Config
    presets = kind.presets()
    if preset is not None and preset not in presets:
        raise ConfigError(f"{method} has no preset {preset!r}; {did_you_mean(preset, presets)}")
    config: ProtectorConfig = kind() if preset is None else presets[preset]()
    if robust:
        hardened = getattr(config, "hardened", None)
        if hardened is None:
            raise ConfigError(f"{method} takes no --robust: its loop is not ours")
        config = hardened()
    # What was asked for by name comes last, so that it wins over --robust.
    texts: dict[str, str] = {"stealth": "true"} if stealth else {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set wants NAME=VALUE, got {setting!r}")
        texts[name.strip()] = value.strip()
    for name, number in (("levels", levels), ("steps", steps)):
        if number is not None and name in texts:
            raise ConfigError(f"--{name} and --set {name}=… were both given; leave one out")
        if number is not None:
            texts[name] = str(number)
    return config.with_settings(texts)


def _format(request: Request) -> str:
    """The results' suffix, from --format or from the name that --out gives."""
    named = "" if request.out is None or request.out.is_dir() else request.out.suffix.lower()
    known = {suffix: suffix.lstrip(".") for suffix in WRITABLE} | {".jpeg": "jpg"}
    wanted = known.get(named, "png") if request.format is None else request.format
    if known.get(named, wanted) != wanted:
        raise ConfigError(f"--format {wanted} does not fit --out {request.out}")
    if request.quality is not None and wanted != "jpg":
        raise ConfigError(f"--quality is for --format jpg; {wanted} is lossless, leave it out")
    return named if named in known else f".{wanted}"


def _warnings(config: ProtectorConfig, suffix: str, request: Request) -> Iterator[str]:
    step = getattr(config, "step", None)
    # A single step, as FGSM has it, is meant to end at the bounds.
    walks = getattr(config, "steps", 1) > 1
    if walks and config.norm == "linf" and step is not None and step > config.levels > 0:
        yield (
            f"a step of {step:g} levels is longer than the budget of {config.levels:g}: "
            "values will jump from bound to bound; try --set step="
            f"{config.levels / 8:g}"
        )
    if config.levels < 1 and config.norm != "none":
        yield "files hold whole levels: a budget under 1 level leaves the photo as it is"
    if suffix in {".jpg", ".jpeg"}:
        yield (
            "JPEG rewrites every pixel: part of the protection is lost and no budget holds; "
            "what is left is measured. PNG and WebP keep everything"
        )
    if request.keep_metadata:
        yield "metadata is kept, the place where the photo was taken included"


def _shield(request: Request, config: ProtectorConfig, store: WeightStore) -> Shield:
    from shields import models, protectors

    device = choose_device(request.device)
    protector = protectors.load(
        request.method, config, networks=request.networks, store=store, device=device
    )
    detector = None
    # A whole photo needs no faces, unless the method compares them.
    if request.region != "photo" or "recognizer" in _networks(protector):
        detector = models.load("detector", "mtcnn", store=store, device=device)
    return Shield(
        protector,
        detector=detector,
        region=request.region,
        size=request.size,
        seed=request.seed,
        device=device,
        method=request.method,
    )


def _networks(protector: Protector) -> dict[str, str]:
    """Role -> name of every network that the protector holds."""
    held = vars(protector)
    return {
        role: str(getattr(held[role], "name", "") or type(held[role]).__name__)
        for role in protector.NETWORKS
        if held.get(role) is not None
    }


def _batch(request: Request, jobs: Sequence[Job]) -> Batch:
    """Load all that a request needs."""
    config = configure(
        request.method,
        preset=request.preset,
        settings=request.settings,
        levels=request.levels,
        steps=request.steps,
        robust=request.robust,
        stealth=request.stealth,
    )
    store = store_at(request.weights_dir)
    shield = _shield(request, config, store)
    settings: dict[str, Any] = {
        "method": request.method,
        "preset": request.preset,
        "config": config.to_dict(),
        "networks": _networks(shield.protector),
        "seed": request.seed,
        "region": request.region,
        "size": request.size,
        "format": _format(request),
        "quality": request.quality,
        "keep_metadata": request.keep_metadata,
    }
    perceptual, no_lpips = lpips(store, shield.device)
    return Batch(
        shield,
        run=settings,
        writing=Writing(
            quality=request.quality,
            keep_metadata=request.keep_metadata,
            max_pixels=request.max_pixels,
            sheet=request.sheet,
            overwrite=request.overwrite,
        ),
        originals=[job.source for job in jobs],
        perceptual=perceptual,
        lpips_missing=no_lpips,
    )


def run(request: Request, workers: Workers | None = None) -> int:
    """Protect everything and return the exit status.

    Args:
        request: What is to be done.
        workers: Who does it; this process where left out.

    Raises:
        ShieldsError: The request cannot be met as it stands; no photo was touched.
    """
    began = time.perf_counter()
    suffix = _format(request)
    jobs = plan(request.photos, request.out, suffix=suffix, made_from=made_from)
    batch = _batch(request, jobs)
    _check_places(request, jobs)
    if not request.quiet:
        for text in _warnings(batch.shield.protector.config, suffix, request):
            warn(text)
    device = str(batch.shield.device)
    if workers is not None:
        device = workers.device(device)
        request = dataclasses.replace(request, device=device)
    outcomes, interrupted = _work(batch, jobs, request, workers)
    counts = Counter(outcome.status for outcome in outcomes)
    summary = {
        **{status: counts[status] for status in ("protected", "skipped", "failed")},
        "of": len(jobs),
        "interrupted": interrupted,
        "seconds": round(time.perf_counter() - began, 3),
    }
    document = {
        "shields": shields.__version__,
        "device": device,
        "run": batch.run,
        "photos": [outcome.to_dict() for outcome in outcomes],
        "summary": summary,
    }
    if request.report is not None:
        _write_report(request.report, document)
    if request.as_json:
        write_json(document)
    elif not request.quiet:
        _summarise(outcomes, summary, single=len(jobs) == 1)
    if interrupted:
        return _INTERRUPTED
    return 1 if counts["failed"] else 0


def _check_places(request: Request, jobs: Sequence[Job]) -> None:
    """Find out before the work begins whether everything can be written."""
    originals = {job.source.resolve() for job in jobs}
    for path in (request.sheet, request.report):
        if path is not None and path.resolve() in originals:
            raise ConfigError(f"{path} is an original and is never written over")
    if request.sheet is not None and request.sheet.suffix.lower() == ".png" and len(jobs) != 1:
        raise ConfigError(f"several photos need a folder for --sheet, not {request.sheet}")
    if request.report is not None:
        if request.report.suffix.lower() != ".json":
            raise ConfigError(f"--report wants the name of a .json file, got {request.report}")
        check_writable(request.report.parent)
    for root in {job.root for job in jobs}:
        check_writable(root)


def _write_report(path: Path, document: dict[str, Any]) -> None:
    try:
        with aside(path) as part:
            part.write_text(json.dumps(document, indent=2, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _outcomes(
    batch: Batch, jobs: Sequence[Job], request: Request, workers: Workers | None, bars: _Bars
) -> Iterator[Outcome]:
    """One photo after another, here or elsewhere."""
    if workers is None:
        return (batch.process(job, bars.photo(job.source)) for job in jobs)
    return process_all(partial(_batch, request, jobs), jobs, workers)


def _work(
    batch: Batch, jobs: Sequence[Job], request: Request, workers: Workers | None
) -> tuple[list[Outcome], bool]:
    """Go through the jobs; on Ctrl-C say where things stand and how to go on."""
    outcomes: list[Outcome] = []
    # Ray tells of processes that died on stdout, which is for results.
    with _bars(len(jobs), hidden=request.quiet) as bars, redirect_stdout(sys.stderr):
        try:
            for outcome in _outcomes(batch, jobs, request, workers, bars):
                outcomes.append(outcome)
                bars.done()
                if outcome.status == "failed":
                    fail(f"{outcome.job.source}: {outcome.error}")
                elif len(jobs) > 1 and not (request.quiet or request.as_json):
                    say(_line(outcome))
        except KeyboardInterrupt:
            pass
        else:
            return outcomes, False
    say(
        f"stopped: {len(outcomes)} of {len(jobs)} photos are finished and nothing is half-written; "
        "the same command goes on from here"
    )
    return outcomes, True


class _Bars:
    """One bar for photos, one for the steps of the present photo."""

    def __init__(self, progress: Progress, count: int) -> None:
        self.progress = progress
        self.photos = progress.add_task("photos", total=count, visible=count > 1)
        self.steps = progress.add_task("", total=None)

    def photo(self, path: Path) -> OnStep:
        """Begin with a photo; the callback moves the bar of its steps."""
        self.progress.reset(self.steps, total=None, description=path.name)

        def step(done: int, total: int, value: float) -> None:
            text = f"{path.name}  objective {value:.3f}"
            self.progress.update(self.steps, completed=done, total=total, description=text)

        return step

    def done(self) -> None:
        """Count a photo as finished."""
        self.progress.advance(self.photos)


@contextmanager
def _bars(count: int, *, hidden: bool) -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    disable = hidden or not progress_console.is_terminal
    with Progress(*columns, console=progress_console, transient=True, disable=disable) as progress:
        yield _Bars(progress, count)


def _line(outcome: Outcome) -> str:
    if outcome.status == "skipped":
        return f"{outcome.job.source}: done before, skipped"
    report = outcome.details["report"]
    faces = sum(region["face"] is not None for region in outcome.details["regions"])
    return (
        f"{outcome.job.source} -> {outcome.job.output}  faces {faces}, "
        f"change {report['largest_change']} of {report['allowed_change']} levels, "
        f"{outcome.details['seconds']:.1f} s"
    )


def _summarise(outcomes: Sequence[Outcome], summary: dict[str, Any], *, single: bool) -> None:
    if single and outcomes and outcomes[0].status != "failed":
        outcome = outcomes[0]
        title = "done before" if outcome.status == "skipped" else "protected"
        notes = [("note", note) for note in outcome.details["notes"]]
        lines = [*rows(outcome.details["report"]), *notes]
        out.print(table(f"{title}: {outcome.job.output}", lines))
        if outcome.details["sheet"]:
            out.print(plain(f"picture: {outcome.details['sheet']}"))
        return
    out.print(
        f"{summary['protected']} protected, {summary['skipped']} skipped, "
        f"{summary['failed']} failed of {summary['of']}, {summary['seconds']:.1f} s"
    )
