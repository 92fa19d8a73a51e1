"""The three charts of a report: heat map, survival over strength, fidelity against protection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from robustness.report.drawing import Axis, Drawing, shortened, style
from robustness.report.results import UNPROTECTED, Results, View, direction, handled, named
from robustness.report.tables import number

__all__ = ["Family", "families", "heat_map", "scatter", "survival"]

#: a number that sets an attack: behind the name, a comma or a key, never a part of a word
_NUMBER = re.compile(r"(?<=[:=,])\d+(?:\.\d+)?(?=$|[+:,])")
#: attacks whose first number, and settings that, are the gentler the larger
_GENTLE = {
    "jpeg", "webp", "avif", "heic", "resize", "cr", "crop", "saturation", "contrast", "quality",
    "scale", "size", "share", "side", "blend", "screenshot", "screenshot-desktop",
    "screenshot-phone", "facebook", "instagram", "x", "whatsapp", "wechat", "weibo", "telegram",
}  # fmt: skip
#: pixels of a heat map's cell
_CELL_WIDTH, _CELL_HEIGHT = 58, 30
#: pixels a letter takes up, about
_LETTER = 6.6


def heat_map(results: Results, view: View) -> Markup:
    """Draw handlings down and protectors across; the deeper, the better for the person.

    A tick behind a number says that the protection is shown to hold there.
    """
    rows, columns = results.attacks, results.protectors
    left = 14 + min(max(len(handled(name)) for name in rows), 26) * _LETTER
    slant = min(max(len(named(name)) for name in columns), 22) * _LETTER
    top = 18 + slant * 0.6
    width = left + len(columns) * _CELL_WIDTH + slant * 0.8
    facts = results.facts(view.metric)
    drawing = Drawing(
        width, top + len(rows) * _CELL_HEIGHT + 4, f"Heat map of {view.title}",
        f"{len(rows)} handlings by {len(columns)} protectors; {direction(facts)} for the person "
        "in the photo. The table below holds the same numbers.",
    )  # fmt: skip
    for place, name in enumerate(columns):
        x = left + (place + 0.5) * _CELL_WIDTH
        drawing.text(x, top - 8, shortened(named(name), 22), turn=-38)
    means = [results.cell(view, name, attack).mean for attack in rows for name in columns]
    scale = _scale([mean for mean in means if mean is not None], facts.higher)
    for line, attack in enumerate(rows):
        y = top + line * _CELL_HEIGHT
        drawing.text(left - 10, y + 20, shortened(handled(attack), 26), anchor="end")
        for place, name in enumerate(columns):
            _heat_cell(drawing, results, view, (name, attack), (left + place * _CELL_WIDTH, y),
                       scale)  # fmt: skip
    return drawing.svg()


def _scale(means: Sequence[float], higher: bool | None) -> tuple[float, float]:
    """The means that are drawn palest and deepest."""
    finite = [mean for mean in means if abs(mean) != float("inf")]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return (high, low) if higher is False else (low, high)


def _heat_cell(
    drawing: Drawing, results: Results, view: View, names: tuple[str, str],
    corner: tuple[float, float], scale: tuple[float, float],
) -> None:  # fmt: skip
    protector, attack = names
    cell = results.cell(view, protector, attack)
    x, y = corner
    size = _CELL_WIDTH - 2, _CELL_HEIGHT - 2
    if cell.mean is None:
        drawing.box(x, y, *size, "gap", hint=f"{named(protector)}, {handled(attack)}: absent")
        drawing.text(x + size[0] / 2, y + 19, "absent", look="quiet", anchor="middle")
        return
    pale, deep = scale
    share = (cell.mean - pale) / (deep - pale) if deep != pale else 0.5
    share = min(max(share, 0.0), 1.0)
    verdict = "" if protector == UNPROTECTED else f" ({results.verdict(view, *names)})"
    hint = f"{named(protector)}, {handled(attack)}: {number(cell.mean)}{verdict}"
    drawing.box(x, y, *size, "heat", strength=0.08 + 0.92 * share, hint=hint)
    holds = " ✓" if "holds" in verdict else ""
    look = "on-deep" if share > 0.7 else "on-pale"
    drawing.text(x + size[0] / 2, y + 19, number(cell.mean) + holds, look=look, anchor="middle")


@dataclass(frozen=True)
class Family:
    """Attacks that differ in one number, from gentle to strong."""

    #: how they are written, with … for the number
    name: str
    #: (number as written, attack)
    levels: tuple[tuple[str, str], ...]


def families(attacks: Sequence[str]) -> list[Family]:
    """Find attacks that are the same but for one number.

    Example:
        >>> [family.levels for family in families(["jpeg:50", "blur:2", "jpeg:90"])]
        [(('90', 'jpeg:90'), ('50', 'jpeg:50'))]
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for attack in attacks:
        for match in _NUMBER.finditer(attack):
            ends = attack[: match.start()], attack[match.end() :]
            found.setdefault(ends, {})[match[0]] = attack
    result = []
    for (before, after), levels in found.items():
        word = re.split(r"[+:,=]", before[:-1])[-1]
        gentle_first = sorted(levels.items(), key=lambda level: float(level[0]))
        if word in _GENTLE:
            gentle_first.reverse()
        if len(levels) > 1:
            result.append(Family(f"{before}…{after}", tuple(gentle_first)))
    return result


