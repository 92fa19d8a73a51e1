"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from shields.files import aside


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with aside(path) as part:
        part.write_text("half")
        assert part.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_where_writing_fails_the_old_file_stays_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with aside(path) as part:
            part.write_text("new")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_none_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def write() -> None:
        with aside(tmp_path / "file" / "below.txt"):
            pass

    with pytest.raises(OSError, match="file"):
        write()
