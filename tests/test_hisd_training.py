"""HiSD's scheme: its terms say what they claim, and every parameter learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shields.models.hisd import HiSDModel
from shields.weights import Card
from tests import tiny
from trainers.adversaries import gradient_at_photos
from trainers.data import FacePacks
from trainers.hisd import Forgeries, HisdScheme
from trainers.hisd_adversary import HisdDiscriminator
from trainers.manipulator import ManipulatorTraining

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SETTINGS: dict[str, Any] = {
    "inner": 4, "blocks": 2, "style": 8, "noise": 4, "hidden": 8, "extractor": (4, 4, 8),
    "adversary_width": 4, "adversary_depth": 2,
}  # fmt: skip
TWO = ("Smiling", "Eyeglasses")


def scheme(**changes: Any) -> HisdScheme:
    return HisdScheme(**({"size": 16, "width": 4, "attributes": TWO} | SETTINGS | changes))


def networks(config: HisdScheme, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    with tiny.seeded(seed):
        return config.generator(), config.discriminator()


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 2, (count, 2), generator=torch.Generator().manual_seed(3)).float()
    return tiny.faces_image(count, 16) * 2 - 1, labels


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def losses(
    config: HisdScheme, generator: nn.Module, discriminator: nn.Module, seed: int = 0
) -> tuple[dict[str, Tensor], Forgeries]:
    face, labels = batch()
    return config.generator_losses(
        generator, discriminator, face, labels, config.target(labels), rng(seed)
    )  # fmt: skip


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Twelve smooth faces of six people, half of them smiling."""
    path = tmp_path / "faces.safetensors"
    faces = (tiny.faces_image(12, 32) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    metadata = {
        "identities": json.dumps([f"person {i}" for i in range(6)]),
        "attributes": json.dumps(["Smiling"]),
    }
    content = {
        "faces": faces.contiguous(), "landmarks": tiny.landmarks(12, 32),
        "identity": torch.arange(12) // 2, "labels": (torch.arange(12) % 2).to(torch.int8)[:, None],
    }  # fmt: skip
    save_file(content, path, metadata=metadata)
    return path


class TestLearning:
    @pytest.mark.parametrize("adversarial", ["logistic", "hinge"])
    def test_losses_are_finite_and_gradients_reach_every_parameter(self, adversarial: str) -> None:
        config = scheme(adversarial=adversarial)
        players = networks(config)
        optimizers = [torch.optim.Adam(player.parameters(), lr=1e-3) for player in players]
        reached: set[str] = set()
        face, labels = batch()
        for step in range(8):  # one tag a step, so both get their turn
            terms, made = losses(config, *players, seed=step)
            more = config.discriminator_losses(players[1], face, made, labels, rng(step))
            for index, part in enumerate((terms, more)):
                assert all(bool(torch.isfinite(value)) for value in part.values())
                optimizers[index].zero_grad()
                torch.stack(list(part.values())).sum().backward()
                for name, value in players[index].named_parameters():
                    if value.grad is not None and value.grad.abs().sum() > 0:
                        reached.add(f"{index}.{name}")
                optimizers[index].step()
        every = {f"{i}.{name}" for i in (0, 1) for name, _ in players[i].named_parameters()}
        # Nothing looks at what a normalisation takes out again: the offset in front of one.
        assert every - reached <= {name for name in every if name.endswith("conv1.bias")}

    def test_reconstruction_alone_learns_to_keep_the_photo(self) -> None:
        config = scheme(fool=0, style_weight=0, cycle=0)
        generator, discriminator = networks(config)
        optimizer = torch.optim.Adam(generator.parameters(), lr=5e-3)
        seen = []
        for step in range(30):
            terms, _ = losses(config, generator, discriminator, seed=step)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
            seen.append(float(terms["plain"].detach()))
        assert seen[-1] < 0.4 * seen[0]

    def test_discriminator_alone_learns_to_tell_apart(self) -> None:
        config = scheme()
        generator, discriminator = networks(config)
        face, labels = batch()
        _, made = losses(config, generator, discriminator)
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
        for _ in range(25):
            terms = config.discriminator_losses(discriminator, face, made, labels, rng())
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
        real = discriminator(face, made.style, made.tag, made.own)
        fake = discriminator(made.forged, made.wanted, made.tag, made.asked)
        assert real.min() > fake.max()

    def test_steps_through_the_one_module_change_both_networks(
        self, packed: Path, tmp_path: Path
    ) -> None:
        pl.seed_everything(0, verbose=False)
        module = ManipulatorTraining("hisd", size=16, width=4, settings=SETTINGS, head_start=0)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1,
            enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
            enable_checkpointing=False,
        )  # fmt: skip
        data = FacePacks([packed], batch=4, batches=3, share=0.4, attributes=("Smiling",))
        trainer.fit(module, data)
        moved = {
            name.partition(".")[0]
            for name, value in module.state_dict().items()
            if not torch.equal(value, before[name])
        }
        assert moved >= {"generator", "discriminator", "averaged"}
        metrics = trainer.callback_metrics
        assert all(bool(torch.isfinite(value)) for value in metrics.values())
        assert {"g_fool", "g_style", "d_penalty", "val_psnr", "val_change"} <= set(metrics)


