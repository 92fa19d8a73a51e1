"""RelGAN's training on a sliver of data: each term says what its name promises."""

from __future__ import annotations

import json

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import nn

from shields.models.classifiers import AttributeClassifier
from shields.models.relgan import RelGANModel
from shields.weights import Card
from tests import tiny
from trainers.adversaries import gradient_penalty
from trainers.data import FacePacks
from trainers.manipulator import ManipulatorTraining
from trainers.relgan import Forgeries, RelganScheme, triplets
from trainers.scheme import resized

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

SMALL = {"size": 16, "width": 4}
FEW = {"blocks": 2, "adversary_width": 4, "adversary_depth": 2, "teacher": ""}
LABELS = torch.tensor([[0.0, 1], [1, 1], [0, 0], [1, 0], [1, 1], [0, 1], [0, 0], [1, 0]])


def scheme(**settings):
    return RelganScheme(attributes=("Smiling", "Male"), **(SMALL | FEW | settings))


def players(made, seed=0):
    with tiny.seeded(seed):
        return made.generator(), made.discriminator()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def always(layer, answer):
    """Make a layer answer the same to everything."""
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, answer)


@pytest.fixture
def face():
    return 2 * tiny.faces_image(8, 16) - 1


@pytest.fixture
def packed(tmp_path):
    """Twenty faces of ten people; light ones smile."""
    path = tmp_path / "faces.safetensors"
    labels = torch.arange(20).remainder(2).to(torch.int8)[:, None]
    faces = tiny.faces_image(20, 24) * 0.4 + 0.5 * labels[..., None, None]
    tensors = {
        "faces": (faces * 255).byte().permute(0, 2, 3, 1).contiguous(),
        "landmarks": tiny.landmarks(20, 24),
        "identity": torch.arange(20) // 2,
        "labels": labels,
    }
    names = {"identities": [f"person {i}" for i in range(10)], "attributes": ["Smiling"]}
    save_file(tensors, path, metadata={key: json.dumps(value) for key, value in names.items()})
    return path


