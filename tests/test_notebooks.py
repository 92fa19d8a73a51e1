"""What we tell people to run, runs: the notebooks, and the README's example."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage.data import astronaut

from shields import Report

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: a line of the notebooks, and what the test makes of it
LONG, SHORT = "STEPS = 40", "STEPS = 2"

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def reports(namespace: dict[str, Any]) -> list[Report]:
    return [value for value in namespace.values() if isinstance(value, Report)]


def test_there_is_a_notebook_that_protects_a_photo() -> None:
    assert "protect_a_photo" in [path.stem for path in NOTEBOOKS]


@every_notebook
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@every_notebook
def test_the_number_of_steps_stands_in_one_cell(path: Path) -> None:
    holding = [cell for cell in code_cells(path) if LONG in "".join(cell["source"])]
    assert len(holding) == 1, f"the test below replaces {LONG!r} to be fast"


@every_notebook
def test_notebooks_run_from_top_to_bottom(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for index, cell in enumerate(code_cells(path)):
        source = "".join(cell["source"]).replace(LONG, SHORT)
        exec(compile(source, f"{path.name}, code cell {index}", "exec"), namespace)
    assert namespace["STEPS"] == 2
    lossless = [report for report in reports(namespace) if not report.lossy]
    assert lossless
    for report in lossless:
        assert report.problems == ()
        assert report.objective_after is not None


def test_the_readmes_python_example_protects_a_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = readme.partition("```python\n")[2].partition("```")[0]
    Image.fromarray(astronaut()).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    (report,) = reports(namespace)
    assert report.problems == ()
    assert report.objective_after > report.objective_before
    with Image.open(tmp_path / "photo-protected.png") as protected:
        assert protected.size == (512, 512)
