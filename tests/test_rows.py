"""Rows on disk: what is written comes back, and a damaged file is said to be one."""

import json
import math

import pytest

from robustness.rows import Row, Run, load, save
from shields.errors import ConfigError, OutputError

RUN = Run(
    name="tiny", command="shields attack tiny", settings={"attacks": ["none"]}, seed=3,
    started="2026-01-01T00:00:00+00:00", seconds=1.5, commit="abc", hardware="a machine",
    versions={"torch": "2"}, weights={"net": "00"},
    metrics={"psnr@photo": {"higher": True, "low": 0, "high": math.inf, "summary": "…"}},
)  # fmt: skip


def row(value, **fields):
    whole = {
        "photo": "a.png", "protector": "none", "attack": "jpeg:75", "manipulator": "none",
        "condition": "", "seed": 0, "metric": "psnr@handled",
    }  # fmt: skip
    return Row(**{**whole, **fields}, value=value)


ROWS = [
    row(31.25, seconds=0.5),
    row(math.inf),
    row(-math.inf, seed=2),
    row(None, error='no face, "none" at all'),
    row(0.1, photo="ß.jpg", condition="a, b"),
]


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_what_is_written_comes_back(tmp_path, suffix) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    save(tmp_path / f"rows{suffix}", RUN, ROWS)
    assert load(tmp_path / f"rows{suffix}") == (RUN, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == [f"rows{suffix}"]


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_run_without_rows_comes_back(tmp_path, suffix) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    save(tmp_path / f"rows{suffix}", RUN, [])
    assert load(tmp_path / f"rows{suffix}") == (RUN, [])


def test_a_value_that_is_no_number_comes_back_as_one(tmp_path) -> None:
    save(tmp_path / "rows.json", RUN, [row(math.nan)])
    assert math.isnan(load(tmp_path / "rows.json")[1][0].value)


def test_the_json_is_strict(tmp_path) -> None:
    save(tmp_path / "rows.json", RUN, ROWS)

    def refuse(word):
        raise AssertionError(word)

    document = json.loads((tmp_path / "rows.json").read_text(), parse_constant=refuse)
    assert document["rows"]["value"] == [31.25, "inf", "-inf", None, 0.1]


def test_parquet_holds_numbers_and_the_head(tmp_path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    save(tmp_path / "rows.parquet", RUN, ROWS)
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert str(table.schema.field("value").type) == "double"
    assert json.loads(table.schema.metadata[b"shields"])["name"] == "tiny"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "cannot be read"),
        ("[1]", "holds no rows"),
        ('{"run": {"name": "a"}, "rows": {"photo": []}}', "needs the columns"),
        ('{"run": {"nme": "a"}, "rows": {}}', "unknown 'nme'"),
    ],
)
def test_a_damaged_file_is_said_to_be_one(tmp_path, content, said) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "rows.json")


def test_damaged_parquet_is_said_to_be_so(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "rows.parquet")


def test_a_missing_file_is_said_to_be_missing(tmp_path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load(tmp_path / "rows.json")


def test_another_suffix_is_refused_with_a_hint(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean \.json"):
        save(tmp_path / "rows.jsn", RUN, ROWS)


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(OutputError, match="cannot be written"):
        save(tmp_path / "file" / "rows.json", RUN, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
