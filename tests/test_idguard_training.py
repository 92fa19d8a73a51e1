"""ID-Guard's trainer on a sliver of data: steps, strategies, resuming, exporting, measuring."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shields.card import Card
from shields.errors import ConfigError
from shields.models.idguard import IdGuardModel
from shields.models.manipulation import wrap
from tests import cards, tiny, training
from trainers.data import FacePacks
from trainers.export import Recipe, export
from trainers.idguard import IdGuardTraining
from trainers.idguard_faces import cut_faces, face_distance, success

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small networks with cards, and twenty packed faces of ten people."""
    path = tmp_path_factory.mktemp("networks")
    with tiny.seeded(0):
        cards.save_manipulators(path)
        cards.save_file_model(
            path, "small-ae", "autoencoder", "portrait-ae",
            cards.PortraitAutoencoder(fine=8, coarse=8, blocks=1, latent_channels=4),
            "[config]\nfine = 8\ncoarse = 8\nblocks = 1\nlatent_channels = 4\n",
        )  # fmt: skip
        cards.save_file_model(
            path, "small-face", "recognizer", "face-embedder",
            cards.randomised(
                cards.FaceEmbedder(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), dimensions=16), 1
            ),
            "[config]\nwidths = [8, 8, 8, 8]\nblocks = [1, 1, 1, 1]\ndimensions = 16\n",
        )  # fmt: skip
    save_file(
        {
            "faces": (tiny.faces_image(20, 48) * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(20, 48),
            "identity": torch.arange(20) // 2,
        },
        path / "pack.safetensors",
        metadata={"identities": json.dumps([f"person {i}" for i in range(10)])},
    )
    return path


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> IdGuardTraining:
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(folder))
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "manipulators": ("small-stargan", "small-ae"), "recognizer": "small-face",
        "judge": "small-face", "surrogate": "small-ae", "settings": {"width": 4, "blocks": 1},
        "heat": "none", "prior_batches": 1, "size": 32,
    }  # fmt: skip
    return IdGuardTraining(**(defaults | settings))  # type: ignore[arg-type]


trainer = functools.partial(training.trainer, max_epochs=1)


