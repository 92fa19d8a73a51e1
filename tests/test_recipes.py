"""The recipes in `trainers/configs`: what they save, and that they still parse."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

RECIPES = sorted((Path(__file__).parents[1] / "trainers" / "configs").glob("*.yaml"))


def savers(recipe: Path) -> list[dict[str, object]]:
    """The settings of a recipe's checkpoints."""
    callbacks = yaml.safe_load(recipe.read_text(encoding="utf-8"))["trainer"]["callbacks"]
    return [each["init_args"] for each in callbacks if each["class_path"].endswith("Checkpoint")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_keeps_the_last_state_beside_the_best(recipe: Path) -> None:
    *best, last = savers(recipe)
    assert [(each["filename"], each["dirpath"]) for each in best] in (
        [], [("best", last["dirpath"])]
    )  # fmt: skip
    assert all("monitor" in each for each in best)
    assert last["filename"] == "last"
    assert "monitor" not in last
    assert last["enable_version_counter"] is False


class Stuck(pl.LightningModule):
    """A network whose validation never gets better."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return (self.weight - batch[0]).square().mean()

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("val_progress", 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)
def test_the_last_state_is_kept_where_the_best_does_not_change(tmp_path: Path) -> None:
    settings = savers(Path(__file__).parents[1] / "trainers" / "configs" / "ars-smile.yaml")
    savers_here = [
        pl.callbacks.ModelCheckpoint(**{**each, "dirpath": tmp_path})  # type: ignore[arg-type]
        for each in settings
    ]
    loader = DataLoader(TensorDataset(torch.ones(4, 1)))
    trainer = pl.Trainer(
        max_epochs=3, callbacks=savers_here, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Stuck(), loader, loader)
    steps = {
        name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["global_step"]
        for name in ("best", "last")
    }
    assert steps == {"best": 4, "last": 12}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
