"""The table of the README: its attacks, its arithmetic, its text."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage
from skimage.data import astronaut
from typer.testing import CliRunner

from robustness.default_report import (
    ATTACKS,
    PAIRS,
    Plan,
    _cell,
    _command,
    _insert,
    app,
    render,
    summarise,
)
from shields.errors import ConfigError, ImageError

SHARED = Path(__file__).parents[1].parent / "shared"


def rows(values: list[float], attack: str = "none", **changes: object) -> list[dict[str, object]]:
    plan = {"optimised": "embedded", "levels": 8.0, "robust": True, "stealth": False}
    facts = {"psnr": 35.0, "ssim": 0.9, "flip": 0.05, "clean": 0.99, "max_levels": 8}
    return [
        plan
        | facts
        | {"measured": "published", "attack": attack, "photo": f"{i}.jpg", "similarity": value}
        | changes
        for i, value in enumerate(values)
    ]


def test_attacks_are_the_real_codec_and_the_real_resampler() -> None:
    pixels = astronaut()[:130, :131]
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "JPEG", quality=75, subsampling="4:2:0")
    coded = np.asarray(PILImage.open(buffer))
    assert np.array_equal(ATTACKS["JPEG 75"](pixels), coded)
    assert np.array_equal(ATTACKS["none"](pixels), pixels)
    assert np.array_equal(ATTACKS["C&R"](pixels), ATTACKS["half size"](coded))
    assert not np.array_equal(
        ATTACKS["C&R"](pixels), ATTACKS["JPEG 75"](ATTACKS["half size"](pixels))
    )
    assert all(handle(pixels).shape == pixels.shape for handle in ATTACKS.values())


def test_summary_has_mean_interval_and_count_of_every_cell() -> None:
    summary = summarise(rows([0.0, 0.2, 0.4]) + rows([0.5, 0.5], attack="C&R"))
    assert [(cell["attack"], cell["n"]) for cell in summary] == [("none", 3), ("C&R", 2)]
    first, second = summary
    assert first["similarity"] == pytest.approx(0.2)
    assert 0.0 <= first["low"] < 0.2 < first["high"] < 0.41
    assert second["low"] == second["high"] == 0.5


def test_table_shows_the_means_and_says_what_was_held_out() -> None:
    data = [row for attack in ATTACKS for row in rows([0.1, 0.3], attack=attack)]
    own = [row | {"measured": "embedded", "similarity": -0.5} for row in data]
    report = {"summary": summarise(own + data), "command": "c", "commit": "abc", "hardware": "h"}
    lines = render(report).splitlines()
    assert lines[2].startswith("| embedded | embedded | 8 | yes | -0.50 | -0.50 | -0.50 | -0.50 |")
    assert lines[3].startswith("| embedded | published (held out) | 8 | yes | 0.20 |")
    assert "n = 2 photos" in lines[-1]
    assert "commit abc" in lines[-1]


def test_table_goes_between_the_markers_and_nowhere_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- default-report -->\nold\n<!-- /default-report -->\nb\n")
    _insert(readme, "new")
    assert readme.read_text() == "a\n<!-- default-report -->\nnew\n<!-- /default-report -->\nb\n"
    readme.write_text("no markers")
    with pytest.raises(ImageError, match="lacks the markers"):
        _insert(readme, "new")


def test_the_command_that_is_reported_is_the_one_that_was_given() -> None:
    assert _command([], None, stealth=False) == "python -m robustness.default_report"
    assert _command(["embedded:4", "published:7.65"], 6, stealth=True).endswith(
        " --plan embedded:4 --plan published:7.65 --stealth --limit 6"
    )


@pytest.mark.parametrize("text", ["embedded", "embedded:", "embeded:8", "published:-1"])
def test_a_plan_that_makes_no_sense_is_refused(text: str) -> None:
    assert _cell("published:7.65") == ("published", 7.65)
    with pytest.raises(ConfigError, match="embedded or published"):
        _cell(text)


def test_plans_differ_by_every_setting() -> None:
    plans = [
        Plan(optimised=pair, levels=levels, robust=robust, stealth=stealth)
        for pair in PAIRS
        for levels in (4.0, 8.0)
        for robust in (False, True)
        for stealth in (False, True)
    ]
    assert len({plan.key() for plan in plans}) == len(plans)
    assert {plan.config().stealth for plan in plans} == {False, True}
    assert {plan.config().levels for plan in plans} == {4.0, 8.0}


def test_one_photo_goes_through_whole(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the CelebA-HQ samples and the published weights are not at {SHARED}")
    output = tmp_path / "report.json"
    arguments = [
        "--photos", str(SHARED / "data" / "celeba-hq-sample"), "--limit", "1",
        "--plan", "embedded:4", "--weights-dir", str(SHARED / "weights"),
        "--work", str(tmp_path / "work"), "--output", str(output),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    # {plain, robust} x {none, JPEG, half, C&R} x two judges
    assert len(report["rows"]) == 16
    assert all(row["max_levels"] <= 4 for row in report["rows"])
    assert all(row["similarity"] < row["clean"] for row in report["rows"])
