"""Held-out people as photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import save_file

from shields.errors import ConfigError, OutputError
from tests import tiny
from trainers.data import held_out
from trainers.people import write_people

NAMES = [f"person {i}" for i in range(40)]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Two faces of each of forty people."""
    path = tmp_path / "faces.safetensors"
    faces = (tiny.faces_image(80, 40) * 255).byte().permute(0, 2, 3, 1).contiguous()
    save_file(
        {"faces": faces, "landmarks": tiny.landmarks(80, 40), "identity": torch.arange(80) // 2},
        path,
        metadata={"identities": json.dumps(NAMES)},
    )
    return path


def test_one_photo_of_each_held_out_person_is_written(pack: Path, tmp_path: Path) -> None:
    wanted = sorted(name for name in NAMES if held_out(name, 0.1))
    written = write_people(pack, tmp_path / "out", size=20, share=0.5)
    assert [path.stem for path in written] == wanted
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{name}.png" for name in wanted
    ]


def test_a_photo_shows_the_middle_of_the_face(pack: Path, tmp_path: Path) -> None:
    (path,) = write_people(pack, tmp_path / "out", size=20, share=0.5, limit=1)
    number = NAMES.index(path.stem)
    face = (tiny.faces_image(80, 40) * 255).byte()[2 * number]
    shown = np.asarray(PILImage.open(path)).transpose(2, 0, 1)
    assert np.array_equal(shown, face[:, 10:30, 10:30].numpy())


def test_a_photo_that_is_there_stays(pack: Path, tmp_path: Path) -> None:
    (path,) = write_people(pack, tmp_path, size=20, limit=1)
    path.write_bytes(b"mine")
    write_people(pack, tmp_path, size=20, limit=1)
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "wrong", [{"size": 8}, {"size": 20, "share": 0.0}, {"size": 20, "limit": -1}]
)
def test_numbers_that_make_no_sense_are_refused(
    pack: Path, tmp_path: Path, wrong: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match="16 pixels"):
        write_people(pack, tmp_path, **wrong)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made_is_one_line(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        write_people(pack, tmp_path / "file", size=20)
