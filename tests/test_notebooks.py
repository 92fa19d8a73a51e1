"""What we tell people to run, runs: the notebooks, and the README's example."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage.data import astronaut

from robustness.rows import Row
from shields import Report
from shields.models.generators import ArsModel
from shields.weights import Card

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
#: a line of every notebook, and what the tests make of it
LONG, SHORT = re.compile(r"^STEPS = \d+$", re.MULTILINE), "STEPS = 2"
NAMES = ("attack_a_protection", "protect_a_photo", "train_a_protector")

Run = Callable[[str], dict[str, Any]]

every_notebook = pytest.mark.parametrize("name", NAMES)


def code_cells(name: str) -> list[dict[str, Any]]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def reports(namespace: dict[str, Any]) -> list[Report]:
    return [value for value in namespace.values() if isinstance(value, Report)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Execute a notebook from top to bottom in an empty folder, with few steps."""

    def execute(name: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        namespace: dict[str, Any] = {}
        for index, cell in enumerate(code_cells(name)):
            source = LONG.sub(SHORT, "".join(cell["source"]))
            exec(compile(source, f"{name}.ipynb, code cell {index}", "exec"), namespace)
        assert namespace["STEPS"] == 2
        return namespace

    return execute


def test_every_notebook_is_run_below() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(NAMES)


@every_notebook
def test_notebooks_are_committed_without_outputs(name: str) -> None:
    for cell in code_cells(name):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@every_notebook
def test_the_number_of_steps_stands_in_one_cell(name: str) -> None:
    found = [LONG.findall("".join(cell["source"])) for cell in code_cells(name)]
    assert sum(map(len, found)) == 1, "the tests below replace it to be fast"


def test_a_photo_is_protected(run: Run) -> None:
    lossless = [report for report in reports(run("protect_a_photo")) if not report.lossy]
    assert lossless
    for report in lossless:
        assert report.problems == ()
        assert report.objective_after is not None


# Lightning speaks to people at a terminal; its advice is not a fault of ours.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_protector_is_trained_exported_and_used(run: Run) -> None:
    namespace = run("train_a_protector")
    card = Card.read(namespace["card"])
    assert card.training["steps"] == 2
    assert card.results["mse"] == round(namespace["results"]["val_mse"], 4)
    assert isinstance(namespace["ars"].generator, ArsModel)
    assert namespace["sheet"].shape == (3, 5 * 96, 96)
    (report,) = reports(namespace)
    assert report.problems == ()
    assert 0 < report.largest_change <= report.allowed_change


def test_a_protection_is_attacked(run: Run) -> None:
    namespace = run("attack_a_protection")
    rows: list[Row] = namespace["numbers"]
    assert [row.error for row in rows if row.error] == []
    # Three protectors: each one fidelity, and three metrics under five attacks.
    assert len(rows) == 3 * (1 + 5 * 3)
    assert namespace["again"] == rows
    assert namespace["table"].row_count == 3 * 5
    page = (namespace["folder"] / "report.html").read_text(encoding="utf-8")
    assert "facelock robust" in page


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