def packs(folder: Path, batches: int) -> FacePacks:
    return FacePacks([folder / "pack.safetensors"], batch=2, batches=batches, share=0.4)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "kpi", "heat": "grad-cam++"},
        {"strategy": "mgda", "handling": "jpeg:60..95"},
        {"strategy": "dtp", "network": "unet", "settings": {"width": 4, "depth": 3}},
        {"strategy": "equal", "prior": "none", "preset": "paper"},
    ],
)
def test_every_parameter_learns(
    settings: dict[str, object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = module(folder, monkeypatch, **settings)
    before = {name: value.detach().clone() for name, value in training.named_parameters()}
    run = trainer(tmp_path, limit_val_batches=1)
    run.fit(training, packs(folder, 2))
    still = [
        name for name, value in training.named_parameters() if torch.equal(before[name], value)
    ]
    assert still == []
    weights = [
        float(run.logged_metrics[f"weight_{name}"]) for name in ("small-stargan", "small-ae")
    ]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert 0 <= float(run.callback_metrics["val_success"]) <= 1
    if training.universal is not None:
        assert float(training.universal.value.detach().abs().max()) <= 6.375 / 255 + 1e-7


def test_the_prior_and_alpha_are_measured_before_the_first_step(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = module(folder, monkeypatch, rate=0.0, universal_rate=0.0)
    trainer(tmp_path).fit(training, packs(folder, 1))
    assert bool(training.prepared)
    assert training.universal is not None
    assert float(training.universal.value.detach().abs().max()) > 0
    alpha = training.strategy.prior
    assert float(alpha.min()) == 1
    assert torch.equal(alpha.log10(), alpha.log10().round())


def test_training_widens_what_it_maximises(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = module(
        folder, monkeypatch, manipulators=("small-stargan",), rate=3e-3,
        conditions={"small-stargan": ["smiling"]}, region=(1.0, 1.0), prior="random",
    )  # fmt: skip
    gains: list[float] = []
    monkeypatch.setattr(
        training, "_log", lambda weights, indicators, found: gains.append(float(found[0]))
    )
    trainer(tmp_path, limit_val_batches=0).fit(training, packs(folder, 20))
    assert sum(gains[-5:]) > 1.1 * sum(gains[:5])


def test_stop_and_resume_equals_going_through(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = module(folder, monkeypatch)
    settings = {"limit_val_batches": 0}
    # Both know the whole length: the learning rate falls towards it.
    trainer(tmp_path / "a", max_epochs=2, **settings).fit(through, packs(folder, 2))
    first = module(folder, monkeypatch)
    monkeypatch.setattr(pl.Trainer, "estimated_stepping_batches", 4)
    trainer(tmp_path / "b", max_epochs=1, **settings).fit(first, packs(folder, 2))
    second = module(folder, monkeypatch)
    trainer(tmp_path / "b", max_epochs=2, **settings).fit(
        second, packs(folder, 2), ckpt_path=tmp_path / "b" / "last.ckpt"
    )
    for (name, wanted), found in zip(
        through.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(wanted, found), name


def test_what_is_exported_loads_and_perturbs_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = module(folder, monkeypatch)
    trainer(tmp_path / "run").fit(training, packs(folder, 1))
    with torch.no_grad():
        for value in training.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    state, config = training.export()
    facts = Recipe(name="idguard", command="", seed=0, steps=1, **training.CARD)
    card = Card.read(export(state, config, facts, {}, tmp_path))
    file = tmp_path / "idguard.safetensors"
    assert load_file(file)["universal"].dtype == torch.float16
    loaded = IdGuardModel.load(file, card)
    face = tiny.faces_image(2, 32)
    with torch.no_grad():
        assert training.universal is not None
        wanted = training._made(training.averaged.eval(), face, training.universal((32, 32)))
    made = loaded.perturb(face, levels=6.375, rng=torch.Generator())
    torch.testing.assert_close(made, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"alpha": (1.0,)}, "2 numbers"),
        ({"terms": {"masc": 1}}, "no term is called masc"),
        ({"preset": "papers"}, "no preset"),
        ({"size": 30}, "multiple of 4"),
        ({"conditions": {"small-stargam": ["smiling"]}}, "did you mean small-stargan"),
        ({"conditions": {"small-ae": []}}, "are empty"),
    ],
)
def test_settings_are_checked(
    wrong: dict[str, object], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=said):
        module(folder, monkeypatch, **wrong)


def test_landmarks_follow_the_cut() -> None:
    """A white pixel at each landmark is still there after cutting and mirroring."""
    points = torch.tensor([[12.0, 14], [28, 13], [20, 20], [14, 27], [26, 28]])
    face = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    for x, y in points.int().tolist():
        face[..., y, x] = 255
    mirrored = set()
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        batch = {"face": face, "landmarks": points[None]}
        cut, found = cut_faces(batch, 36, (0.9, 0.9), rng)
        for x, y in found[0].round().int().tolist():
            assert cut[0, 0, y, x] > 0.9
        assert found[0, 0, 0] < found[0, 1, 0]
        mirrored.add(bool(found[0, 0, 1] < found[0, 1, 1]))
    assert mirrored == {True, False}


def test_the_distance_is_over_the_face_alone() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :1] = 1
    other = torch.ones(1, 3, 4, 4)
    other[..., :1] = 0.25
    found = face_distance(torch.zeros(1, 3, 4, 4), other, mask)
    torch.testing.assert_close(found, torch.tensor([0.25]))


def test_success_wants_distance_and_strangeness() -> None:
    face, points = tiny.faces_image(2, 32), tiny.landmarks(2, 32)

    def same(image: Tensor) -> Tensor:
        return image

    def black(image: Tensor) -> Tensor:
        return image * 0

    networks = [wrap(same, native_range="unit"), wrap(black, native_range="unit")]
    for network, name in zip(networks, ("same", "black"), strict=True):
        network.name = name
    found = success(networks, [["default"]] * 2, (face, 1 - face), points, tiny.recognizer())
    assert float(found["l2_face_black"]) == float(found["success_black"]) == 0
    assert float(found["identity_black"]) == pytest.approx(1, abs=1e-5)
    assert float(found["l2_face_same"]) > 0.05
    assert float(found["success"]) == float(found["success_same"]) / 2
