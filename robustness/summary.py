"""Rows to lines of a table: means with 95 % intervals, and the worst that handling does."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from robustness.metrics import Facts, bootstrap
from shields.errors import ConfigError

if TYPE_CHECKING:
    from robustness.rows import Row

__all__ = ["Summary", "summarise", "worst_case"]

Key = TypeVar("Key", bound=Hashable)

#: what a row can be grouped by
_FIELDS = ("photo", "protector", "attack", "manipulator", "condition", "seed", "metric")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One line of a table."""

    #: field -> value, as text, of what the line is about
    group: dict[str, str]
    #: of the finite values; infinite where all are (PSNR of equal images), NaN where there is none
    mean: float
    #: 95 % interval of the mean, photos drawn anew; NaN where fewer than two photos tell
    low: float
    high: float
    #: values in the mean
    n: int
    #: different photos they come from
    photos: int
    #: values that could not be computed
    missing: int
    #: infinite values, which no mean includes
    infinite: int
    #: mean time a row took
    seconds: float


def summarise(rows: Sequence[Row], by: Sequence[str]) -> list[Summary]:
    """Average the rows that agree in some fields, in the order in which groups first appear.

    Args:
        rows: Of a run.
        by: Fields of `Row`, from "photo" to "metric". A group of several metrics, or of several
            protectors, is averaged as it is: leave out what should be pooled, and nothing else.

    Raises:
        ConfigError: A row has no such field to group by.

    Differs:
        Edits of one photo resemble each other, so intervals come from drawing photos, each with
        all of its rows; drawing rows would make them too narrow.
    """
    for name in by:
        if name not in _FIELDS:
            raise ConfigError(f"rows are grouped by {', '.join(_FIELDS)}; got {name!r}")
    groups = _grouped(rows, lambda row: tuple(str(getattr(row, name)) for name in by))
    return [_summary(dict(zip(by, key, strict=True)), members) for key, members in groups]


def worst_case(rows: Sequence[Row], metric: str, facts: Facts) -> list[Summary]:
    """Average, per protector, what is left after the attack that is worst for each photo.

    Args:
        rows: Of a run; those of other metrics are passed over.
        metric: With its pair, "fr:mobilefacenet@source".
        facts: Which direction is good for the defender.

    Returns:
        One summary a protector, its group {"protector", "metric"}. The attack is chosen anew for
        every photo, manipulator, condition and seed; a cell of which no attack could be measured
        is missing, and so is every single attack that could not.

    Raises:
        ConfigError: Of this metric neither direction is good.
    """
    if facts.higher is None:
        raise ConfigError(
            f"{metric} has no worst case: neither more nor less of it is good for the defender"
        )
    choose = min if facts.higher else max
    summaries = []
    mine = [row for row in rows if row.metric == metric]
    for protector, own in _grouped(mine, lambda row: row.protector):
        cells = _grouped(own, lambda row: (row.photo, row.manipulator, row.condition, row.seed))
        worst = [_worst(cell, choose) for _, cell in cells]
        summaries.append(
            replace(
                _summary({"protector": protector, "metric": metric}, worst),
                missing=sum(not _usable(row) for row in own),
                seconds=_seconds(own),
            )
        )
    return summaries


def _worst(cell: Sequence[Row], choose: Callable[..., float]) -> Row:
    """The row of the worst attack; the first where none could be measured."""
    values = [row.value for row in cell if row.value is not None and _usable(row)]
    return replace(cell[0], value=choose(values) if values else None)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> list[tuple[Key, list[Row]]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _usable(row: Row) -> bool:
    return row.value is not None and not math.isnan(row.value)


def _seconds(rows: Sequence[Row]) -> float:
    return math.fsum(row.seconds for row in rows) / len(rows)


def _summary(group: dict[str, str], rows: Sequence[Row]) -> Summary:
    told = [(row.value, row.photo) for row in rows if row.value is not None and _usable(row)]
    finite = [(value, photo) for value, photo in told if math.isfinite(value)]
    infinite = [value for value, _ in told if math.isinf(value)]
    photos = [photo for _, photo in finite]
    mean, low, high = bootstrap([value for value, _ in finite], groups=photos)
    return Summary(
        group=group,
        mean=infinite[0] if infinite and not finite else mean,
        low=low,
        high=high,
        n=len(finite),
        photos=len(set(photos)),
        missing=len(rows) - len(told),
        infinite=len(infinite),
        seconds=_seconds(rows),
    )
