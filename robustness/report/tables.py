"""Tables of a report: protectors across, one row a handling or a metric, best and second marked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from robustness.metrics import Facts
from robustness.report.results import (
    UNPROTECTED,
    Cell,
    Results,
    View,
    direction,
    handled,
    named,
)

__all__ = ["Entry", "Table", "TableRow", "cost", "number", "of_view", "worst_cases"]

Rank = Literal["", "best", "second"]


def number(value: float) -> str:
    """Write a number with about three figures.

    Example:
        >>> number(0.314159), number(31.4159), number(0.000314159), number(float("inf"))
        ('0.314', '31.4', '0.00031', '∞')
    """
    if math.isinf(value):
        return "∞" if value > 0 else "\N{MINUS SIGN}∞"
    size = abs(value)
    if 0 < size < 0.01:
        return f"{value:.2g}".replace("-", "\N{MINUS SIGN}")
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell as it is shown."""

    cell: Cell
    rank: Rank = ""
    #: numbers of the table's notes that say why something is absent
    notes: tuple[int, ...] = ()
    #: its sample, where that is not the table's
    sample: str = ""

    @property
    def text(self) -> str:
        """The mean, or that there is none."""
        return "absent" if self.cell.mean is None else number(self.cell.mean)

    @property
    def span(self) -> str:
        """The 95 % interval of the mean; empty where there is none."""
        if self.cell.low is None or self.cell.high is None:
            return ""
        return f"[{number(self.cell.low)}, {number(self.cell.high)}]"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of a table."""

    label: str
    #: what is said below the label, smaller
    hint: str = ""
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a page and its Markdown show as a table."""

    title: str
    corner: str
    #: how the numbers came about, below the title
    caption: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    #: why numbers are absent, by number from 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A row before notes and sample sizes are known for the whole table."""

    label: str
    facts: Facts
    cells: tuple[Cell, ...]
    hint: str = ""


def _ranks(columns: Sequence[str], line: _Line) -> list[Rank]:
    """Best and second among the protections; equal means share a mark."""
    protections = [
        cell.mean
        for name, cell in zip(columns, line.cells, strict=True)
        if name != UNPROTECTED and cell.mean is not None
    ]
    if line.facts.higher is None or len(protections) < 2:
        return [""] * len(columns)
    ranked = sorted(set(protections), reverse=line.facts.higher)
    marks: dict[float | None, Rank] = dict(zip(ranked, ("best", "second"), strict=False))
    return [
        "" if name == UNPROTECTED else marks.get(cell.mean, "")
        for name, cell in zip(columns, line.cells, strict=True)
    ]


def _sample(cell: Cell) -> str:
    """How many numbers a mean is made of."""
    if cell.whole:
        return "all photos at once"
    if cell.n == cell.photos:
        return f"n = {cell.n}"
    return f"n = {cell.n} from {cell.photos} photo{'' if cell.photos == 1 else 's'}"


def _entry(cell: Cell, rank: Rank, notes: Sequence[str], common: str) -> Entry:
    said = [_sample(cell)] if cell.mean is not None and _sample(cell) != common else []
    if cell.mean is not None and cell.missing:
        said.append(f"{cell.missing} absent")
    if cell.n and cell.infinite:
        said.append(f"{cell.infinite} infinite, left out")
    numbers = tuple(notes.index(reason) + 1 for reason in cell.reasons)
    return Entry(cell=cell, rank=rank, notes=numbers, sample=", ".join(said))


def _table(
    title: str, corner: str, about: str, columns: tuple[str, ...], lines: Sequence[_Line]
) -> Table:
    cells = [cell for line in lines for cell in line.cells]
    notes = tuple(dict.fromkeys(reason for cell in cells for reason in cell.reasons))
    samples = Counter(_sample(cell) for cell in cells if cell.mean is not None)
    usual = samples.most_common(1)[0][0] if samples else ""
    rest = ", unless said otherwise" if len(samples) > 1 else ""
    said = f"Mean [95 % bootstrap interval], {usual}{rest}." if usual else "Nothing was measured."
    return Table(
        title=title,
        corner=corner,
        caption=f"{about} {said}",
        columns=tuple(map(named, columns)),
        rows=tuple(_row(line, _ranks(columns, line), notes, usual) for line in lines),
        notes=notes,
    )


def _row(line: _Line, ranks: Sequence[Rank], notes: Sequence[str], usual: str) -> TableRow:
    """A line as it is shown; a sample that all its cells share is said once, below the label."""
    shared = {_sample(cell) for cell in line.cells if cell.mean is not None}
    common = shared.pop() if len(shared) == 1 else usual
    hints = [line.hint, common if common != usual else ""]
    return TableRow(
        label=line.label,
        hint=", ".join(hint for hint in hints if hint),
        entries=tuple(
            _entry(cell, rank, notes, common) for cell, rank in zip(line.cells, ranks, strict=True)
        ),
    )


def of_view(results: Results, view: View) -> Table:
    """Handlings down, protectors across, for one metric and one network that forges."""
    facts = results.facts(view.metric)
    lines = [
        _Line(
            label=handled(attack),
            facts=facts,
            cells=tuple(results.cell(view, name, attack) for name in results.protectors),
        )
        for attack in results.attacks
    ]
    unit = f" ({facts.unit})" if facts.unit else ""
    summary = f"{facts.summary.rstrip('.')}. " if facts.summary else ""
    about = f"{summary}{direction(facts).capitalize()} for the person in the photo{unit}."
    return _table(view.title, "handling", about, results.protectors, lines)


def worst_cases(results: Results) -> Table:
    """Each photo's worst value over all handlings, averaged: one row a view."""
    lines = [
        _Line(
            label=view.title,
            hint=direction(results.facts(view.metric)),
            facts=results.facts(view.metric),
            cells=tuple(results.worst(view, name) for name in results.protectors),
        )
        for view in results.judged
    ]
    about = (
        "For every photo the handling that leaves its protection worst, then the mean over "
        "photos; below it, the handling that was most often the worst."
    )
    return _table("Worst case of each photo", "metric", about, results.protectors, lines)


def cost(results: Results) -> Table:
    """What each protection does to the photo that its owner shares."""
    columns = tuple(name for name in results.protectors if name != UNPROTECTED)
    lines = [
        _Line(
            label=view.metric,
            hint=direction(results.facts(view.metric)),
            facts=results.facts(view.metric),
            cells=tuple(results.cell(view, name, UNPROTECTED) for name in columns),
        )
        for view in results.fidelity
    ]
    about = "The protected photo as it was saved, against the clean one."
    return _table("What protecting costs the photo", "metric", about, columns, lines)
