"""Adversarial training of a manipulator on a sliver of data, and what its card says of attacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from shields import models
from shields.errors import ConfigError
from shields.models.idguard import joined
from shields.models.idguard_network import ResNetGenerator
from shields.models.manipulation import wrap
from shields.models.star_networks import AttentionGenerator, StarGenerator
from shields.weights import Card, WeightStore
from tests import cards, tiny
from tests.training import PowerCut, trainer
from trainers.data import FacePacks
from trainers.export import Recipe, export
from trainers.robust_manipulator import RobustManipulatorTraining
from trainers.robust_measure import ATTACKS, measure_robustness

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small networks with cards, and twenty faces of ten people, light (1) or dark (0)."""
    path = tmp_path / "networks"
    path.mkdir()
    config = '[config]\nattributes = ["Light"]\nnative_size = 16\n'
    with tiny.seeded(0):
        for name, kind in (("stargan", StarGenerator), ("aggan", AttentionGenerator)):
            network = kind(1, width=8, blocks=2)
            for parameter in network.parameters():  # far enough from zero for edits to differ
                parameter.data.mul_(1.5)
            cards.save_file_model(path, f"small-{name}", "manipulator", name, network, config)
        cards.save_file_model(path, "any-size", "manipulator", "stargan",
                              StarGenerator(1, width=8, blocks=2),
                              '[config]\nattributes = ["Light"]\n')  # fmt: skip
        attacker = ResNetGenerator(4, 1)
        for seed in range(20):  # fill the norms' statistics: they are what is attacked with
            attacker(tiny.faces_image(4, 16, seed).repeat(1, 2, 1, 1))
        save_file(joined(attacker.state_dict(), torch.zeros(3, 16, 16)),
                  path / "attacker.safetensors")  # fmt: skip
        cards.write_card(path, "attacker", "generator", "idguard", file="attacker.safetensors")
        cards.save_file_model(
            path, "small-face", "recognizer", "face-embedder",
            cards.randomised(
                cards.FaceEmbedder(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), dimensions=16), 1
            ),
            "[config]\nwidths = [8, 8, 8, 8]\nblocks = [1, 1, 1, 1]\ndimensions = 16\n",
        )  # fmt: skip
        cards.save_file_model(
            path, "small-classifier", "classifier", "attribute-classifier",
            cards.randomised(cards.AttributeClassifier(("Light",), 16, (4, 8)), 5),
            '[config]\nattributes = ["Light"]\nsize = 16\nwidths = [4, 8]\n',
        )  # fmt: skip
    labels = torch.arange(20).remainder(2).to(torch.int8)[:, None]
    faces = tiny.faces_image(20, 24) * 0.4 + 0.5 * labels[..., None, None]
    save_file(
        {
            "faces": (faces * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(20, 24),
            "identity": torch.arange(20) // 2,
            "labels": labels,
        },
        path / "pack.safetensors",
        metadata={
            "identities": json.dumps([f"person {i}" for i in range(10)]),
            "attributes": json.dumps(["Light"]),
        },
    )
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(path))
    return path


def packs(folder: Path, batches: int) -> FacePacks:
    pack = folder / "pack.safetensors"
    return FacePacks([pack], batch=4, batches=batches, share=0.4, attributes=("Light",))


def small(**settings: object) -> RobustManipulatorTraining:
    pl.seed_everything(0, verbose=False)
    losses = {"adversary_width": 4, "adversary_depth": 2, "teacher": ""}
    losses |= settings.pop("settings", {})  # type: ignore[arg-type]
    defaults: dict[str, object] = {
        "manipulator": "small-stargan", "generator": "attacker", "attributes": ("Light",),
        "recognizer": "small-face", "heat": "none", "head_start": 0, "settings": losses,
    }  # fmt: skip
    return RobustManipulatorTraining(**(defaults | settings))  # type: ignore[arg-type]


def moved(module: RobustManipulatorTraining, folder: Path, path: Path, batches: int) -> set[str]:
    """Top-level networks of which a parameter changed."""
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer(path, max_epochs=1).fit(module, packs(folder, batches))
    return {name.partition(".")[0] for name, value in module.named_parameters()
            if not torch.equal(before[name], value)}  # fmt: skip


