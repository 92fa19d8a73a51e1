"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shields import models
from shields.weights import WeightStore
from tests import tiny
from tests.cards import save_every_architecture
from tests.climbing import SIZE
from tests.commands import Loader, card


@pytest.fixture
def image():
    return tiny.faces_image(2, SIZE)


@pytest.fixture
def mask():
    return torch.ones(2, 1, SIZE, SIZE)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A folder of cards and weights of every architecture."""
    folder = tmp_path_factory.mktemp("weights")
    save_every_architecture(folder)
    return WeightStore(folder)


@pytest.fixture
def weights(tmp_path: Path) -> Any:
    """A folder with an autoencoder `small-ae` and a recognizer `small-face`."""
    folder = tmp_path / "weights"
    folder.mkdir()
    card(folder, "small-ae", "autoencoder", tiny.autoencoder(1))
    card(folder, "small-face", "recognizer", tiny.recognizer(1))
    models.AUTOENCODERS.add("tiny", Loader(tiny.autoencoder))
    models.RECOGNIZERS.add("tiny", Loader(tiny.recognizer))
    yield folder
    models.AUTOENCODERS.remove("tiny")
    models.RECOGNIZERS.remove("tiny")