class TestTerms:
    def test_they_are_the_distances_that_they_are_named_after(self) -> None:
        config = scheme(reconstruction=2.0, cycle=3.0, style_weight=5.0)
        generator, discriminator = networks(config)
        face, _ = batch()
        terms, made = losses(config, generator, discriminator)
        few, code = face[:2], generator.encode(face)
        style = generator.extract(face, made.tag)
        kept = generator(few, style[:2], made.tag)[0]
        forged = generator(face, made.wanted, made.tag)[0]
        back = generator(forged, style, made.tag)[0]
        expected = {
            "plain": 2 * (generator.decode(code)[:2] - few).abs().mean(),
            "kept": 2 * (kept - few).abs().mean(),
            "cycle": 3 * (back - face).abs().mean(),
            "style": 5 * (generator.extract(forged, made.tag) - made.wanted).abs().mean(),
        }
        for name, value in expected.items():
            assert torch.allclose(terms[name], value, atol=1e-4), name
        assert torch.allclose(made.forged, forged, atol=1e-4)
        assert torch.allclose(made.back, back, atol=1e-4)
        assert torch.equal(made.style, style)

    def test_wanted_style_belongs_to_the_other_value_of_the_tag(self) -> None:
        config = scheme()
        generator, discriminator = networks(config)
        for mapper in generator.mappers:
            for value, end in enumerate(mapper.post_models):
                end[2].weight.data.zero_()
                end[2].bias.data.fill_(float(value))
        _, labels = batch()
        for seed in range(4):
            _, made = losses(config, generator, discriminator, seed)
            # "with" is value 0; who has it is asked for "without", value 1.
            assert torch.equal(made.own, 1 - labels[:, made.tag].long())
            assert torch.equal(made.asked, labels[:, made.tag].long())
            assert torch.equal(made.wanted[:, 0], labels[:, made.tag])

    def test_all_tags_get_their_turn_and_the_seed_decides(self) -> None:
        config = scheme()
        players = networks(config)
        made = [losses(config, *players, seed=seed)[1] for seed in range(8)]
        assert {item.tag for item in made} == {0, 1}
        again = losses(config, *players, seed=3)[1]
        assert torch.equal(again.forged, made[3].forged)

    @pytest.mark.parametrize("adversarial", ["logistic", "hinge"])
    def test_adversarial_terms_follow_their_formulas(self, adversarial: str) -> None:
        config = scheme(adversarial=adversarial, fool=2.0, penalty=6.0)
        generator, discriminator = networks(config)
        discriminator.eval()  # spectral norm refines its estimate at every training forward
        face, labels = batch()
        terms, made = losses(config, generator, discriminator)
        real = discriminator(face, made.style, made.tag, made.own)
        fake = torch.cat([
            discriminator(made.forged, made.wanted, made.tag, made.asked),
            discriminator(made.back, made.style, made.tag, made.own),
        ])  # fmt: skip
        more = config.discriminator_losses(discriminator, face, made, labels, rng())
        if adversarial == "hinge":
            fooling = -fake.mean()
            telling = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
            assert set(more) == {"adversarial"}
        else:
            fooling = (1 + (-fake).exp()).log().mean()
            telling = (1 + (-real).exp()).log().mean() + (1 + fake.exp()).log().mean()
            steep = gradient_at_photos(
                lambda photo: discriminator(photo, made.style[:2], made.tag, made.own[:2]), face[:2]
            )
            assert torch.allclose(more["penalty"], 3 * steep)
        assert torch.allclose(terms["fool"], 2 * fooling, atol=1e-4)
        assert torch.allclose(more["adversarial"], telling, atol=1e-4)

    def test_gradient_of_a_linear_score_is_its_weights(self) -> None:
        weight = torch.randn(3, 16, 16, generator=rng())
        photo = torch.randn(5, 3, 16, 16, generator=rng(1))
        steep = gradient_at_photos(lambda x: (x * weight).sum(dim=(1, 2, 3)), photo)
        assert torch.allclose(steep, weight.square().sum())

    def test_forgeries_hold_no_graph(self) -> None:
        config = scheme()
        _, made = losses(config, *networks(config))
        parts = (made.style, made.wanted, made.forged, made.back)
        assert not any(part.requires_grad for part in parts)


