"""The command line says what there is: methods, settings, networks, weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shields.protectors import PROTECTORS
from tests.commands import shields


def test_protectors_are_listed_with_a_line_each() -> None:
    found = json.loads(shields("list", "--json").stdout)["protectors"]
    assert list(found) == list(PROTECTORS)
    assert all(line.endswith((".", ")")) for line in found.values()), found
    assert "facelock" in shields("list", "protectors").stdout


def test_a_methods_settings_are_explained() -> None:
    done = json.loads(shields("list", "facelock", "--json").stdout)
    assert done["settings"]["levels"] == 8
    assert done["presets"]["paper"]["levels"] == 2.55
    text = " ".join(shields("list", "facelock").stdout.split())
    assert "number of updates" in text
    done = shields("list", "facelok")
    assert done.exit_code == 2
    assert "facelock" in done.stderr


@pytest.mark.parametrize("kind", ["recognizers", "autoencoders", "perceptual", "transforms"])
def test_other_kinds_are_listed(kind: str) -> None:
    found = json.loads(shields("list", kind, "--json").stdout)[kind]
    assert found
    assert all(found.values())


def test_cards_are_listed_shown_and_verified(weights: Path) -> None:
    place = ("--weights-dir", weights)
    rows = json.loads(shields("models", "list", *place, "--json").stdout)["models"]
    states = {row["name"]: row["state"] for row in rows}
    assert states["small-ae"] == states["small-face"] == "here"
    shown = json.loads(shields("models", "show", "small-ae", *place, "--json").stdout)
    assert (shown["licence"], shown["weights"]) == ("Apache-2.0", "here")
    assert "a stand-in" in shields("models", "show", "small-ae", *place).stdout
    assert shields("models", "verify", "small-ae", "small-face", *place).exit_code == 0
    pulled = shields("models", "pull", "small-ae", *place)
    assert "small-ae.safetensors" in pulled.stdout.replace("\n", "")
    (weights / "small-ae.safetensors").write_bytes(b"rotten")
    done = shields("models", "verify", *place, "--json")
    assert done.exit_code == 1
    verdicts = json.loads(done.stdout)["models"]
    assert verdicts["small-ae"].startswith("damaged")
    assert verdicts["small-face"].startswith("good")
    (weights / "small-ae.safetensors").unlink()
    assert shields("models", "verify", "small-ae", *place).exit_code == 1
    assert shields("models", "pull", "small-ae", *place).exit_code == 1
    assert shields("models", "pull", "small-eel", *place).exit_code == 2
    assert shields("models", "show", "small-eel", *place).exit_code == 2


def test_the_version_is_told() -> None:
    import shields as package

    assert shields("--version").stdout.strip() == f"shields {package.__version__}"
