"""What a report asks of rows: which names there are, what each cell says, and what has held."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from robustness.metrics import Facts
from robustness.rows import Row, Run
from robustness.summary import Summary, summarise, worst_case

__all__ = ["UNPROTECTED", "Cell", "Results", "Verdict", "View", "direction", "handled", "named"]

#: the protector, the handling and the manipulator that do nothing
UNPROTECTED = "none"
#: what a protection is judged by, the most telling first: the part behind a metric's "@"
_PAIRS = ("source", "fair", "edits", "handled")
#: fields of a row that a change is taken within
_SAMPLE = ("photo", "condition", "seed")
#: photos from which on an interval is believed
_FEW = 5

Verdict = Literal["holds", "not shown", "harms", "unknown"]
_Key = tuple[str, str, str, str]


def direction(facts: Facts) -> str:
    """Which end of a metric is better for the person in the photo, in words."""
    if facts.higher is None:
        return "neither end is better"
    return f"{'higher' if facts.higher else 'lower'} is better"


@dataclass(frozen=True, kw_only=True)
class View:
    """A metric and the network that forges: what one table or one heat map shows."""

    metric: str
    manipulator: str

    @property
    def pair(self) -> str:
        """Which two images are compared."""
        return self.metric.rpartition("@")[2]

    @property
    def title(self) -> str:
        """The view in a few words."""
        forged = self.manipulator != UNPROTECTED
        return f"{self.metric}, forged by {self.manipulator}" if forged else self.metric


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A mean, its 95 % interval, and what is absent from it; None where there is none."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    #: values in the mean
    n: int = 0
    #: different photos that they come from
    photos: int = 0
    #: rows that hold no number
    missing: int = 0
    #: infinite values, which are not in the mean
    infinite: int = 0
    #: why numbers are missing
    reasons: tuple[str, ...] = ()
    #: whether it is one number about all photos together
    whole: bool = False
    #: the handling that was most often the worst, in a worst-case cell
    attack: str = ""

    @classmethod
    def of(cls, summary: Summary, rows: Sequence[Row], attack: str = "") -> Cell:
        """Take over the summary of rows; NaN, which stands there for nothing, becomes None."""
        mean, low, high = (
            None if math.isnan(value) else value
            for value in (summary.mean, summary.low, summary.high)
        )
        return cls(
            mean=mean, low=low, high=high, n=summary.n, photos=summary.photos,
            missing=summary.missing, infinite=summary.infinite,
            reasons=tuple(dict.fromkeys(_reason(row) for row in rows if not _known(row))),
            whole=rows[0].photo == "*", attack=attack,
        )  # fmt: skip


def named(protector: str) -> str:
    """How a protector is called on the page."""
    return "unprotected" if protector == UNPROTECTED else protector


def handled(attack: str) -> str:
    """How a handling is called on the page."""
    return "unhandled" if attack == UNPROTECTED else attack


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in the order of appearance, the one that does nothing first."""
    return tuple(sorted(dict.fromkeys(names), key=lambda name: name != UNPROTECTED))


def _key(row: Row) -> _Key:
    return row.metric, row.manipulator, row.protector, row.attack


def _known(row: Row) -> bool:
    return row.value is not None and not math.isnan(row.value)


def _reason(row: Row) -> str:
    return row.error or "no number came out, and no reason was recorded"