class Constant(nn.Module):
    """A generator that returns the photo, moved by so much, and remembers what it was asked."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.asked = []

    def forward(self, image, vector):
        self.asked.append((len(image), vector.detach()))
        return image + self.shift, image


class TestGenerator:
    def test_vectors_are_target_minus_labels_its_reverse_none_and_a_share(self, face):
        made, generator = scheme(), Constant()
        target = made.target(LABELS)
        _, forged = made.generator_losses(generator, players(made)[1], face, LABELS, target, rng())
        full, back, none, between = (vector for _, vector in generator.asked)
        assert torch.equal(full, target - LABELS)
        assert torch.equal(back, LABELS - target)
        assert not none.any()
        assert torch.allclose(between, forged.share[:, None] * full[:2])
        assert [count for count, _ in generator.asked] == [8, 8, 2, 2]
        assert ((forged.share >= 0) & (forged.share <= 1)).all()

    @pytest.mark.parametrize("shift", [0.0, 0.25])
    def test_cycle_and_identity_are_weighted_distances(self, face, shift):
        made = scheme(cycle=4.0, identity=3.0)
        terms, _ = made.generator_losses(
            Constant(shift), players(made)[1], face, LABELS, 1 - LABELS, rng()
        )
        assert terms["cycle"].item() == pytest.approx(4 * 2 * shift, abs=1e-5)
        assert terms["identity"].item() == pytest.approx(3 * shift, abs=1e-5)

    @pytest.mark.parametrize(
        ("kind", "value"), [("lsgan", (0.3 - 1) ** 2), ("hinge", -0.3), ("wgan-gp", -0.3)]
    )
    def test_fooling_wants_the_realness_of_photos(self, face, kind, value):
        made = scheme(adversarial=kind)
        generator, adversary = players(made)
        always(adversary.realness, 0.3)
        terms, _ = made.generator_losses(generator, adversary, face, LABELS, 1 - LABELS, rng())
        assert terms["fool"].item() == pytest.approx(value, abs=1e-5)

    def test_a_convinced_adversary_leaves_nothing_to_match_or_smooth(self, face):
        made = scheme()
        generator, adversary = players(made)
        always(adversary.verdict, 1.0)
        always(adversary.degree, 0.0)
        nn.init.zeros_(adversary.shown.weight)
        terms, _ = made.generator_losses(generator, adversary, face, LABELS, 1 - LABELS, rng())
        assert terms["match"].item() == terms["between"].item() == 0

    def test_correlation_is_that_of_different_input_channels(self, face):
        made = scheme(orthogonal=0.5)
        generator, adversary = players(made)
        wanted = 0.0
        for parameter in generator.parameters():
            if parameter.ndim == 4 and parameter.shape[-1] > 1:
                for row in range(parameter.shape[2]):
                    for column in range(parameter.shape[3]):
                        kernel = parameter[:, :, row, column].detach()
                        products = kernel.T @ kernel
                        wanted += (products - products.diag().diag()).square().sum().item()
        terms, _ = made.generator_losses(generator, adversary, face, LABELS, 1 - LABELS, rng())
        assert terms["orthogonal"].item() == pytest.approx(0.5 * wanted, rel=1e-4)

    def test_forgeries_come_back_detached(self, face):
        made = scheme()
        terms, forged = made.generator_losses(*players(made), face, LABELS, 1 - LABELS, rng())
        assert not any(part.requires_grad for part in forged)
        assert [len(part) for part in forged] == [8, 8, 2, 2, 2]
        assert all(term.requires_grad for term in terms.values())


class TestAdversary:
    @pytest.mark.parametrize(("attributes", "lucky"), [(1, True), (2, False)])
    def test_triplets_are_true_exactly_where_the_labels_say_so(self, attributes, lucky):
        labels = LABELS[:, :attributes]
        first, second, vector, truth = triplets(labels)
        assert len(first) == len(second) == len(vector) == 5 * len(labels)
        for a, b, change, said in zip(first, second, vector, truth, strict=True):
            assert said == float(torch.equal(labels[b] - labels[a], change))
        assert truth[: len(labels)].all()
        assert truth[len(labels) :].any() == lucky
        assert not truth.all()

    def test_matching_grows_with_what_the_second_shows_more(self, face):
        made = scheme()
        adversary = players(made)[1]
        _, features = adversary(face)
        shown = adversary.shown(features)[:, :, 0, 0]
        always(adversary.verdict, 0.3)
        score = adversary.matching(features, features.roll(1, 0), LABELS)
        wanted = 0.3 + (LABELS * (shown.roll(1, 0) - shown)).sum(1)
        assert torch.allclose(score, wanted, atol=1e-5)

    @pytest.mark.parametrize("doubt", [0.0, 0.5])
    def test_matching_is_the_distance_from_the_truth(self, face, doubt):
        made = scheme(doubt=doubt, matching=2.0)
        generator, adversary = players(made)
        always(adversary.verdict, 0.2)
        nn.init.zeros_(adversary.shown.weight)
        _, forged = made.generator_losses(generator, adversary, face, LABELS, 1 - LABELS, rng())
        terms = made.discriminator_losses(adversary, face, forged, LABELS, rng())
        truth = triplets(LABELS)[3]
        wanted = 2 * ((0.2 - truth).square().mean() + doubt * 0.2**2)
        assert terms["match"].item() == pytest.approx(wanted.item(), rel=1e-4)

    def test_interpolation_is_known_to_be_half_way_at_most(self, face):
        made = scheme(interpolation=3.0)
        adversary = players(made)[1]
        always(adversary.degree, 0.1)
        vector = 1 - 2 * LABELS
        vector[1] = 0  # nothing asked of the second: no point of its way is between
        forged = Forgeries(vector, face, face[:3], face[3:6], torch.tensor([0.2, 0.4, 0.9]))
        terms = made.discriminator_losses(adversary, face, forged, LABELS, rng())
        wanted = sum((0.1 - way) ** 2 + 0.1**2 for way in (0.2, 0.0, 0.1)) / 3
        assert terms["between"].item() == pytest.approx(3 * wanted, rel=1e-4)

    @pytest.mark.parametrize(
        ("kind", "value"), [("lsgan", 0.7**2 + 0.3**2), ("hinge", 0.7 + 1.3), ("wgan-gp", 0.0)]
    )
    def test_realness_is_told_by_the_loss_that_was_asked_for(self, face, kind, value):
        made = scheme(adversarial=kind, penalty=0.0)
        generator, adversary = players(made)
        always(adversary.realness, 0.3)
        _, forged = made.generator_losses(generator, adversary, face, LABELS, 1 - LABELS, rng())
        terms = made.discriminator_losses(adversary, face, forged, LABELS, rng())
        assert terms["adversarial"].item() == pytest.approx(value, abs=1e-5)
        assert "penalty" not in terms

    def test_penalty_is_that_of_the_realness(self, face):
        made = scheme(penalty=7.0, noise=0.0, doubt=0.0)
        generator, adversary = players(made)
        _, forged = made.generator_losses(generator, adversary, face, LABELS, 1 - LABELS, rng())
        states = rng(5)
        terms = made.discriminator_losses(adversary, face, forged, LABELS, states)
        again = rng(5)
        torch.randn(face.shape, generator=again)  # the noise is drawn, be it multiplied by 0
        wanted = 7 * gradient_penalty(lambda x: adversary(x)[0], face, forged.full, again)
        assert terms["penalty"].item() == pytest.approx(wanted.item(), rel=1e-4)

    def test_it_learns_which_vector_belongs_to_a_pair(self, face):
        made = scheme(noise=0.0, doubt=0.0)
        adversary = players(made)[1]
        # What the first attribute looks like: light.
        lit = face * 0.3 + (LABELS[:, :1] - 0.5)[..., None, None]
        forged = Forgeries(LABELS, lit, lit[:2], lit[:2], torch.rand(2, generator=rng()))
        optimizer = torch.optim.SGD(adversary.parameters(), lr=0.02, momentum=0.9)
        losses = []
        for _ in range(80):
            loss = made._matching(adversary, lit, forged, LABELS[:, :1] * torch.ones(1, 2), rng())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


class TestTraining:
    def test_gradients_reach_every_parameter(self, face):
        made = scheme(orthogonal=1e-4)
        generator, adversary = players(made)
        terms, forged = made.generator_losses(
            generator, adversary.requires_grad_(False), face, LABELS, 1 - LABELS, rng()
        )
        torch.stack(list(terms.values())).sum().backward()
        adversary.requires_grad_(True)
        others = made.discriminator_losses(adversary, face, forged, LABELS, rng())
        torch.stack(list(others.values())).sum().backward()
        assert all(torch.isfinite(term) for term in (*terms.values(), *others.values()))
        for network in (generator, adversary):
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().sum() > 0, name

    def test_same_rng_gives_the_same_losses(self, face):
        made = scheme()
        found = []
        for _ in range(2):
            generator, adversary = players(made)
            terms, forged = made.generator_losses(
                generator, adversary, face, LABELS, 1 - LABELS, state := rng(3)
            )
            terms = {f"g_{name}": value for name, value in terms.items()}
            terms |= made.discriminator_losses(adversary, face, forged, LABELS, state)
            found.append({name: value.item() for name, value in terms.items()})
        assert found[0] == found[1]

    def test_a_teacher_must_see_the_target(self, face, tmp_path, monkeypatch):
        with tiny.seeded(1):
            teacher = AttributeClassifier(("Smiling", "Male"), 8, (4, 4))
        save_file(teacher.state_dict(), tmp_path / "relgan-teacher.safetensors")
        (tmp_path / "relgan-teacher.toml").write_text(
            'name = "relgan-teacher"\nrole = "classifier"\narchitecture = "attribute-classifier"\n'
            'file = "relgan-teacher.safetensors"\n[config]\nattributes = ["Smiling", "Male"]\n'
            "size = 8\nwidths = [4, 4]\n"
        )
        monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path))
        made = scheme(teacher="relgan-teacher", classification=2.0)
        terms, _ = made.generator_losses(
            Constant(0.1), players(made)[1], face, LABELS, 1 - LABELS, rng()
        )
        logits = teacher.eval()(resized(face + 0.1, 8))  # the size that it was trained at
        wanted = nn.functional.binary_cross_entropy_with_logits(logits, 1 - LABELS)
        assert terms["class"].item() == pytest.approx(2 * wanted.item(), rel=1e-4)
        assert terms["class"].requires_grad

    def test_two_steps_move_weights_and_statistics_and_export_loads(self, packed, tmp_path):
        pl.seed_everything(0, verbose=False)
        module = ManipulatorTraining("relgan", ("Smiling",), 16, 4, FEW, head_start=0)
        before = {key: value.clone() for key, value in module.generator.state_dict().items()}
        trainer = pl.Trainer(
            max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
            limit_val_batches=1,
        )  # fmt: skip
        data = FacePacks([packed], batch=4, batches=2, share=0.4, attributes=("Smiling",))
        trainer.fit(module, data)
        after = module.generator.state_dict()
        assert not any(torch.equal(before[key], after[key]) for key in before)
        state, config = module.export()
        assert torch.equal(state["down2.1.running_var"], after["down2.1.running_var"])
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "own.safetensors")
        card = Card(
            name="own", role="manipulator", architecture="relgan", file="own.safetensors",
            config=config,
        )  # fmt: skip
        loaded = RelGANModel.load(tmp_path / "own.safetensors", card)
        assert loaded.condition("smiling").value.item() == 1
        image = tiny.faces_image(2, 16)
        labels = torch.tensor([[0.0], [0.0]])
        forged = module.scheme.forge(module.averaged.eval(), 2 * image - 1, labels, 1 - labels)
        assert torch.allclose(loaded(image, "smiling"), (forged + 1) / 2, atol=1e-6)
