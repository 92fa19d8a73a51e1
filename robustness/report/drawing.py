"""SVG by hand: a drawing surface, axes with round ticks, and how each protector looks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

__all__ = ["Axis", "Drawing", "shortened", "style"]

#: outlines about (0, 0), at most 5 pixels away; a protector is known by its colour and its shape
_SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-4-4h8v8h-8z",
    "M0-5L5 4h-10z",
    "M0-5.5L5.5 0L0 5.5L-5.5 0z",
    "M0 5L5-4h-10z",
    "M-1.5-5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
)
_COLOURS = 8


def shortened(label: str, length: int) -> str:
    """Cut a label in its middle, so that both its name and its last setting are seen.

    Example:
        >>> shortened("jpeg:75+resize:0.5,kernel=box", 15)
        'jpeg:75…nel=box'
    """
    if len(label) <= length:
        return label
    kept = length - 1
    return f"{label[: kept - kept // 2]}…{label[-(kept // 2) :]}"


@dataclass(frozen=True)
class Style:
    """The looks of one protector in every chart."""

    name: str
    shape: str


def style(place: int) -> Style:
    """Looks of the protector at a place; 0 is the unprotected photo, which is grey."""
    if place == 0:
        return Style("bare", _SHAPES[0])
    return Style(f"hue{(place - 1) % _COLOURS}", _SHAPES[(place - 1) % len(_SHAPES)])


@dataclass(frozen=True)
class Axis:
    """Numbers along a line of pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """Hold all values with a little room; a single value gets room on both sides."""
        low, high = min(values), max(values)
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 4) -> list[float]:
        """Round numbers within the axis, about as many as asked."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step)
        count = math.floor(self.high / step) - first + 1
        return [round((first + index) * step, 10) for index in range(count)]


class Drawing:
    """An SVG picture; whatever text goes in, is escaped on the way out.

    Args:
        width: Pixels, at its natural size.
        height: Pixels.
        title: What it shows; where left out, it is an ornament that is not read out.
        description: The same at length.
    """

    def __init__(self, width: float, height: float, title: str = "", description: str = "") -> None:
        named = {"role": "img", "aria-label": title} if title else {"aria-hidden": "true"}
        self._root = ElementTree.Element(
            "svg",
            {
                "viewBox": f"0 0 {width:g} {height:g}",
                "width": f"{width:g}",
                "height": f"{height:g}",
                **named,
            },
        )
        if title:
            ElementTree.SubElement(self._root, "title").text = title
            ElementTree.SubElement(self._root, "desc").text = description

    def _add(self, tag: str, look: str, **places: float | str) -> ElementTree.Element:
        written = {
            name.replace("_", "-"): f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in places.items()
        }
        return ElementTree.SubElement(self._root, tag, {"class": look, **written})

    def text(
        self, x: float, y: float, words: str, *, look: str = "", anchor: str = "start",
        turn: float = 0,
    ) -> None:  # fmt: skip
        """Write words, turned by degrees about their place."""
        node = self._add("text", look, x=float(x), y=float(y), text_anchor=anchor)
        if turn:
            node.set("transform", f"rotate({turn:g} {x:.4g} {y:.4g})")
        node.text = words

    def line(self, x1: float, y1: float, x2: float, y2: float, look: str) -> None:
        """Draw a straight line."""
        self._add("line", look, x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))

    def curve(self, points: Sequence[tuple[float, float]], look: str) -> None:
        """Draw a line through points."""
        self._add("polyline", look, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def area(self, points: Sequence[tuple[float, float]], look: str) -> None:
        """Fill the polygon of points."""
        self._add("polygon", look, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))

    def box(
        self, x: float, y: float, width: float, height: float, look: str, *, strength: float = 1,
        hint: str = "",
    ) -> None:  # fmt: skip
        """Fill a rectangle; `hint` is shown where the pointer rests."""
        node = self._add(
            "rect", look, x=float(x), y=float(y), width=float(width), height=float(height),
            fill_opacity=float(strength), rx=3,
        )  # fmt: skip
        if hint:
            ElementTree.SubElement(node, "title").text = hint

    def mark(self, x: float, y: float, looks: Style, hint: str = "") -> None:
        """Put a protector's mark at a point."""
        node = self._add("path", f"mark {looks.name}", d=looks.shape)
        node.set("transform", f"translate({x:.1f} {y:.1f})")
        if hint:
            ElementTree.SubElement(node, "title").text = hint

    def svg(self) -> Markup:
        """The picture as part of a page."""
        return Markup(ElementTree.tostring(self._root, encoding="unicode"))  # noqa: S704  escaped
