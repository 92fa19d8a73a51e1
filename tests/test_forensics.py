"""Messages that outlast a manipulator: networks, error rate, and a few steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from shields.errors import ConfigError, WeightsError
from shields.transforms import Jpeg
from shields.weights import Card
from tests import cards, tiny
from tests.training import trainer
from trainers.data import FacePacks
from trainers.export import export_checkpoint
from trainers.forensics import (
    ForensicsTraining,
    MessageDecoder,
    MessageEncoder,
    bit_error_rate,
    load_messages,
)

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


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty faces of ten people, and beside them small manipulators with cards."""
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
    return tmp_path / "pack.safetensors"


def small(**settings: object) -> ForensicsTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "manipulators": ("small-stargan", "small-fpgan"), "bits": 4, "width": 4, "size": 16,
    }  # fmt: skip
    return ForensicsTraining(**(defaults | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings", [{"strategy": "mgda"}, {"strategy": "dtp", "handling": "jpeg:50..95"}]
)
def test_every_parameter_learns(settings: dict[str, object], packed: Path, tmp_path: Path) -> None:
    training = small(**settings)
    before = {name: value.detach().clone() for name, value in training.named_parameters()}
    run = trainer(tmp_path, max_epochs=1)
    run.fit(training, FacePacks([packed], batch=2, batches=2, share=0.4))
    for name, value in training.named_parameters():
        assert not torch.equal(before[name], value), name
    found = {name: float(value) for name, value in run.callback_metrics.items()
             if name.startswith("val_bit_error")}  # fmt: skip
    names = ("small-stargan", "small-fpgan")
    for way in ("val_bit_error", "val_bit_error_jpeg"):
        assert found[way] == pytest.approx(sum(found[f"{way}_{name}"] for name in names) / 2)
        assert 0 <= found[f"{way}_none"] <= 1
    assert 0 < float(run.callback_metrics["val_ssim"]) <= 1


def test_errors_are_of_the_photo_that_was_handled_and_forged(packed: Path) -> None:
    training = small(manipulators=("small-stargan",))
    face = tiny.faces_image(4, 16)
    forged = {name: training._manipulators[0](face, name) for name in training._asked[0]}
    message = (training.decoder(forged["smiling"]) > 0).float()
    found = training._errors(face, message, "val")
    errors = [bit_error_rate(training.decoder(image), message).mean() for image in forged.values()]
    assert float(found["val_small-stargan"]) == pytest.approx(float(torch.stack(errors).mean()))
    own = bit_error_rate(training.decoder(face), message).mean()
    assert float(found["val_none"]) == float(own)


class TestExport:
    @pytest.fixture
    def exported(self, packed: Path, tmp_path: Path) -> Path:
        packs = FacePacks([packed], batch=2, batches=2, share=0.4)
        trainer(tmp_path / "run", max_epochs=1).fit(small(), packs)
        return export_checkpoint(
            "forensics", tmp_path / "run" / "last.ckpt", packed, tmp_path / "out", Path("my.yaml"),
            called="tiny-messages",
        )  # fmt: skip

    def test_what_is_loaded_reads_the_same_bits(self, exported: Path, tmp_path: Path) -> None:
        training = ForensicsTraining.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
        for value in training.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
        model = load_messages(exported)
        assert load_messages(exported.with_suffix(".safetensors")).name == "tiny-messages"
        face, message = tiny.faces_image(3, 24), torch.tensor([[1.0, 0, 0, 1]]).expand(3, -1)
        marked = model.mark(face, message)
        assert torch.equal(marked, (face + training.encoder(face, message)).clamp(0, 1))
        seen = Jpeg().apply(marked, quality=75)
        assert torch.equal(model.decoder(seen), training.decoder(seen))
        assert torch.equal(model.read(seen), (training.decoder(seen) > 0).float())

    def test_the_card_tells_error_rates_one_by_one(self, exported: Path) -> None:
        card = Card.read(exported)
        assert dict(card.config) == {"bits": 4, "width": 4, "levels": 6.375}
        ways = ("none", "small-stargan", "small-fpgan")
        wanted = {f"bit_error{jpeg}_{way}" for jpeg in ("", "_jpeg") for way in ways}
        assert wanted | {"bit_error", "bit_error_jpeg", "psnr", "ssim"} == set(card.results)

    def test_as_a_generator_it_draws_one_message_for_a_batch(self, exported: Path) -> None:
        model = load_messages(exported)
        face = tiny.faces_image(2, 24)

        def made(seed: int, levels: float = 4.0) -> torch.Tensor:
            rng = torch.Generator().manual_seed(seed)
            return model.perturb(face, levels=levels, rng=rng)

        assert torch.equal(made(0), made(0))
        assert any(not torch.equal(made(0), made(seed)) for seed in (1, 2, 3))
        assert float(made(0).abs().max()) <= 4 / 255
        torch.testing.assert_close(made(0, 2.0), made(0) / 2)
        drawn = torch.randint(2, (1, 4), generator=torch.Generator().manual_seed(0)).float()
        wanted = model.mark(face, drawn.expand(2, -1), levels=4.0) - face
        torch.testing.assert_close(made(0), wanted)

    def test_wrong_messages_and_cards_say_so(self, exported: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"must be \(2, 4\), got \(2, 5\)"):
            load_messages(exported).mark(tiny.faces_image(2, 24), torch.zeros(2, 5))
        with pytest.raises(WeightsError, match="holds a 'stargan', needed is a 'message'"):
            load_messages(tmp_path / "small-stargan.toml")


def test_strategies_with_a_prior_want_one() -> None:
    with pytest.raises(ConfigError, match="wants `alpha`"):
        ForensicsTraining((), strategy="kpi", alpha=(1.0,))
