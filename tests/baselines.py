"""What the trainers of the learned baselines are tested on, and what all of them promise."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from PIL import Image as PillowImage
from safetensors.torch import save_file
from torch import Tensor

from shields.models import load
from shields.models.generators import Generator
from shields.models.networks import FaceEmbedder, PortraitAutoencoder
from shields.models.star_networks import FixedPointGenerator, StarGenerator
from shields.weights import Card, WeightStore
from tests import cards, tiny
from tests.training import PowerCut, trainer
from trainers.data import FacePacks
from trainers.disruption_measure import DisruptionTraining
from trainers.export import export_checkpoint

__all__ = ["QUIET", "Watch", "check_bound_after_png", "check_recipe", "check_resume", "exported",
           "fit", "packs", "save_everything"]  # fmt: skip

#: Lightning speaks to people at a terminal; its advice is not a fault of ours
QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CONFIGS = Path(__file__).parents[1] / "trainers" / "configs"


def save_everything(folder: Path) -> Path:
    """Twelve faces of six people, smiling or not, and beside them cards of small networks."""
    path = folder / "faces.safetensors"
    save_file(
        {
            "faces": (tiny.faces_image(12, 40) * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(12, 40),
            "identity": torch.arange(12) // 2,
            "labels": (torch.arange(12) % 2)[:, None],
        },
        path,
        metadata={
            "identities": json.dumps([f"person {i}" for i in range(6)]),
            "attributes": json.dumps(["Smiling"]),
        },
    )
    smiling = '[config]\nattributes = ["Smiling"]\nnative_size = 16\n'
    with tiny.seeded(0):
        for name, kind in (("stargan", StarGenerator), ("fpgan", FixedPointGenerator)):
            network = kind(1, width=8, blocks=2)
            for parameter in network.parameters():  # far enough from zero for forgeries to differ
                parameter.data.mul_(2.0)
            cards.save_file_model(folder, f"small-{name}", "manipulator", name, network, smiling)
        cards.save_file_model(
            folder, "small-ae", "autoencoder", "portrait-ae",
            PortraitAutoencoder(fine=8, coarse=8, blocks=1, latent_channels=4),
            "[config]\nfine = 8\ncoarse = 8\nblocks = 1\nlatent_channels = 4\n",
        )  # fmt: skip
        cards.save_file_model(
            folder, "small-face", "recognizer", "face-embedder",
            cards.randomised(
                FaceEmbedder(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), dimensions=16), 1
            ),
            "[config]\nwidths = [8, 8, 8, 8]\nblocks = [1, 1, 1, 1]\ndimensions = 16\n",
        )  # fmt: skip
    return path


def packs(path: Path, batches: int) -> FacePacks:
    return FacePacks([path], batch=4, batches=batches, share=0.4, attributes=("Smiling",))


class Watch(pl.Callback):
    """Keeps what was logged at every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object,
        batch_idx: int,
    ) -> None:  # fmt: skip
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def change(self, name: str) -> float:
        """The mean of the last five values, less that of the first five."""
        values = [seen[name] for seen in self.seen if name in seen]
        return sum(values[-5:]) / 5 - sum(values[:5]) / 5


def fit(module: pl.LightningModule, path: Path, folder: Path, batches: int = 20) -> Watch:
    watch = Watch()
    settings: dict[str, object] = {"max_epochs": 1, "limit_val_batches": 0, "callbacks": [watch]}
    trainer(folder, enable_checkpointing=False, **settings).fit(module, packs(path, batches))
    return watch


def check_resume(make: Callable[[], DisruptionTraining], path: Path, folder: Path) -> None:
    """A run that was cut at the third batch and resumed ends where an undisturbed one does."""
    through = make()
    trainer(folder / "through", max_epochs=2).fit(through, packs(path, 2))
    first = trainer(folder / "half", max_epochs=2)
    first.callbacks.append(PowerCut())
    with pytest.raises(ConnectionError):
        first.fit(make(), packs(path, 2))
    resumed = make()
    trainer(folder / "half", max_epochs=2).fit(
        resumed, packs(path, 2), ckpt_path=folder / "half" / "last.ckpt"
    )
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def check_bound_after_png(module: DisruptionTraining) -> None:
    """What validation measures is what a file can hold: whole levels inside the budget."""
    face = (tiny.faces_image(2, 16) * 255).round() / 255
    face[..., :3, :3], face[..., -3:, -3:] = 0.0, 1.0
    for clean, protected in zip(face, module.protect(face), strict=True):
        before, after = (_through_png(image) for image in (clean, protected))
        moved = np.abs(after.astype(int) - before)
        assert 0 < moved.max() <= int(module.levels)
        assert np.abs(protected.permute(1, 2, 0).numpy() * 255 - after).max() < 1e-3


def _through_png(image: Tensor) -> np.ndarray:
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "PNG")
    return np.asarray(PillowImage.open(file))


def exported(
    name: str, module: DisruptionTraining, path: Path, folder: Path
) -> tuple[Card, Generator]:
    """Train one batch, export, and load through the registry; halve the module as was shipped."""
    trainer(folder / "run", max_epochs=1).fit(module, packs(path, 1))
    checkpoint = folder / "run" / "last.ckpt"
    card = export_checkpoint(name, checkpoint, path, folder, Path("r.yaml"), called="shipped")
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())
    network = load("generator", str(card), store=WeightStore(), device=torch.device("cpu"))
    return Card.read(card), network


def check_recipe(name: str, kind: type) -> None:
    """The recipe of a name asks for settings that there are."""
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert set(recipe["model"]) <= set(inspect.signature(kind).parameters)
    assert set(recipe["data"]) <= set(inspect.signature(FacePacks).parameters)
