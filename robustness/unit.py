"""The work of a suite: one photo under one protector is a unit, and units know nothing of others.

`work` is a function of its unit alone, so that any engine can run units in any order and place.
What units share, such as the forgeries of the clean photo, they find in the store of images; and
what a finished unit came to is kept beside it, so that a run that was stopped goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from robustness.files import write_whole
from robustness.images import ImageStore, Stored, code_of, key_of
from robustness.judging import Look, measured
from robustness.rows import Row
from robustness.steps import beside, drawn, file_digest, forge, levels, square
from robustness.suite import Forging, Protection, Suite
from robustness.tools import CellError, Tools, explain, tools_for
from shields.errors import ConfigError, ImageError
from shields.models.manipulation import Editor
from shields.photo import read
from shields.types import Photo
from shields.weights import digest

__all__ = ["Cell", "Member", "Outcome", "Unit", "work"]

#: pixels whose metrics are computed together, so that a large photo does not fill the memory
_TOGETHER = 2**23
#: pairs that look at a forgery
_FORGED = ("edits", "fair", "source")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One photo under one protector: all that a worker has to be told."""

    suite: Suite
    photo: Path
    #: what the rows call the photo
    name: str
    protection: Protection
    #: where images are kept, shared by all units
    images: Path
    weights_dir: Path | None = None
    device: str = "cpu"
    #: why nobody can work on it, which all its rows then say
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What happens to a protected photo."""

    attack: str = "none"
    manipulator: str = "none"
    condition: str = ""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Member:
    """A photo's part in a number about all photos: files below the folder of images."""

    cell: Cell
    protector: str
    metric: str
    image: str = ""
    other: str = ""
    clean: str = ""
    #: why the photo takes no part
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a unit came to."""

    rows: list[Row]
    members: list[Member] = field(default_factory=list)
    #: images for the report: what they show, and their files below the folder of images
    pictures: list[dict[str, Any]] = field(default_factory=list)
    #: metric and pair -> what the number means
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: card -> SHA-256
    weights: dict[str, str] = field(default_factory=dict)


#: called with (attacks done, attacks in all)
OnAttack = Callable[[int, int], None]


def work(unit: Unit, on_attack: OnAttack | None = None) -> Outcome:
    """Compute all rows of a unit; whatever fails becomes a row that says why."""
    return _Work(unit, tools_for(unit.weights_dir, unit.device)).run(on_attack)


class _Work:
    """A unit while it is worked on."""

    def __init__(self, unit: Unit, tools: Tools) -> None:
        self.unit, self.suite, self.tools = unit, unit.suite, tools
        self.store = ImageStore(unit.images)
        self.forgings = [f for f in self.suite.manipulators if f.meets(unit.protection.label)]
        self.rows: dict[int, Row] = {}
        self.members: list[Member] = []
        self.pictures: list[dict[str, Any]] = []
        self.looks: list[Look] = []
        self.place, self.whole = 0, True

    def run(self, on_attack: OnAttack | None) -> Outcome:
        """All cells, or what is known of them from before."""
        kept = None if self.unit.problem else self._kept()
        if kept is not None and (known := _recall(kept)) is not None:
            return known
        turns = [(attack, seed) for attack in self.suite.attacks for seed in self.suite.seeds]
        try:
            if self.unit.problem:
                raise CellError(self.unit.problem)
            self.clean = self._clean()
            self.protected = self._protected()
        except Exception as error:  # a photo, or a protector, that cannot be used
            self._fail_all(turns, explain(error))
        else:
            self._picture("clean", self.clean, Cell(), protector="none")
            self._picture("protected", self.protected, Cell())
            self._look(Cell(), ("photo",), self.protected, {"photo": self.clean})
            for done, (attack, seed) in enumerate(turns):
                self._attack(attack, seed)
                if on_attack is not None:
                    on_attack(done + 1, len(turns))
            self._measure()
        outcome = Outcome(
            rows=[self.rows[place] for place in sorted(self.rows)],
            members=self.members,
            pictures=self.pictures,
            metrics=self._facts(),
            weights=self.tools.weights(),
        )
        if kept is not None and self.whole:
            write_whole(kept, json.dumps(dataclasses.asdict(outcome)).encode())
        return outcome

    # --- what is kept of a finished unit ---------------------------------------------------------

    def _kept(self) -> Path | None:
        """Where the outcome is kept; None where a part cannot be loaded, which fails in its cells.

        The name tells of everything that decides the rows, networks included.
        """
        unit, suite = self.unit, self.suite
        try:
            parts: list[object] = [self.tools.measure(metric)[0] for metric in suite.metrics]
            parts += [self.tools.handling(attack) for attack in suite.attacks]
            parts += [self.tools.forger(forging) for forging in self.forgings]
            files = [digest(unit.photo)]
            if unit.protection.method:
                parts.append(self.tools.shield(unit.protection, suite.seed).protector)
            elif unit.protection.folder is not None:
                files.append(digest(beside(unit.protection.folder, unit.photo)))
        except (CellError, OSError, ImageError):
            return None
        settings = {
            "suite": suite.digest, "name": unit.name, "protection": unit.protection.to_dict(),
            "forgings": [self.tools.settings_of(forging) for forging in self.forgings],
            "code": [code_of(metric.rpartition("@")[0]) for metric in suite.metrics],
        }  # fmt: skip
        key = key_of(
            "unit", files, settings=settings, weights=self.tools.marks_of(*parts), seed=suite.seed
        )
        return unit.images / "units" / f"{key}.json"

    # --- images ----------------------------------------------------------------------------------

    def _clean(self) -> Stored:
        source, size = self.unit.photo, self.suite.size
        key = key_of("photo", [file_digest(source)], settings={"size": size})

        def build() -> np.ndarray:
            pixels = read(source).pixels
            return pixels if size is None else square(pixels, size)

        return self.store.make(key, build)

    def _protected(self) -> Stored:
        protection, suite = self.unit.protection, self.suite
        if protection.folder is not None:
            return self._from_files(protection.folder)
        if protection.label == "none":
            return self.clean
        shield = self.tools.shield(protection, suite.seed)
        settings = {
            "method": protection.method, "config": shield.protector.config.to_dict(),
            "region": shield.region, "size": shield.size, "aware": protection.aware,
        }  # fmt: skip
        key = key_of(
            "protect", [self.clean.digest], settings=settings,
            weights=self.tools.marks_of(shield.protector), seed=suite.seed,
        )  # fmt: skip
        photo = Photo(pixels=self.clean.pixels, path=self.unit.photo)
        return self.store.make(key, lambda: shield.protect(photo).pixels)

    def _from_files(self, folder: Path) -> Stored:
        source = beside(folder, self.unit.photo)
        key = key_of("photo", [file_digest(source)], settings={"size": None})
        stored = self.store.make(key, lambda: read(source).pixels)
        if stored.pixels.shape != self.clean.pixels.shape:
            (height, width), (high, wide) = stored.pixels.shape[:2], self.clean.pixels.shape[:2]
            raise ImageError(
                f"{source} is {width}x{height}, the photo is {wide}x{high} here; a protected photo "
                "keeps its size (leave `size` out of the suite, or protect at that size)"
            )
        return stored

    def _handled(self, image: Stored, attack: str, seed: int) -> Stored:
        if attack == "none":
            return image
        handling, seed = self.tools.handling(attack), drawn(seed, self.clean.digest)
        key = key_of(
            "handle", [image.digest], settings={"text": str(handling)},
            weights=self.tools.marks_of(handling), seed=seed,
        )  # fmt: skip
        return self.store.make(key, lambda: handling.apply(image.pixels, seed=seed))

    def _forged(self, image: Stored, forging: Forging, cell: Cell) -> Stored:
        forger = self.tools.forger(forging)
        sampled = isinstance(forger, Editor)
        if sampled and not cell.condition:
            raise ConfigError(
                f"the editor {forging.name!r} needs a prompt: write "
                f"{{name: {forging.name}, conditions: [what to do]}}"
            )
        key = key_of(
            "forge", [image.digest],
            settings={**self.tools.settings_of(forging), "condition": cell.condition},
            weights=self.tools.marks_of(forger), seed=cell.seed if sampled else None,
        )  # fmt: skip
        device = self.tools.device
        return self.store.make(
            key, lambda: levels(forge(forger, image.image(device), cell.condition, cell.seed))
        )

    # --- cells -----------------------------------------------------------------------------------

    def _attack(self, attack: str, seed: int) -> None:
        """Handle, forge, and note what is to be measured."""
        cell = Cell(attack=attack, seed=seed)
        try:
            handled = self._handled(self.protected, attack, seed)
        except Exception as error:  # of a purifier: anything
            for each in self._cells(attack, seed):
                self._fail(each, explain(error))
            return
        if attack != "none":
            self._picture("handled", handled, cell)
        self._look(cell, ("handled",), handled, {"handled": self.clean})
        for forging in self.forgings:
            for forged in self._cells(attack, seed, forging):
                self._forge(forged, forging, handled)
        if sum(look.image.pixels.size for look in self.looks) > 3 * _TOGETHER:
            self._measure()

    def _cells(self, attack: str, seed: int, *forgings: Forging) -> Iterator[Cell]:
        """The cells of some manipulators; without one the unforged and those of all."""
        if not forgings:
            yield Cell(attack=attack, seed=seed)
        for forging in forgings or self.forgings:
            for condition in self.tools.conditions(forging):
                yield Cell(attack=attack, manipulator=forging.name, condition=condition, seed=seed)

    def _forge(self, cell: Cell, forging: Forging, handled: Stored) -> None:
        wanted = {metric.rpartition("@")[2] for metric in self.suite.metrics}
        others: dict[str, Stored] = {"source": self.clean}
        try:
            forged = self._forged(handled, forging, cell)
            others["edits"] = self._forged(self.clean, forging, cell)
            if "fair" in wanted:
                clean = self._handled(self.clean, cell.attack, cell.seed)
                others["fair"] = self._forged(clean, forging, cell)
        except Exception as error:  # of a network, or of a prompt
            self._fail(cell, explain(error))
            return
        alone = dataclasses.replace(cell, attack="none")
        self._picture("forged-clean", others["edits"], alone, protector="none")
        if self.unit.protection.label != "none" or cell.attack != "none":
            self._picture("forged", forged, cell)
        self._look(cell, _FORGED, forged, others)

    def _look(
        self, cell: Cell, pairs: Sequence[str], image: Stored, others: Mapping[str, Stored]
    ) -> None:
        """Ask for the metrics of some pairs; they are computed together, later."""
        described = {
            (forging.name, prompt): text
            for forging in self.suite.manipulators
            for prompt, text in forging.descriptions
        }
        for metric in self._metrics(pairs):
            other = others[metric.rpartition("@")[2]]
            if self.tools.about_sets(metric):
                files = (self._file(stored) for stored in (image, other, self.clean))
                self.members.append(self._member(cell, metric, *files))
                continue
            look = Look(
                place=self.place, metric=metric, condition=cell.condition, image=image, other=other,
                description=described.get((cell.manipulator, cell.condition), ""),
            )  # fmt: skip
            self.looks.append(look)
            self._add(cell, metric, seconds=image.seconds)

    def _metrics(self, pairs: Sequence[str]) -> list[str]:
        return [metric for metric in self.suite.metrics if metric.rpartition("@")[2] in pairs]

    def _measure(self) -> None:
        """Compute what was asked for, and let go of the images."""
        if not self.looks:
            return
        for place, value, error in measured(self.looks, self.clean, self.tools):
            self.whole &= value is not None
            number = None if value is None or math.isnan(value) else value
            self.rows[place] = dataclasses.replace(self.rows[place], value=number, error=error)
        self.looks = []

    # --- what comes out --------------------------------------------------------------------------

    def _add(self, cell: Cell, metric: str, error: str = "", seconds: float = 0.0) -> None:
        self.rows[self.place] = Row(
            photo=self.unit.name, protector=self.unit.protection.label, **dataclasses.asdict(cell),
            metric=metric, value=None, error=error, seconds=seconds,
        )  # fmt: skip
        self.place += 1

    def _fail(self, cell: Cell, error: str) -> None:
        """Say in every row of a cell why it has no value."""
        self.whole = False
        pairs = ("handled",) if cell.manipulator == "none" else _FORGED
        for metric in self._metrics(pairs):
            if self.tools.about_sets(metric):
                self.members.append(self._member(cell, metric, error=error))
            else:
                self._add(cell, metric, error)

    def _fail_all(self, turns: Sequence[tuple[str, int]], error: str) -> None:
        for metric in self._metrics(("photo",)):
            if not self.tools.about_sets(metric):
                self._add(Cell(), metric, error)
        for attack, seed in turns:
            for cell in self._cells(attack, seed):
                self._fail(cell, error)

    def _member(self, cell: Cell, metric: str, *files: str, error: str = "") -> Member:
        names = dict(zip(("image", "other", "clean"), files, strict=False))
        label = self.unit.protection.label
        return Member(cell=cell, protector=label, metric=metric, error=error, **names)

    def _file(self, stored: Stored) -> str:
        return stored.path.relative_to(self.unit.images).as_posix()

    def _picture(self, kind: str, stored: Stored, cell: Cell, protector: str = "") -> None:
        head = {"photo": self.unit.name, "protector": protector or self.unit.protection.label}
        entry = {**head, **dataclasses.asdict(cell), "kind": kind, "file": self._file(stored)}
        if entry not in self.pictures:
            self.pictures.append(entry)

    def _facts(self) -> dict[str, dict[str, Any]]:
        found = {}
        for metric in self.suite.metrics:
            try:
                measure, pair = self.tools.measure(metric)
            except CellError:
                continue
            found[metric] = dataclasses.asdict(measure.facts(pair))
        return found


def _recall(path: Path) -> Outcome | None:
    """What a unit came to before; None where there is nothing, or an image of it is gone."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    members = [Member(**{**each, "cell": Cell(**each["cell"])}) for each in values["members"]]
    if not all((path.parents[1] / each["file"]).is_file() for each in values["pictures"]):
        return None
    rows = [Row(**row) for row in values["rows"]]
    return Outcome(**{**values, "rows": rows, "members": members})
