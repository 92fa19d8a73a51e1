"""A run as one HTML page and as Markdown: what goes into which template."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from robustness.metrics import PAIRS
from robustness.report import words
from robustness.report.charts import Family, families, heat_map, scatter, survival
from robustness.report.drawing import Drawing, style
from robustness.report.pictures import Album
from robustness.report.results import UNPROTECTED, Results, View, direction, handled, named
from robustness.report.tables import Table, cost, of_view, worst_cases

__all__ = ["html", "markdown"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class _Section:
    """All that is shown of one view."""

    view: View
    table: Table
    heat: Markup
    curves: tuple[Markup, ...]


def _breakable(label: object) -> Markup:
    """Say where a long name may be broken: before its pair, behind its parts."""
    broken = re.sub(r"([:+,_])|(?=@)", r"\1\0", str(label))
    return Markup("<wbr>").join(broken.split("\0"))


def _section(results: Results, view: View, curved: list[Family]) -> _Section:
    curves = tuple(survival(results, view, family) for family in curved)
    return _Section(view, of_view(results, view), heat_map(results, view), curves)


def _swatch(place: int) -> Markup:
    """A protector's mark beside its name."""
    drawing = Drawing(14, 14)
    drawing.mark(7, 7, style(place))
    return drawing.svg()


def _legend(results: Results) -> list[tuple[Markup, str]]:
    return [(_swatch(place), named(name)) for place, name in enumerate(results.protectors)]


def _glossary(results: Results) -> list[tuple[str, str]]:
    """Each metric with its pair and its meaning."""
    lines = []
    for metric in dict.fromkeys(row.metric for row in results.rows):
        facts = results.facts(metric)
        pair = PAIRS.get(metric.rpartition("@")[2], "")
        parts = [facts.summary.rstrip("."), pair, direction(facts)]
        lines.append((metric, "; ".join(part for part in parts if part) + "."))
    return lines


def _contents(results: Results, album: Album) -> dict[str, object]:
    """All that both templates draw on; charts are added for the page alone."""
    run = results.run
    shown = set(results.headlines)
    facts = {
        "Started": run.started,
        "Took": f"{run.seconds:.0f} seconds" if run.seconds else "",
        "Seed": str(run.seed),
        "Commit": run.commit,
        "Hardware": run.hardware,
        "Versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    return {
        "run": run,
        "results": results,
        "named": named,
        "handled": handled,
        "sentences": words.overall(results),
        "cards": words.cards(results),
        "worst": worst_cases(results),
        "cost": cost(results),
        "headlines": [of_view(results, view) for view in results.headlines],
        "others": [of_view(results, view) for view in results.views if view not in shown],
        "album": album,
        "glossary": _glossary(results),
        "facts": {name: value for name, value in facts.items() if value},
        "settings": json.dumps(dict(run.settings), indent=2, ensure_ascii=False, default=str),
    }


def html(results: Results, album: Album) -> str:
    """Build the page: one file, nothing loaded from anywhere."""
    curved = families(results.attacks)
    shown = set(results.headlines)
    costs = [
        view
        for view in results.fidelity
        if results.facts(view.metric).higher is not None
        and any(
            results.cell(view, name, UNPROTECTED).mean is not None for name in results.protectors
        )
    ]
    script = (_HERE / "zoom.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    charts = {
        "legend": _legend(results),
        "shown": [_section(results, view, curved) for view in results.headlines],
        "folded": [_section(results, view, []) for view in results.views if view not in shown],
        "scatters": [scatter(results, view, costs[0]) for view in results.headlines if costs],
        "style": Markup((_HERE / "style.css").read_text(encoding="utf-8")),  # noqa: S704  ours
        "script": Markup(script),  # noqa: S704  ours
        "digest": digest,
    }
    environment = _environment()
    environment.autoescape = True
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html").render(**_contents(results, album), **charts)


def markdown(results: Results, album: Album) -> str:
    """Build the tables and the words of the page as Markdown."""
    environment = _environment()
    environment.finalize = _plain
    return environment.get_template("page.md").render(**_contents(results, album))


def _environment() -> jinja2.Environment:
    return jinja2.Environment(  # noqa: S701  `html` switches escaping on, Markdown has its own
        loader=jinja2.FileSystemLoader(_HERE), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def _plain(value: object) -> object:
    """Keep a label from being read as Markdown, as HTML or as the end of a table's cell."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_|<>\[\]#~])", r"\\\1", " ".join(value.split()))
