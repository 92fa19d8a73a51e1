"""Training that gets a SIGTERM saves itself between two batches and goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from shields.models.networks import PortraitAutoencoder
from tests import cards, tiny
from tests.training import trainer
from trainers.ars import ArsTraining
from trainers.data import FacePacks, batches_done
from trainers.interruption import SaveOnSigterm

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Twelve faces of six people, and beside them the card of a small autoencoder."""
    folder = tmp_path_factory.mktemp("networks")
    path = folder / "faces.safetensors"
    save_file(
        {
            "faces": (tiny.faces_image(12, 24) * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(12, 24),
            "identity": torch.arange(12) // 2,
        },
        path,
        metadata={"identities": json.dumps([f"person {i}" for i in range(6)])},
    )
    with tiny.seeded(0):
        cards.save_file_model(
            folder, "small-ae", "autoencoder", "portrait-ae",
            PortraitAutoencoder(fine=8, coarse=8, blocks=1, latent_channels=4),
            "[config]\nfine = 8\ncoarse = 8\nblocks = 1\nlatent_channels = 4\n",
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIELDS_CHECKPOINTS", str(folder))
        yield path


class Sigterm(pl.Callback):
    """Sends the signal to this very process, in the midst of a step or of a validation."""

    def __init__(self, batch: int, *, validating: bool = False) -> None:
        self.batch, self.validating = batch, validating

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: object) -> None:
        if not self.validating and batches_done(trainer) == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if self.validating and batches_done(trainer) == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    packed: Path, folder: Path, *callbacks: pl.Callback, path: str | None = None, **settings: object
) -> tuple[ArsTraining, pl.Trainer]:
    """Two epochs of four batches, validated after each."""
    pl.seed_everything(0, verbose=False)
    module = ArsTraining(
        ("small-ae",), widths=(8, 8), channels=8, size=16, adversary_widths=(8, 8), rate=1e-2
    )
    run = trainer(folder, **({"max_epochs": 2} | settings))
    run.callbacks[:0] = [SaveOnSigterm(), *callbacks]  # type: ignore[attr-defined]
    run.fit(module, FacePacks([packed], batch=2, batches=4, share=0.4), ckpt_path=path)
    return module, run


@pytest.fixture(scope="module")
def through(
    packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ArsTraining, pl.Trainer]:
    """A training that nobody disturbed."""
    return fit(packed, tmp_path_factory.mktemp("through"))


@pytest.mark.parametrize(
    ("batch", "validating", "saved"),
    [
        pytest.param(1, False, 2, id="in the midst of an epoch"),
        pytest.param(3, False, 4, id="in the last batch of an epoch"),
        pytest.param(4, True, 4, id="while validating"),
    ],
)
def test_stopping_and_going_on_equals_going_through(
    packed: Path, through: tuple[ArsTraining, pl.Trainer], tmp_path: Path, batch: int,
    validating: bool, saved: int,
) -> None:  # fmt: skip
    undisturbed, whole = through
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        fit(packed, tmp_path / "halves", Sigterm(batch, validating=validating))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoint = torch.load(tmp_path / "halves" / "last.ckpt", weights_only=True)
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert set(progress.values()) == {saved}
    resumed, second = fit(packed, tmp_path / "halves", path="last")
    assert batches_done(second) == batches_done(whole) == 8
    assert second.current_epoch == whole.current_epoch == 2
    assert second.global_step == whole.global_step
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # Two epochs are two validations, whichever run did them.
    assert second.callback_metrics.keys() == whole.callback_metrics.keys()
    for name, value in whole.callback_metrics.items():
        assert torch.equal(value, second.callback_metrics[name]), name


def test_without_a_signal_nothing_is_saved_or_stopped(packed: Path, tmp_path: Path) -> None:
    _, run = fit(packed, tmp_path, enable_checkpointing=False, callbacks=[])
    assert batches_done(run) == 8
    assert list(tmp_path.rglob("*.ckpt")) == []


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_interruption import fit
import pytorch_lightning as pl

class Ready(pl.Callback):
    def on_train_batch_end(self, *_):
        Path({ready!r}).touch()

fit(Path({packed!r}), Path({folder!r}), Ready(), max_epochs=100_000, limit_val_batches=0)
"""


def test_a_process_that_is_ended_says_how_to_go_on(packed: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = SCRIPT.format(
        root=str(ROOT), ready=str(ready), packed=str(packed), folder=str(tmp_path / "run")
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 143, told
    last = tmp_path / "run" / "last.ckpt"
    assert told.splitlines()[-1] == f"stopped by SIGTERM; to go on, add --ckpt_path {last}"
    loops = torch.load(last, weights_only=True)["loops"]
    assert loops["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] >= 1
