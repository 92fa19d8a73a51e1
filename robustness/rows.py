"""The rows of a suite, what is true of all of them, and the two files they are kept in.

Example:
    >>> import tempfile
    >>> row = Row(photo="a.png", protector="none", attack="jpeg:75", manipulator="none",
    ...           condition="", seed=0, metric="psnr@handled", value=31.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "rows.json", Run(name="example"), [row])
    ...     run, rows = load(Path(folder) / "rows.json")
    >>> run.name, rows == [row]
    ('example', True)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from robustness.files import write_whole
from shields.errors import ConfigError, MissingPackage
from shields.registry import did_you_mean

__all__ = ["Row", "Run", "load", "save"]

#: how numbers that JSON cannot hold are written
_SPECIAL = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number: one metric of one cell."""

    #: file name of the photo; "*" for a number about all photos of the cell
    photo: str
    #: label in the suite; "none" is the clean photo, unprotected
    protector: str
    #: text of the handling; "none" leaves the file as it was saved
    attack: str
    #: name of the card; "none" where nothing is forged
    manipulator: str
    #: attribute or prompt; empty where there is none
    condition: str
    seed: int
    #: name and pair, "psnr@photo"
    metric: str
    #: None where it could not be computed
    value: float | None
    #: why not, one line
    error: str = ""
    #: spent on the step that made the image which the metric looked at
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is true of all rows."""

    name: str
    #: what has to be typed to get the same rows
    command: str = ""
    #: the suite as it was read
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    #: ISO, UTC
    started: str = ""
    seconds: float = 0.0
    commit: str = ""
    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    #: name and pair -> what the number means
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    #: card -> SHA-256 of its weights
    weights: Mapping[str, str] = field(default_factory=dict)


_NAMES = tuple(item.name for item in dataclasses.fields(Row))


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in _NAMES}


def _rows(columns: Mapping[str, Sequence[Any]], path: Path) -> list[Row]:
    if set(columns) != set(_NAMES) or len({len(column) for column in columns.values()}) > 1:
        raise ConfigError(
            f"{path} holds no rows of a suite: it needs the columns {', '.join(_NAMES)}, of one "
            f"length, and has {', '.join(columns) or 'none'}"
        )
    cells = zip(*(columns[name] for name in _NAMES), strict=True)
    return [Row(**dict(zip(_NAMES, cell, strict=True))) for cell in cells]


def _run(head: Mapping[str, Any], path: Path) -> Run:
    known = [item.name for item in dataclasses.fields(Run)]
    for key in head:
        if key not in known:
            raise ConfigError(f"{path} has an unknown {key!r} in its head; run the suite again")
    metrics = {
        name: {
            key: _number(value) if key in {"low", "high"} else value for key, value in facts.items()
        }
        for name, facts in head.get("metrics", {}).items()
    }
    return Run(**{**head, "metrics": metrics})


def _number(value: Any) -> Any:  # noqa: ANN401  as JSON gave it
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def _plain(value: float | None) -> float | str | None:
    """A number that JSON can hold: what is not finite becomes a word."""
    return value if value is None or math.isfinite(value) else str(value)


def _head(run: Run) -> dict[str, Any]:
    head = dataclasses.asdict(run)
    head["metrics"] = {
        name: {key: _plain(v) if isinstance(v, float) else v for key, v in facts.items()}
        for name, facts in run.metrics.items()
    }
    return head


def _json(run: Run, rows: Sequence[Row]) -> bytes:
    columns = _columns(rows)
    columns["value"] = [_plain(value) for value in columns["value"]]
    document = {"run": _head(run), "rows": columns}
    return json.dumps(document, indent=1, allow_nan=False, default=str).encode()


def _from_json(path: Path) -> tuple[Run, list[Row]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or set(document) != {"run", "rows"}:
        raise ConfigError(f"{path} holds no rows of a suite: `run` and `rows` are needed")
    columns = document["rows"]
    columns["value"] = [_number(value) for value in columns.get("value", [])]
    return _run(document["run"], path), _rows(columns, path)


def _pyarrow(path: Path) -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"{path} needs the package pyarrow: pip install 'shields[suite]'; or use a .json"
        ) from error
    return pyarrow, parquet


def _parquet(run: Run, rows: Sequence[Row], path: Path) -> bytes:
    pyarrow, parquet = _pyarrow(path)
    kinds = {"seed": pyarrow.int64(), "value": pyarrow.float64(), "seconds": pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in _NAMES])
    head = json.dumps(_head(run), allow_nan=False, default=str)
    table = pyarrow.table(_columns(rows), schema=schema.with_metadata({"shields": head}))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _from_parquet(path: Path) -> tuple[Run, list[Row]]:
    pyarrow, parquet = _pyarrow(path)
    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} cannot be read ({error}); run the suite again") from error
    head = (table.schema.metadata or {}).get(b"shields")
    if head is None:
        raise ConfigError(f"{path} holds no rows of a suite: its metadata lacks `shields`")
    return _run(json.loads(head), path), _rows(table.to_pydict(), path)


def save(path: Path, run: Run, rows: Sequence[Row]) -> None:
    """Write the rows to a `.json` or `.parquet`, at once or not at all.

    Raises:
        ConfigError: The suffix is neither.
        MissingPackage: pyarrow is not installed, and the suffix asks for it.
        OutputError: The place cannot be written.
    """
    content = _parquet(run, rows, path) if _suffix(path) == ".parquet" else _json(run, rows)
    write_whole(path, content)


def load(path: Path) -> tuple[Run, list[Row]]:
    """Read what `save` wrote.

    Raises:
        ConfigError: There is no such file, it is damaged, or it holds something else.
        MissingPackage: pyarrow is not installed, and the suffix asks for it.
    """
    suffix = _suffix(path)
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; `shields attack` writes it into its folder")
    try:
        return _from_parquet(path) if suffix == ".parquet" else _from_json(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); run the suite again") from error


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in {".json", ".parquet"}:
        hint = did_you_mean(suffix, (".json", ".parquet"))
        raise ConfigError(f"rows are kept as .json or .parquet, got {path.name!r}; {hint}")
    return suffix
