"""PG: its terms, the surrogate that learns beside it, resuming, shipping."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from shields.errors import ConfigError
from shields.models.star_networks import FixedPointGenerator
from shields.protectors.learned_baselines import BaselineConfig, Pg
from tests import baselines, cards, tiny
from tests.training import trainer
from trainers.data import FacePacks
from trainers.pg import PgTraining, weighted_difference

pytestmark = baselines.QUIET


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path))
    return baselines.save_everything(tmp_path)


def small(**settings: object) -> PgTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "surrogate": "small-fpgan", "manipulators": ("small-fpgan", "small-stargan"),
        "settings": {"teacher": "", "adversary_width": 8, "adversary_depth": 2},
        "widths": (8, 8), "critic_width": 8, "size": 16, "rate": 1e-2, "head_start": 0,
    }  # fmt: skip
    return PgTraining(**(defaults | settings))  # type: ignore[arg-type]


class TestTerms:
    def test_places_count_by_how_far_an_edit_reaches(self) -> None:
        weight = torch.zeros(2, 1, 4, 4)
        weight[:, :, 0], weight[:, :, 1] = 3.0, 1.0
        image = torch.zeros(2, 3, 4, 4)
        image[:, :, 0], image[:, 0, 1], image[:, :, 2:] = 0.5, -0.6, 9.0
        found = weighted_difference(image, torch.zeros_like(image), weight)
        assert float(found) == pytest.approx((3 * 0.5 + 1 * 0.2) / 4)

    def test_parts_by_hand(self, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = small()
        monkeypatch.setattr(PgTraining, "batches_done", 0)
        face, labels = tiny.faces_image(2, 16), torch.tensor([[0.0], [1.0]])
        view, target, network = 1 - face, 1 - labels, module.surrogate
        found = module.parts(view, network, face, labels, target)
        x, seen = 2 * face - 1, 2 * view - 1
        clean, forged = network(x, target)[0], network(seen, target)[0]
        reach = (clean - x).abs().mean(dim=1, keepdim=True)
        edit = ((forged - clean).abs().mean(1, keepdim=True) * reach).sum() / reach.sum()
        torch.testing.assert_close(found["edit"], -edit)
        back = (network(forged, labels)[0] - seen).abs().mean(1, keepdim=True)
        torch.testing.assert_close(found["back"], -(back * reach).sum() / reach.sum())
        realness, shown = module.discriminator(forged)
        wrong = nn.functional.binary_cross_entropy_with_logits(shown, labels)  # not what was asked
        torch.testing.assert_close(found["confusion"], realness.mean() + wrong)

    def test_the_discriminator_counts_once_it_has_learned(
        self, packed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module, face = small(head_start=5), tiny.faces_image(2, 16)
        labels = torch.zeros(2, 1)
        for done, wanted in ((4, {"edit", "back"}), (5, {"edit", "back", "confusion"})):
            monkeypatch.setattr(PgTraining, "batches_done", done)
            parts = module.parts(face, module.surrogate, face, labels, 1 - labels)
            assert set(parts) == wanted

    @pytest.mark.parametrize(
        ("name", "logged", "least"),
        [("edit", "now_edit", 0.01), ("back", "before_back", 0.01),
         ("confusion", "now_confusion", 0.01), ("natural", "natural", 0.0)],
    )  # fmt: skip
    def test_each_term_moves_the_right_way(
        self, packed: Path, tmp_path: Path, name: str, logged: str, least: float
    ) -> None:
        weights = dict.fromkeys(("edit", "back", "confusion", "natural"), 0.0) | {name: 1.0}
        still = {"surrogate_rate": 0.0, "critic_rate": 0.0, "region": (1.0, 1.0)}
        watch = baselines.fit(small(**weights, **still, levels=60.0, rate=3e-2), packed, tmp_path)
        assert watch.change(logged) < -least


class TestSurrogate:
    def test_it_is_the_network_of_the_card(self, packed: Path) -> None:
        module = small()
        shipped = module._manipulators[0].network
        assert isinstance(module.surrogate, FixedPointGenerator)
        assert module.scheme.size == 16
        face, label = tiny.faces_image(1, 16), torch.ones(1, 1)
        assert torch.equal(module.surrogate(face, label)[0], shipped(face, label)[0])
        assert module.surrogate is not shipped

    def test_all_players_learn_and_the_one_before_follows(
        self, packed: Path, tmp_path: Path
    ) -> None:
        module = small()
        before = {name: value.clone() for name, value in module.named_parameters()}
        shipped = [value.clone() for value in module._manipulators[0].parameters()]
        baselines.fit(module, packed, tmp_path, 1)
        still = {name.partition(".")[0] for name, value in module.named_parameters()
                 if torch.equal(before[name], value)}  # fmt: skip
        # In the first step the one before is the one that the card has.
        assert still == {"before"}
        baselines.fit(module, packed, tmp_path, 2)
        last = zip(module.before.parameters(), module.surrogate.parameters(), strict=True)
        assert not any(torch.equal(old, new) for old, new in last)
        now = module._manipulators[0].parameters()
        assert all(torch.equal(old, new) for old, new in zip(shipped, now, strict=True))

    def test_it_waits_for_its_discriminator(self, packed: Path, tmp_path: Path) -> None:
        module = small(head_start=3)
        before = {name: value.clone() for name, value in module.named_parameters()}
        baselines.fit(module, packed, tmp_path, 2)
        still = {name.partition(".")[0] for name, value in module.named_parameters()
                 if torch.equal(before[name], value)}  # fmt: skip
        assert still == {"surrogate", "before"}

    def test_the_critic_learns_to_tell_protected_photos(
        self, packed: Path, tmp_path: Path
    ) -> None:  # fmt: skip
        module = small(rate=0.0, surrogate_rate=0.0, critic_rate=1e-2, levels=60.0)
        assert baselines.fit(module, packed, tmp_path).change("critic") < -0.05


class TestTraining:
    def test_one_batch_of_everything(self, packed: Path, tmp_path: Path) -> None:
        run = trainer(tmp_path, fast_dev_run=True, callbacks=[])
        run.fit(small(), baselines.packs(packed, 1))
        assert 0 <= float(run.callback_metrics["val_success_handled_small-stargan"]) <= 1

    def test_stop_and_resume_equals_going_through(self, packed: Path, tmp_path: Path) -> None:
        baselines.check_resume(lambda: small(head_start=1), packed, tmp_path)

    def test_without_labels_it_says_what_is_needed(self, packed: Path, tmp_path: Path) -> None:
        data = FacePacks([packed], batch=4, batches=1, share=0.4)
        with pytest.raises(ConfigError, match=r"--data.attributes \[Smiling\]"):
            trainer(tmp_path, max_epochs=1).fit(small(), data)

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"settings": {"cicle": 1.0}}, "no setting cicle; there are: .*cycle"),
            ({"settings": {"kind": "aggan"}}, "no setting kind"),
            ({"size": 17}, "multiple of 2, got 17"),
        ],
    )
    def test_settings_that_make_no_sense_are_explained(
        self, packed: Path, wrong: dict[str, object], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            small(**wrong)

    def test_only_the_star_family_is_trained_on(self, packed: Path) -> None:
        cards.save_manipulators(packed.parent)
        with pytest.raises(
            ConfigError, match="must be one of stargan, aggan, fpgan, 'small-relgan'"
        ):
            small(surrogate="small-relgan")


class TestShipping:
    def test_the_budget_holds_in_files(self, packed: Path) -> None:
        baselines.check_bound_after_png(small())

    def test_the_shipped_file_makes_the_same_bits(self, packed: Path, tmp_path: Path) -> None:
        module = small()
        card, model = baselines.exported("pg", module, packed, tmp_path)
        assert (card.architecture, card.config["two_way"]) == ("ars", False)
        assert card.summary == (
            "PG of Initiative Defense, trained against small-fpgan as it was trained on."
        )
        face, rng = tiny.faces_image(2, 32), torch.Generator()
        with torch.no_grad():
            wanted = module.perturbation(face)
        assert torch.equal(model.perturb(face, levels=6.375, rng=rng), wanted)
        protector = Pg(BaselineConfig(), generator=model)
        torch.testing.assert_close(protector(face, rng=rng), wanted)

    def test_without_a_generator_it_says_what_to_do(self) -> None:
        with pytest.raises(ConfigError, match=r"--generator .*shields train pg export"):
            Pg()

    def test_the_recipe_names_settings_that_exist(self) -> None:
        baselines.check_recipe("pg-smile", PgTraining)
