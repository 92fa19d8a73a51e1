"""Sample sheets: their rows, one a manipulator, and where they go."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from shields.models.manipulation import Manipulator, wrap
from tests import tiny
from tests.training import trainer
from trainers.sheets import sample_sheet, show_sheets

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Showing(pl.LightningModule):
    """Protects by making lighter, against what makes negatives and what does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.forged = 0
        self.manipulators = [self._manipulator("not.hing"), self._manipulator("negative")]

    def _manipulator(self, name: str) -> Manipulator:
        def forge(image: Tensor, condition: str) -> Tensor:
            self.forged += 1
            return 1 - image if condition == "negative" else image

        made = wrap(forge, conditions=(name, "unused"), native_range="unit")
        made.name = name
        return made

    def validation_step(self, batch: Tensor, index: int) -> None:
        asked = [manipulator.conditions for manipulator in self.manipulators]
        show_sheets(self, self.manipulators, asked, (batch, batch + 0.02), kind="first_")


def test_the_rows_of_a_sheet_in_closed_form() -> None:
    flat = [torch.full((2, 3, 4, 4), value) for value in (0.25, 0.28, 0.75, 1.5)]
    sheet = sample_sheet(flat[0], flat[1], flat[2], flat[3])
    assert sheet.shape == (3, 20, 8)
    torch.testing.assert_close(sheet[0, ::4, 0], torch.tensor([0.25, 0.28, 0.8, 0.75, 1.0]))


def test_one_sheet_a_manipulator_reaches_the_board(tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="")
    faces = tiny.faces_image(6, 8)
    trainer(tmp_path, logger=logger).validate(
        Showing(), DataLoader(faces, batch_size=6), verbose=False
    )
    events = EventAccumulator(str(tmp_path / "version_0"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"first_sheet/not.hing", "first_sheet/negative"}
    (drawn,) = events.Images("first_sheet/negative")
    with Image.open(io.BytesIO(drawn.encoded_image_string)) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    # Four of the six photos; those below are made of the negative.
    wanted = torch.cat(list(faces[:4]), dim=2)
    assert pixels.shape == (3, 40, 32)
    torch.testing.assert_close(pixels[:, :8], wanted, atol=1 / 254, rtol=0)
    torch.testing.assert_close(pixels[:, 24:32], 1 - wanted, atol=1 / 254, rtol=0)


def test_without_a_board_nothing_is_forged(tmp_path: Path) -> None:
    module = Showing()
    trainer(tmp_path).validate(module, DataLoader(tiny.faces_image(2, 8)), verbose=False)
    assert module.forged == 0
