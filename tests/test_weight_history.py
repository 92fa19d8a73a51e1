"""Weight histories: what is collected, resumed and drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from shields.errors import ConfigError, MissingPackage, OutputError
from tests.training import trainer
from trainers import weight_history
from trainers.data import batches_done
from trainers.weight_history import WeightHistory, draw_history

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Weighing(pl.LightningModule):
    """Logs weights that depend on the batch's number alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        now = torch.tensor(float(batches_done(self.trainer)))
        self.log_dict({"weight_a": 1 / (1 + now), "indicator_a": now / 10, "gain_a": now})
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Tensor]:
    return DataLoader(torch.zeros(4, 1))


def fit(folder: Path, history: WeightHistory, epochs: int, **settings: object) -> pl.Trainer:
    checkpoint = pl.callbacks.ModelCheckpoint(
        folder, save_last=True, save_on_train_epoch_end=True, enable_version_counter=False
    )
    resumed = settings.pop("ckpt_path", None)
    run = trainer(
        folder, max_epochs=epochs, callbacks=[checkpoint, history], limit_val_batches=0,
        default_root_dir=folder, **settings,
    )  # fmt: skip
    run.fit(Weighing(), loader(), ckpt_path=resumed)
    return run


def test_points_are_what_was_logged_every_few_batches(tmp_path: Path) -> None:
    history = WeightHistory(every=2, folder=tmp_path / "drawn")
    fit(tmp_path, history, 2)
    assert set(history.history) == {"weight_a", "indicator_a"}
    batches, weights = zip(*history.history["weight_a"], strict=True)
    assert batches == (1, 2, 4, 6, 8)
    # A step logs how many were done before it.
    assert weights == pytest.approx([1 / batch for batch in batches])
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["weights.png"]


def test_a_resumed_run_draws_all_of_it(tmp_path: Path) -> None:
    through = WeightHistory(every=1)
    fit(tmp_path / "through", through, 3)
    fit(tmp_path / "half", WeightHistory(every=1), 2)
    # Checkpoints are opened as tables of plain values wherever they are opened.
    torch.load(tmp_path / "half" / "last.ckpt", weights_only=True)
    resumed = WeightHistory(every=1)
    fit(tmp_path / "half", resumed, 3, ckpt_path=tmp_path / "half" / "last.ckpt")
    assert len(resumed.history["weight_a"]) == 12
    assert resumed.history == through.history


def test_the_picture_reaches_the_loggers_folder_and_tensorboard(tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="run")
    fit(tmp_path, WeightHistory(every=1), 1, logger=logger)
    with Image.open(tmp_path / "run" / "version_0" / "weights.png") as picture:
        size = picture.size
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    (drawn,) = events.Images("weights")
    assert (drawn.width, drawn.height) == size
    assert drawn.step == 4


def test_without_logger_and_folder_nothing_is_written(tmp_path: Path) -> None:
    fit(tmp_path, WeightHistory(every=1), 1)
    assert not list(tmp_path.rglob("*.png"))


def test_every_manipulator_has_its_line_and_every_kind_its_panel() -> None:
    def shares(*names: str) -> dict[str, list[tuple[int, float]]]:
        return {name: [(0, 0.2 + 0.3 * place), (9, 0.5)] for place, name in enumerate(names)}

    def hues(picture: Image.Image) -> set[tuple[int, int, int]]:
        pixels = picture.getcolors(maxcolors=2**20) or []
        return {colour for count, colour in pixels if count > 100}

    one = draw_history(shares("weight_a"))
    two = draw_history(shares("weight_a", "weight_b"))
    assert (31, 119, 180) in hues(one)  # the first two of matplotlib's colours
    assert hues(two) >= {(31, 119, 180), (255, 127, 14)}
    assert (255, 127, 14) not in hues(one)
    assert draw_history(shares("weight_a", "loss_a")).height > 1.5 * one.height


def test_mistakes_are_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="1 batch or more, got 0"):
        WeightHistory(every=0)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        fit(tmp_path, WeightHistory(every=1, folder=tmp_path / "file"), 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    fresh = weight_history.Registry("figure", {"matplotlib": "matplotlib.figure:Figure"})
    monkeypatch.setattr(weight_history, "_FIGURES", fresh)
    with pytest.raises(MissingPackage, match="pip install matplotlib"):
        fit(tmp_path, WeightHistory(), 1)
