"""Photos in tables: data sets of Hugging Face as they are published (Parquet) or saved (Arrow)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shields.errors import ConfigError, ImageError, MissingPackage
from trainers.sources import Entry, Source, unreadable, written

__all__ = ["tables", "tables_in"]

_ROWS = 16


def tables_in(path: Path) -> list[Path]:
    """The tables of a data set: a file, or all below a folder; none where it is no data set."""
    if path.is_file():
        return [path] if path.suffix in {".parquet", ".arrow"} else []
    saved = [file for file in sorted(path.rglob("*.arrow"))
             if (file.parent / "dataset_info.json").is_file()
             and not file.name.startswith("cache-")]  # fmt: skip
    return [*sorted(path.rglob("*.parquet")), *saved]


def tables(files: Sequence[Path], root: Path, prefix: str, identity: str) -> Source:
    """Read photos from the column of images of tables; the other columns are their fields.

    Args:
        files: Parquet or Arrow.
        root: What they were found in.
        prefix: Of the photos' names.
        identity: The column that names a person; "identity", if there is one, where left out.

    Raises:
        MissingPackage: pyarrow is not installed.
        ImageError: The only table is damaged, or has no column of images.
        ConfigError: No table has the column that names a person.
    """
    opened: list[_Table] = []
    broken: list[Entry] = []
    for file in files:
        name = prefix + (file.relative_to(root).as_posix() if root.is_dir() else file.name)
        try:
            opened.append(_Table(file, name, identity))
        except ImageError as error:
            if len(files) == 1:
                raise
            broken.append(unreadable(name, str(error)))
    if identity and opened and all(identity not in table.columns for table in opened):
        raise ConfigError(
            f"no column of {root} is called {identity!r}; it has: {', '.join(opened[0].columns)}"
        )
    return Source(
        entries=_Tables(opened, broken),
        total=sum(table.rows for table in opened) + len(broken),
        has_fields=any(len(table.columns) > 1 for table in opened),
    )


class _Tables:
    """Entries of tables, and at their end what could not be opened."""

    def __init__(self, opened: Sequence[_Table], broken: Sequence[Entry]) -> None:
        self._opened, self._broken = opened, broken

    def __iter__(self) -> Iterator[Entry]:
        for table in self._opened:
            yield from table.entries()
        yield from self._broken


class _Table:
    """One file; its rows are read a few at a time."""

    def __init__(self, path: Path, name: str, identity: str) -> None:
        arrow = _arrow()
        self.path, self.name, self.identity = path, name, identity
        try:
            self.rows, schema = _shape(path)
        except (arrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise ImageError(f"{path} is damaged or no table: {reason}") from error
        self.columns: list[str] = schema.names
        self.image = _image_column(schema)
        if not self.image:
            raise ImageError(
                f"{path} has no column of images (bytes and path); it has: "
                f"{', '.join(self.columns)}"
            )
        self.classes = _class_names(schema)

    def entries(self) -> Iterator[Entry]:
        """Entries in the order of the rows; where the file breaks off, one that says so."""
        done = 0
        try:
            for batch in _batches(self.path):
                for row in batch.to_pylist():
                    yield self._entry(row, done)
                    done += 1
        except (_arrow().ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            yield unreadable(f"{self.name}:{done}", f"damaged from here on: {reason}")

    def _entry(self, row: Mapping[str, Any], number: int) -> Entry:
        image = row[self.image]
        known = image if isinstance(image, dict) else {"bytes": image, "path": None}
        name = f"{self.name}:{number}"
        file = str(known.get("path") or "")
        if file:
            name = f"{name}/{Path(file).name}"
        fields = {key: self._told(key, value) for key, value in row.items() if key != self.image}
        person = fields.get(self.identity or "identity")
        if person is None and self.identity:
            return unreadable(name, f"no field {self.identity!r} tells who it is")
        content = known.get("bytes")
        if content is None and not file:
            return unreadable(name, "the row holds no image")
        beside = self.path.parent / file
        return Entry(
            name=name,
            identity=person or f"{self.name}:{number}",
            read=beside.read_bytes if content is None else partial(bytes, content),
            fields=fields,
        )

    def _told(self, column: str, value: object) -> str:
        names = self.classes.get(column, [])
        if isinstance(value, int) and 0 <= value < len(names):
            return names[value]
        return written(value)


def _arrow() -> Any:  # noqa: ANN401  a package that may be absent
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "tables of photos need the package pyarrow: pip install 'shields[suite]'"
        ) from error
    return pyarrow


def _shape(path: Path) -> tuple[int, Any]:
    """Number of rows, and the schema."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            return file.metadata.num_rows, file.schema_arrow
    with _stream(path) as reader:
        schema = reader.schema
        return sum(batch.num_rows for batch in reader), schema


def _stream(path: Path) -> Any:  # noqa: ANN401  untyped
    """A reader of Arrow's streams, which is how `save_to_disk` writes."""
    return _arrow().ipc.open_stream(_arrow().memory_map(str(path)))


def _batches(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_ROWS)
        return
    with _stream(path) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.slice(start, _ROWS)


def _image_column(schema: Any) -> str:  # noqa: ANN401  untyped
    """The first column of structs that hold bytes, else the first of bytes."""
    types = _arrow().types
    structs = [
        column.name
        for column in schema
        if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    ]
    plain = [
        column.name
        for column in schema
        if types.is_binary(column.type) or types.is_large_binary(column.type)
    ]
    return next(iter([*structs, *plain]), "")


def _class_names(schema: Any) -> dict[str, list[str]]:  # noqa: ANN401  untyped
    """Column -> names of its classes, as `datasets` notes them in the schema."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted.get("info", {}).get("features", {})
        return {
            column: [str(name) for name in kind["names"]]
            for column, kind in features.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and kind.get("names")
        }
    except (ValueError, AttributeError, TypeError):  # a note, of which nothing depends
        return {}