def test_everybody_learns_from_what_the_card_holds(folder: Path, tmp_path: Path) -> None:
    module = small(manipulator="small-aggan", heat="grad-cam++", preset="paper")
    wanted = models.load("manipulator", "small-aggan", store=WeightStore(),
                         device=torch.device("cpu"))  # fmt: skip
    for network in (module.generator, module.averaged):
        for name, value in wanted.network.state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), name
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, packs(folder, 2))
    still = {name for name, value in module.named_parameters() if torch.equal(before[name], value)}
    assert still == set()
    assert float(run.callback_metrics["val_l2_attacked"]) > 0


def test_who_learns_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    found = moved(small(tune=False), folder, tmp_path / "a", 1)
    assert found == {"generator", "discriminator", "averaged"}
    found = moved(small(head_start=9), folder, tmp_path / "b", 1)
    assert found == {"attacker", "discriminator"}


def test_the_attacker_climbs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = small(head_start=99, attacker_rate=3e-3)
    gains: list[float] = []
    step = module._step

    def watched(player, terms, optimizer):
        if player == "attacker":
            gains.append(-float(terms["gain"]))
        step(player, terms, optimizer)

    monkeypatch.setattr(module, "_step", watched)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, packs(folder, 20))
    assert sum(gains[-5:]) > sum(gains[:5])


def test_the_manipulator_learns_to_withstand(folder: Path, tmp_path: Path) -> None:
    def distance(module: RobustManipulatorTraining) -> float:
        run = trainer(tmp_path)
        (found,) = run.validate(module, packs(folder, 1), verbose=False)
        return found["val_l2_attacked"]

    module = small(rate=3e-3, average=0.5, tune=False)
    before = distance(module)
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, packs(folder, 25))
    after = distance(module)
    assert after < 0.8 * before


def test_stop_and_resume_equals_going_through(folder: Path, tmp_path: Path) -> None:
    through = small()
    trainer(tmp_path / "through", max_epochs=2).fit(through, packs(folder, 2))
    first = trainer(tmp_path / "half", max_epochs=2)
    first.callbacks.append(PowerCut())
    with pytest.raises(ConnectionError):
        first.fit(small(), packs(folder, 2))
    resumed = small()
    trainer(tmp_path / "half", max_epochs=2).fit(
        resumed, packs(folder, 2), ckpt_path=tmp_path / "half" / "last.ckpt"
    )
    for name, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_card_is_a_manipulators_and_compares_with_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        RobustManipulatorTraining, "JUDGES",
        {"classifier": "small-classifier", "recognizer": "small-face"},
    )  # fmt: skip
    module = small()
    trainer(tmp_path / "run", max_epochs=1).fit(module, packs(folder, 1))
    loaded = RobustManipulatorTraining.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    with torch.no_grad():
        for value in loaded.averaged.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    state, config = loaded.export()
    facts = Recipe(name="small-robust", command="", seed=0, steps=1, **loaded.CARD)
    path = export(state, config, facts, {}, tmp_path)
    results = loaded.measure(path, folder / "pack.safetensors")
    card = Card.read(export(state, config, facts, results, tmp_path))
    assert "hardened against the generator attacker" in card.summary
    numbers = {f"{kind}_{name}" for kind in ("l2_face", "identity") for name in ("noise", *ATTACKS)}
    assert set(card.results) >= numbers | {f"before_{name}" for name in numbers} | {"success"}
    store = WeightStore(tmp_path)
    model = models.load("manipulator", "small-robust", store=store, device=torch.device("cpu"))
    face = tiny.faces_image(2, 16)
    wanted = loaded.scheme.forge(loaded.averaged, face * 2 - 1, face, torch.ones(2, 1))
    assert torch.equal(model(face, "light"), (wanted + 1) / 2)


def test_what_cannot_be_hardened_says_so(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be those of 'small-stargan', Light; got Smiling"):
        small(attributes=("Smiling",))
    with pytest.raises(ConfigError, match="at which `native_size`"):
        small(manipulator="any-size")


def test_attacks_on_a_linear_manipulator_reach_what_can_be_computed() -> None:
    half = wrap(lambda image: image / 2, native_range="unit")
    half.name = "ha.lf"
    found = measure_robustness(
        half, tiny.faces_image(2, 32), tiny.landmarks(2, 32), judge=tiny.recognizer(),
        rng=torch.Generator().manual_seed(0),
    )  # fmt: skip
    # Every pixel ends at the bound, 0.05 in [-1, 1], and is halved; the noise has that deviation.
    wanted = (0.05 / 2) ** 2
    for name in ("noise", *ATTACKS):
        assert found[f"l2_face_{name}"] == pytest.approx(wanted, rel=0.1), name
        assert -1 <= found[f"identity_{name}"] < 1
