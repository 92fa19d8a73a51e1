"""Cards and weights of finished trainings: numbers as they are, the command, no half a file."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from shields.errors import OutputError
from shields.models.ars_network import ArsGenerator
from shields.models.generators import ArsModel
from shields.weights import Card
from trainers import export as exporting
from trainers.export import Recipe, export

FACTS = Recipe(
    name="tiny", role="generator", architecture="ars", summary="", licence="", data="",
    teacher="", command="", seed=0, steps=1,
)  # fmt: skip


class Training:
    """The settings of a training, as a trainer's constructor names them."""

    def __init__(
        self, variant: str = "ars", levels: float = 12.75, budgets: tuple[float, ...] = ()
    ) -> None:
        self.settings = {"variant": variant, "levels": levels, "budgets": budgets}


def test_settings_of_the_network_are_not_rounded(tmp_path: Path) -> None:
    levels = 12.34567
    settings = {"widths": [8, 8], "encoder": [8], "channels": 8, "two_way": False,
                "levels": levels, "budgets": [4.0, levels]}  # fmt: skip
    network = ArsGenerator(**settings)
    card = Card.read(export(network.state_dict(), settings, FACTS, {"val_x": 1 / 3}, tmp_path))
    assert card.results["x"] == 0.3333
    assert ArsModel.load(tmp_path / card.file, card).levels == levels


def test_the_command_says_what_was_set_otherwise_than_in_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text("model: {levels: 16, budgets: [4, 16]}\n")
    as_written = Training(levels=16.0, budgets=(4.0, 16.0)).settings
    command = exporting._command("ars", recipe, Training, as_written)
    assert shlex.split(command) == ["shields", "train", "ars", "fit", "--config", str(recipe)]
    changed = Training("basic", 16.0, (8.0, 16.0)).settings
    words = shlex.split(exporting._command("ars", recipe, Training, changed))
    assert words[6:] == ["--model.variant", '"basic"', "--model.budgets", "[8.0, 16.0]"]
    absent = exporting._command("ars", tmp_path / "none.yaml", Training, Training("basic").settings)
    assert absent == """shields train ars fit --model.variant '"basic"'"""


def test_a_failure_leaves_what_was_there_and_no_part(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").mkdir()
    with pytest.raises(OutputError, match=r"cannot write .*tiny\.toml"):
        export({"x": torch.zeros(1)}, {}, FACTS, {}, tmp_path)
    assert not list(tmp_path.glob("*.part"))