def survival(results: Results, view: View, family: Family) -> Markup:
    """Draw what is left over the strength of one handling, with intervals as bands."""
    width, height = 310.0, 230.0
    steps = [("none", UNPROTECTED)] if UNPROTECTED in results.attacks else []
    steps += family.levels
    drawing = Drawing(
        width, height, f"{view.metric} over {family.name}",
        f"From gentle to strong: {', '.join(label for label, _ in steps)}. "
        f"{direction(results.facts(view.metric)).capitalize()} for the person in the photo.",
    )  # fmt: skip
    cells = {
        (name, attack): results.cell(view, name, attack)
        for name in results.protectors
        for _, attack in steps
    }
    ends = [
        end
        for cell in cells.values()
        for end in (cell.mean, cell.low, cell.high)
        if end is not None and abs(end) != float("inf")
    ]
    if not ends:
        drawing.text(width / 2, height / 2, "absent", look="quiet", anchor="middle")
        return drawing.svg()
    across = [56 + index * (width - 76) / max(len(steps) - 1, 1) for index in range(len(steps))]
    upright = Axis.around(ends, height - 44, 26)
    _grid(drawing, upright, 44, width - 8)
    drawing.text(4, 12, f"{view.metric}, {direction(results.facts(view.metric))}", look="tick")
    for x, (label, _) in zip(across, steps, strict=True):
        drawing.text(x, height - 26, label, look="tick", anchor="middle")
    drawing.text(width / 2 + 12, height - 6, f"{family.name}  (stronger →)", anchor="middle")
    for place, name in enumerate(results.protectors):
        line = [(x, cells[name, attack]) for x, (_, attack) in zip(across, steps, strict=True)]
        shown = [(x, cell) for x, cell in line if cell.mean is not None
                 and abs(cell.mean) != float("inf")]  # fmt: skip
        looks = style(place)
        lows = [(x, upright.place(cell.low)) for x, cell in shown if cell.low is not None]
        highs = [(x, upright.place(cell.high)) for x, cell in shown if cell.high is not None]
        drawing.area([*lows, *reversed(highs)], f"band {looks.name}")
        means = [(x, upright.place(cell.mean)) for x, cell in shown if cell.mean is not None]
        drawing.curve(means, f"curve {looks.name}")
        for (x, y), (_, cell) in zip(means, shown, strict=True):
            assert cell.mean is not None
            drawing.mark(x, y, looks, f"{named(name)}: {number(cell.mean)}")
    return drawing.svg()


def _grid(drawing: Drawing, upright: Axis, left: float, right: float) -> None:
    for tick in upright.ticks():
        y = upright.place(tick)
        drawing.line(left, y, right, y, "grid")
        drawing.text(
            left - 6, y + 4, f"{tick:g}".replace("-", "\N{MINUS SIGN}"), look="tick", anchor="end"
        )


def scatter(results: Results, view: View, cost: View) -> Markup:
    """Draw what a protection costs the photo against what is left of it in the worst case."""
    width, height = 420.0, 350.0
    sides = results.facts(cost.metric), results.facts(view.metric)
    drawing = Drawing(
        width, height, f"{cost.metric} against the worst case of {view.title}",
        f"Across: {cost.metric}, {direction(sides[0])}. Up: each photo's worst case over all "
        f"handlings, {direction(sides[1])}.",
    )  # fmt: skip
    points = {
        name: (results.cell(cost, name, UNPROTECTED).mean, results.worst(view, name).mean)
        for name in results.protectors
        if name != UNPROTECTED
    }
    known = {
        name: (x, y)
        for name, (x, y) in points.items()
        if x is not None and y is not None and max(abs(x), abs(y)) != float("inf")
    }
    if not known:
        drawing.text(width / 2, height / 2, "absent", look="quiet", anchor="middle")
        return drawing.svg()
    bare = results.worst(view, UNPROTECTED).mean
    upright = Axis.around(
        [y for _, y in known.values()] + ([] if bare is None else [bare]), height - 56, 52
    )
    across = Axis.around([x for x, _ in known.values()], 70, width - 90)
    _grid(drawing, upright, 56, width - 8)
    for tick in across.ticks():
        drawing.line(across.place(tick), 40, across.place(tick), height - 50, "grid")
        drawing.text(across.place(tick), height - 34, f"{tick:g}", look="tick", anchor="middle")
    if bare is not None:
        y = upright.place(bare)
        drawing.line(56, y, width - 8, y, "curve bare")
        drawing.text(width - 10, y - 6, "unprotected", look="quiet", anchor="end")
    drawing.text(
        (width + 48) / 2, height - 10, f"{cost.metric} ({direction(sides[0])})", anchor="middle"
    )
    drawing.text(4, 12, shortened(view.title, 64))
    drawing.text(4, 28, f"worst case, {direction(sides[1])}", look="tick")
    _points(drawing, results, known, across, upright)
    return drawing.svg()


def _points(
    drawing: Drawing, results: Results, known: dict[str, tuple[float, float]], across: Axis,
    upright: Axis,
) -> None:  # fmt: skip
    """Marks with their labels; a label that would cover another moves down."""
    taken: list[tuple[float, float]] = []
    for name, (x, y) in sorted(known.items(), key=lambda point: -point[1][1]):
        place = across.place(x), upright.place(y)
        hint = f"{name}: {number(x)}, {number(y)}"
        drawing.mark(*place, style(results.protectors.index(name)), hint)
        line = place[1] + 4
        while any(abs(line - used) < 13 and abs(place[0] - near) < 120 for near, used in taken):
            line += 2
        taken.append((place[0], line))
        drawing.text(place[0] + 10, line, shortened(name, 20))
