"""The report of a run: one self-contained HTML page that a person can read, and Markdown.

Every number on it comes from the rows; the page loads nothing from anywhere and runs one small
script of ours, to look at pictures closely.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robustness.files import write_whole
from robustness.report.page import html, markdown
from robustness.report.pictures import load
from robustness.report.results import Results
from robustness.rows import Row, Run

__all__ = ["write"]


def write(folder: Path, run: Run, rows: Sequence[Row]) -> Path:
    """Write `report.html` and `report.md` into the folder of a run.

    Args:
        folder: Of the run; pictures are taken from its `pictures.json`, where there is one.
        run: What is true of all rows.
        rows: All rows, those without a number too.

    Returns:
        The path of the page.

    Raises:
        OutputError: The folder cannot be written.
    """
    results = Results(run, rows)
    album = load(folder, results.attacks)
    write_whole(folder / "report.md", markdown(results, album).encode())
    page = folder / "report.html"
    write_whole(page, html(results, album).encode())
    return page