class Results:
    """The rows of a run, by view, protector and attack."""

    def __init__(self, run: Run, rows: Sequence[Row]) -> None:
        self.run, self.rows = run, rows
        self.protectors = _ordered(row.protector for row in rows)
        self.attacks = _ordered(row.attack for row in rows)
        self.photos = tuple(dict.fromkeys(row.photo for row in rows if row.photo != "*"))
        self.forgers = _ordered(row.manipulator for row in rows if row.manipulator != UNPROTECTED)
        self.conditions = tuple(dict.fromkeys(row.condition for row in rows if row.condition))
        self.seeds = tuple(sorted({row.seed for row in rows}))
        #: rows without a number
        self.missing = [row for row in rows if not _known(row)]
        self._groups: dict[_Key, list[Row]] = {}
        for row in rows:
            self._groups.setdefault(_key(row), []).append(row)
        self._verdicts: dict[tuple[View, str, str], Verdict] = {}

    def facts(self, metric: str) -> Facts:
        """What the metric's number means, as the run recorded it."""
        known = self.run.metrics.get(metric, {})
        names = [field.name for field in dataclasses.fields(Facts)]
        unknown = Facts(higher=None, low=-math.inf, high=math.inf, unit="", summary="")
        return dataclasses.replace(unknown, **{key: known[key] for key in names if key in known})

    @cached_property
    def _all_views(self) -> list[View]:
        found = dict.fromkeys((metric, manipulator) for metric, manipulator, _, _ in self._groups)
        return [View(metric=metric, manipulator=manipulator) for metric, manipulator in found]

    @property
    def fidelity(self) -> list[View]:
        """What protecting costs: protected against clean, before anything else."""
        return [view for view in self._all_views if view.pair == "photo"]

    @cached_property
    def views(self) -> list[View]:
        """What else was measured, the most telling pair first, then in the suite's order."""
        measured = {key[:2] for key, rows in self._groups.items() if any(map(_known, rows))}
        pairs = {pair: place for place, pair in enumerate(_PAIRS)}
        order = {metric: place for place, metric in enumerate(dict.fromkeys(
            view.metric for view in self._all_views))}  # fmt: skip
        return sorted(
            (
                view
                for view in self._all_views
                if view.pair != "photo" and (view.metric, view.manipulator) in measured
            ),
            key=lambda view: (pairs.get(view.pair, len(pairs)), order[view.metric]),
        )

    @cached_property
    def judged(self) -> list[View]:
        """The views of which one end is better for the person in the photo."""
        return [view for view in self.views if self.facts(view.metric).higher is not None]

    @property
    def headlines(self) -> list[View]:
        """The most telling metric, by each network that forges: what the words are about."""
        return [view for view in self.judged if view.metric == self.judged[0].metric]

    def _rows(self, view: View, protector: str, attack: str) -> list[Row]:
        return self._groups.get((view.metric, view.manipulator, protector, attack), [])

    @cached_property
    def _cells(self) -> dict[_Key, Cell]:
        summaries = summarise(self.rows, ("metric", "manipulator", "protector", "attack"))
        return {
            key: Cell.of(summary, self._groups[key])
            for key, summary in zip(self._groups, summaries, strict=True)
        }

    def cell(self, view: View, protector: str, attack: str) -> Cell:
        """The mean of one cell."""
        return self._cells.get((view.metric, view.manipulator, protector, attack), Cell())

    @cached_property
    def _worst(self) -> dict[tuple[View, str], Cell]:
        return {
            (view, protector): self._worst_cell(view, protector)
            for view in self.judged
            for protector in self.protectors
        }

    def worst(self, view: View, protector: str) -> Cell:
        """Each photo's worst value over all handlings, averaged, with the usual culprit."""
        return self._worst.get((view, protector), Cell())

    def _worst_cell(self, view: View, protector: str) -> Cell:
        facts = self.facts(view.metric)
        own = [row for attack in self.attacks for row in self._rows(view, protector, attack)]
        if not own:
            return Cell()
        (summary,) = worst_case(own, view.metric, facts)
        worst: dict[tuple[str, ...], tuple[float, str]] = {}
        for row in own:
            if row.value is None or math.isnan(row.value):
                continue
            sample = tuple(str(getattr(row, name)) for name in _SAMPLE)
            # Turned so that less is worse, whichever end is better.
            left = row.value if facts.higher else -row.value
            worst[sample] = min(worst.get(sample, (math.inf, row.attack)), (left, row.attack),
                                key=lambda found: found[0])  # fmt: skip
        culprit = Counter(attack for _, attack in worst.values()).most_common(1)
        return Cell.of(summary, own, culprit[0][0] if culprit else "")

    def changes(self, view: View, protector: str, attack: str) -> list[Row]:
        """What a protection changes, row by row: against the unprotected photo handled alike."""
        without = {
            tuple(getattr(row, name) for name in _SAMPLE): row.value
            for row in self._rows(view, UNPROTECTED, attack)
        }
        changes = []
        for row in self._rows(view, protector, attack):
            bare = without.get(tuple(getattr(row, name) for name in _SAMPLE))
            if row.value is not None and bare is not None:
                # Two infinite values, as the PSNR of equal images is, are no change.
                value = 0.0 if row.value == bare else row.value - bare
                changes.append(dataclasses.replace(row, value=value))
        return changes

    def verdict(self, view: View, protector: str, attack: str) -> Verdict:
        """Whether a protection is shown to hold: the interval of its change must exclude 0."""
        key = view, protector, attack
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(*key)
        return self._verdicts[key]

    def _judge(self, view: View, protector: str, attack: str) -> Verdict:
        higher = self.facts(view.metric).higher
        changes = self.changes(view, protector, attack)
        # An interval from fewer photos covers far less than it says.
        if higher is None or len({row.photo for row in changes}) < _FEW:
            return "unknown"
        (change,) = summarise(changes, ("metric",))
        if change.n == 0:
            # All are infinite: unprotected, nothing changes at all, and PSNR has no end.
            rises, falls = change.mean > 0, change.mean < 0
        elif math.isnan(change.low):
            return "unknown"
        else:
            rises, falls = change.low > 0, change.high < 0
        better, worse = (rises, falls) if higher else (falls, rises)
        return "holds" if better else "harms" if worse else "not shown"

    def left(self, view: View, protector: str, attack: str) -> float | None:
        """Share of the unhandled change that a handling leaves; None where that says nothing."""
        if self.verdict(view, protector, UNPROTECTED) != "holds":
            return None
        before, after = (
            [row.value for row in self.changes(view, protector, name) if row.value is not None]
            for name in (UNPROTECTED, attack)
        )
        if not after or not all(map(math.isfinite, before + after)):
            return None
        return (sum(after) / len(after)) / (sum(before) / len(before))

    @cached_property
    def failures(self) -> list[tuple[str, str, int]]:
        """Metric, reason and number of rows of everything that holds no number."""
        counts = Counter((row.metric, _reason(row)) for row in self.missing)
        return [(metric, reason, count) for (metric, reason), count in counts.most_common()]
