"""Messages that outlast a manipulator: networks, error rate, and a few steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from shields.errors import ConfigError
from tests import cards, tiny
from trainers.data import FacePacks
from trainers.forensics import ForensicsTraining, MessageDecoder, MessageEncoder, bit_error_rate

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_a_mark_stays_inside_its_budget_and_depends_on_the_message() -> None:
    with tiny.seeded(0):
        encoder = MessageEncoder(bits=4, width=8, levels=5.1)
    face = tiny.faces_image(2, 16)
    none, every = (encoder(face, torch.full((2, 4), value)) for value in (0.0, 1.0))
    assert float(none.abs().max()) <= 5.1 / 255
    assert not torch.allclose(none, every)


def test_a_message_can_be_learnt_without_a_manipulator() -> None:
    with tiny.seeded(0):
        encoder, decoder = MessageEncoder(2, 8, levels=25.5), MessageDecoder(2, 8, depth=1)
    rng = torch.Generator().manual_seed(0)
    face = torch.full((16, 3, 8, 8), 0.5)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    for _ in range(150):
        message = torch.randint(2, (16, 2), generator=rng).float()
        logits = decoder(face + encoder(face, message))
        loss = (logits.sigmoid() - message).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A batch that was not trained on.
    message = torch.randint(2, (16, 2), generator=rng).float()
    with torch.no_grad():
        logits = decoder(face + encoder(face, message))
    assert float(bit_error_rate(logits, message).mean()) < 0.1


@pytest.mark.parametrize("strategy", ["mgda", "dtp"])
def test_every_parameter_learns(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tiny.seeded(0):
        cards.save_manipulators(tmp_path)
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path))
    save_file(
        {
            "faces": (tiny.faces_image(20, 48) * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(20, 48),
            "identity": torch.arange(20) // 2,
        },
        tmp_path / "pack.safetensors",
        metadata={"identities": json.dumps([f"person {i}" for i in range(10)])},
    )
    pl.seed_everything(0, verbose=False)
    training = ForensicsTraining(
        ("small-stargan", "small-fpgan"), strategy=strategy, bits=4, width=4, size=16
    )
    before = {name: value.detach().clone() for name, value in training.named_parameters()}
    run = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, max_epochs=1, limit_val_batches=1,
    )  # fmt: skip
    packs = FacePacks([tmp_path / "pack.safetensors"], batch=2, batches=2, share=0.4)
    run.fit(training, packs)
    for name, value in training.named_parameters():
        assert not torch.equal(before[name], value), name
    assert 0 <= float(run.callback_metrics["val_bit_error"]) <= 1


def test_strategies_with_a_prior_want_one() -> None:
    with pytest.raises(ConfigError, match="wants `alpha`"):
        ForensicsTraining((), strategy="kpi", alpha=(1.0,))