class TestDiscriminator:
    def test_score_depends_on_image_style_tag_and_value_of_its_own_sample(self) -> None:
        with tiny.seeded(0):
            network = HisdDiscriminator((2, 2), 16, 8, width=4, depth=2)
        face, _ = batch(2)
        style, value = torch.randn(2, 8, generator=rng()), torch.tensor([0, 1])
        score = network(face, style, 0, value)
        changed = {
            "image": network(face.roll(1, 2), style, 0, value),
            "style": network(face, style + 1, 0, value),
            "tag": network(face, style, 1, value),
            "value": network(face, style, 0, 1 - value),
        }
        assert score.shape == (2,)
        for name, other in changed.items():
            assert ((score - other).abs() > 1e-6).all(), name
        first = network(face[:1], style[:1], 0, value[:1])
        assert torch.allclose(first, score[:1], atol=1e-5)


class TestForge:
    def test_without_change_it_encodes_and_decodes(self) -> None:
        config = scheme()
        generator, _ = networks(config)
        face, labels = batch()
        same = config.forge(generator, face, labels, labels)
        assert torch.equal(same, generator.decode(generator.encode(face)))

    def test_it_changes_what_differs_as_the_adapter_does(self) -> None:
        config = scheme()
        generator, _ = networks(config)
        face, labels = batch(2)
        labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        target = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        with torch.no_grad():
            forged = config.forge(generator, face, labels, target)
        card = config.config()
        tags = dict(zip(map(str.lower, card["tags"]), card["attributes"], strict=True))  # type: ignore[call-overload]
        adapter = HiSDModel(generator, tags)
        for row, name in ((0, "smiling:without"), (1, "eyeglasses:with")):
            unit = (face[row : row + 1] + 1) / 2
            expected = adapter(unit, name) * 2 - 1
            assert torch.allclose(forged[row : row + 1], expected, atol=1e-4), name

    def test_export_loads_and_forges_the_same(self, tmp_path: Path) -> None:
        module = ManipulatorTraining("hisd", size=16, width=4, settings=SETTINGS)
        state, config = module.export()
        save_file(
            {name: value.contiguous() for name, value in state.items()},
            tmp_path / "ours.safetensors",
        )
        card = Card(
            name="ours", role="manipulator", architecture="hisd", file="ours.safetensors",
            config=json.loads(json.dumps(config)),
        )  # fmt: skip
        loaded = HiSDModel.load(tmp_path / "ours.safetensors", card)
        assert loaded.conditions == ("smiling:with", "smiling:without")
        assert loaded.native_size == 16
        face = tiny.faces_image(2, 16)
        labels = torch.zeros(2, 1)
        expected = module.scheme.forge(module.averaged, face * 2 - 1, labels, 1 - labels)
        assert torch.allclose(loaded(face, "smiling:with") * 2 - 1, expected, atol=1e-4)

    def test_recipe_fits_what_may_be_shipped(self) -> None:
        with torch.device("meta"):
            network = HisdScheme().generator()
        assert 2 * sum(value.numel() for value in network.parameters()) < 6e6
