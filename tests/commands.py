"""Running `shields` in this process, on tiny networks that are found through real cards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from shields.cli import app
from shields.models.base import Frozen
from shields.weights import Card

QUICK = ("--steps", "2", "--device", "cpu")


class Loader:
    """An architecture's entry: fills a stand-in from its weights file."""

    def __init__(self, build: Any) -> None:
        self.build = build

    def load(self, source: Path, card: Card) -> Frozen:
        network: Frozen = self.build(1)
        network.load_state_dict(load_file(source))
        return network


def card(folder: Path, name: str, role: str, network: nn.Module) -> None:
    """Write a network's weights and the card that describes them."""
    save_file(network.state_dict(), folder / f"{name}.safetensors")
    digest = hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
    (folder / f"{name}.toml").write_text(
        f'name = "{name}"\nrole = "{role}"\narchitecture = "tiny"\nsummary = "a stand-in"\n'
        f'file = "{name}.safetensors"\nsha256 = "{digest}"\nlicence = "Apache-2.0"\n'
    )


def shields(*arguments: str | Path) -> Any:
    """Run the command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tiny_networks(weights: Path) -> list[str]:
    names = ["--weights-dir", str(weights), "--autoencoder", "small-ae"]
    return [*names, "--recognizer", "small-face"]
