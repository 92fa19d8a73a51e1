"""A suite from its settings to the rows on disk.

Units are worked through by an engine: a function from units to their outcomes. The one here is a
loop; another may spread the units over machines, since nothing but the folder of images is shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage

import shields
from robustness.files import write_whole
from robustness.metrics import Scene, SetMeasure
from robustness.rows import Row, Run, save
from robustness.suite import Suite
from robustness.tools import Tools, explain, tools_for
from robustness.unit import Cell, Member, OnAttack, Outcome, Unit, work
from shields.errors import MissingPackage
from shields.folders import check_writable
from shields.provenance import hardware, revision
from shields.types import Image, Photo

__all__ = ["Engine", "Place", "run_suite", "serial"]

#: packages whose versions decide numbers
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "torchmetrics", "diffusers", "transformers")

#: (units, called when a unit has done so many attacks of so many) -> their outcomes, in order
Engine = Callable[[Sequence[Unit], OnAttack], Iterable[Outcome]]
#: called with (units done, units in all, share of the present unit, name of its photo)
OnUnit = Callable[[int, int, float, str], None]


def serial(units: Sequence[Unit], on_attack: OnAttack) -> Iterator[Outcome]:
    """One unit after another in this process."""
    for unit in units:
        yield work(unit, on_attack)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a suite is run, and where its results go."""

    out: Path
    weights_dir: Path | None = None
    device: str = "cpu"

    @property
    def images(self) -> Path:
        """The folder of images."""
        return self.out / "images"


def run_suite(
    suite: Suite,
    place: Place,
    *,
    command: str = "",
    engine: Engine = serial,
    progress: OnUnit | None = None,
) -> tuple[Run, list[Row]]:
    """Compute all rows and write `rows.json`, `rows.parquet` and `pictures.json`.

    Args:
        suite: What is run.
        place: Where; images that are there already are used.
        command: What was typed.
        engine: What works the units off.
        progress: Called as work goes on.

    Raises:
        ConfigError: The photos are not there.
        OutputError: The folder cannot be written to.
    """
    began, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    check_writable(place.images)
    units = _units(suite, place)
    rows: list[Row] = []
    members: list[Member] = []
    pictures: dict[str, dict[str, Any]] = {}
    metrics: dict[str, dict[str, Any]] = {}
    weights: dict[str, str] = {}
    seen = _Seen(units, progress)
    for outcome in engine(units, seen.attack):
        rows += outcome.rows
        members += outcome.members
        pictures |= {json.dumps(entry): entry for entry in outcome.pictures}
        metrics |= outcome.metrics
        weights |= outcome.weights
        seen.unit()
    rows += _about_sets(members, place, tools_for(place.weights_dir, place.device))
    run = Run(
        name=suite.name,
        command=command,
        settings=json.loads(json.dumps(suite.to_dict(), default=str)),
        seed=suite.seed,
        started=started,
        seconds=round(time.perf_counter() - began, 2),
        commit=revision(),
        hardware=hardware(),
        versions=_versions(),
        metrics=metrics,
        weights=weights,
    )
    _write(place, run, rows, list(pictures.values()))
    return run, rows


class _Seen:
    """Counts units for the progress."""

    def __init__(self, units: Sequence[Unit], progress: OnUnit | None) -> None:
        self.units, self.progress, self.done = units, progress, 0
        self._tell(0.0)

    def attack(self, done: int, total: int) -> None:
        """So many attacks of the present unit are done."""
        self._tell(done / max(total, 1))

    def unit(self) -> None:
        """A unit is done."""
        self.done += 1
        self._tell(0.0)

    def _tell(self, share: float) -> None:
        if self.progress is not None:
            name = self.units[min(self.done, len(self.units) - 1)].name
            self.progress(self.done, len(self.units), share, name)


def _units(suite: Suite, place: Place) -> list[Unit]:
    """Photo by photo, the unprotected one first: the others compare with what it leaves."""
    files = suite.files(place.out)
    counts = Counter(path.name for path in files)
    return [
        Unit(
            suite=suite, photo=path, protection=protection, images=place.images,
            name=path.name if counts[path.name] == 1 else path.as_posix(),
            weights_dir=place.weights_dir, device=place.device,
        )
        for path in files
        for protection in suite.protectors
    ]  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"python": sys.version.partition(" ")[0], "shields": shields.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


# --- numbers about all photos --------------------------------------------------------------------


def _about_sets(members: Sequence[Member], place: Place, tools: Tools) -> list[Row]:
    """One row for each cell and each metric of sets; images are read again one by one."""
    groups: dict[tuple[str, Cell, str], list[Member]] = {}
    for member in members:
        groups.setdefault((member.protector, member.cell, member.metric), []).append(member)
    rows = []
    for (protector, cell, metric), group in groups.items():
        value, error = None, ""
        began = time.perf_counter()
        try:
            value = _total(metric, group, place, tools)
        except Exception as problem:  # of a network or a plug-in: anything
            error = explain(problem)
        rows.append(
            Row(
                photo="*", protector=protector, **dataclasses.asdict(cell), metric=metric,
                value=value, error=error, seconds=round(time.perf_counter() - began, 4),
            )
        )  # fmt: skip
    return rows


def _total(metric: str, members: Sequence[Member], place: Place, tools: Tools) -> float:
    measure, _ = tools.measure(metric)
    assert isinstance(measure, SetMeasure), "members are collected for these alone"
    total = measure.start()
    for member in members:
        if member.error:
            continue
        image, other, clean = (
            _opened(place.images / name, tools.device)
            for name in (member.image, member.other, member.clean)
        )
        landmarks = tools.landmarks(clean, member.clean)
        scene = Scene(
            clean=clean, keys=(member.other,), landmarks=landmarks, prompt=member.cell.condition
        )
        total.add(image, other, scene)
    return total.value()


def _opened(path: Path, device: torch.device) -> Image:
    with PillowImage.open(path) as image:
        return Photo(pixels=np.array(image.convert("RGB"))).image(device)


# --- files ---------------------------------------------------------------------------------------


def _write(place: Place, run: Run, rows: Sequence[Row], pictures: Sequence[dict[str, Any]]) -> None:
    save(place.out / "rows.json", run, rows)
    with contextlib.suppress(MissingPackage):  # an extra; the JSON holds the same
        save(place.out / "rows.parquet", run, rows)
    inside = place.images.name
    listed = [{**entry, "file": f"{inside}/{entry['file']}"} for entry in pictures]
    write_whole(place.out / "pictures.json", json.dumps(listed, indent=1).encode())
