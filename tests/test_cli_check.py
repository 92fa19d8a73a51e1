"""`models check` and `models convert`, and manipulators on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shields.models.star_networks import StarGenerator
from shields.weights import WeightStore
from tests import tiny
from tests.cards import write_card
from tests.commands import shields

FACTORY = """
import torch
from shields.models.manipulation import wrap

def fine():
    return wrap(lambda image: image.flip(3) * 0.5, native_range="signed")

def stubborn():
    return wrap(lambda image: image.detach() * 0.5)

def chatty():
    return print

def broken():
    raise RuntimeError("no weights\\nat all")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own module in the folder where the command is run."""
    (tmp_path / "forgers_of_mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_sound_manipulator_passes_and_a_broken_one_is_told_why(module: Path) -> None:
    done = shields("models", "check", "forgers_of_mine:fine", "--size", "32")
    assert done.exit_code == 0, done.stderr
    assert "NO" not in done.stdout
    assert "forward and backward" in done.stdout
    done = shields("models", "check", "forgers_of_mine:stubborn", "--size", "32", "--json")
    assert done.exit_code == 1
    failed = [row["name"] for row in json.loads(done.stdout)["checks"] if not row["passed"]]
    assert failed == [name for name in failed if "gradient" in name] != []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("forgers_of_mine:chatty", "must return a manipulator"),
        ("forgers_of_mine:broken", "RuntimeError: no weights at all"),
        ("forgers_of_mine:absent", "no attribute 'absent'"),
        ("no_such_module:factory", "No module named"),
        ("stargun", "did you mean"),
        ("portrait-ae", "has the role autoencoder"),
        ("face-embedder", "--lfw FOLDER"),
    ],
)
def test_what_cannot_be_checked_says_why(module: Path, name: str, said: str) -> None:
    done = shields("models", "check", name)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_an_official_file_is_converted_and_then_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightStore, "cache", staticmethod(lambda: tmp_path / "cache"))
    with tiny.seeded(0):
        network = StarGenerator(5, width=8, blocks=2)
    official = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save(official, tmp_path / "200000-G.ckpt")
    done = shields("models", "convert", "stargan", tmp_path / "200000-G.ckpt")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "cache" / "stargan-celeba-256.safetensors").is_file()
    done = shields("models", "check", "stargan", "--size", "32", "--condition", "blond_hair")
    assert done.exit_code == 0, done.stderr + done.stdout
    assert "not_young" in done.stdout
    again = shields("models", "convert", "stargan", tmp_path / "200000-G.ckpt")
    assert again.exit_code == 2
    assert "exists" in again.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("stargan", b"not a checkpoint", "damaged, or holds more than tensors"),
        ("stargan", None, "there is no file"),
        ("instruct-pix2pix", b"", "is used as published"),
        ("relgan", b"a PyTorch file", "sign = -1"),
    ],
)
def test_what_cannot_be_converted_says_why(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    source = tmp_path / "200000-G.ckpt"
    if content is not None:
        source.write_bytes(content)
    done = shields("models", "convert", name, source, "--weights-dir", tmp_path)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert list(tmp_path.glob("*.part")) == []


def test_networks_are_listed_with_licence_and_source(tmp_path: Path) -> None:
    write_card(
        tmp_path, "mine", "manipulator", "stargan", file="mine.safetensors",
        extra='licence = "MIT"\nsource = "me"\nsummary = "forges"\n',
    )  # fmt: skip
    rows = json.loads(shields("list", "manipulators", "--weights-dir", tmp_path, "--json").stdout)[
        "manipulators"
    ]
    assert rows["mine"] | {"role": ""} == {
        "name": "mine", "role": "", "licence": "MIT", "summary": "forges", "weights": "missing",
        "from": "me",
    }  # fmt: skip
    assert {"stargan", "aggan", "fpgan", "relgan", "hisd"} <= set(rows)
    assert all(row["licence"] and row["from"] for row in rows.values())
    text = shields("list", "manipulators", "--weights-dir", tmp_path).stdout
    assert "licence: MIT" in text
    assert "module:factory" in text


def test_a_photo_is_protected_against_a_users_own_manipulator(module: Path) -> None:
    pixels = (tiny.faces_image(1, 64)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(module / "photo.png")
    done = shields(
        "protect", module / "photo.png", "--method", "disrupting", "--region", "photo",
        "--manipulator", "forgers_of_mine:fine", "--steps", 2, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    wrong = shields(
        "protect", module / "photo.png", "--method", "disrupting", "--region", "photo",
        "--manipulator", "forgers_of_mine:fine", "--condition", "blond", "--overwrite",
    )  # fmt: skip
    assert wrong.exit_code != 0
    assert "blond" in wrong.stderr
