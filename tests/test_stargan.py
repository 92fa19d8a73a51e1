"""StarGAN, AttentionGAN, Fixed-Point GAN: official layouts, conditions, modes, gradients."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from shields import models
from shields.errors import ConfigError, ImageError, UnknownName, WeightsError
from shields.models.manipulators import CELEBA_FIVE, AGGANModel, FPGANModel, StarGANModel
from shields.models.star_networks import AttentionGenerator, FixedPointGenerator, StarGenerator
from shields.weights import Card, WeightStore
from tests import tiny
from tests.cards import write_card

KINDS = {"stargan": StarGANModel, "aggan": AGGANModel, "fpgan": FPGANModel}
EVERY = pytest.mark.parametrize("kind", list(KINDS))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width),
        )  # fmt: skip

    def forward(self, features):
        return features + self.main(features)


def norm(width):
    return nn.InstanceNorm2d(width, affine=True, track_running_stats=True)


class Reference(nn.Module):
    """The fact sheet's table out of torch's own layers, left in training mode as its authors do."""

    def __init__(self, kind, width=8, labels=5):
        super().__init__()
        self.kind = kind
        layers = [nn.Conv2d(3 + labels, width, 7, 1, 3, bias=False), norm(width), nn.ReLU()]
        for step in (1, 2):
            layers += [
                nn.Conv2d(step * width, 2 * step * width, 4, 2, 1, bias=False),
                norm(2 * step * width), nn.ReLU(),
            ]  # fmt: skip
        layers += [Block(4 * width) for _ in range(6)]
        for step in (4, 2):
            layers += [
                nn.ConvTranspose2d(step * width, step * width // 2, 4, 2, 1, bias=False),
                norm(step * width // 2), nn.ReLU(),
            ]  # fmt: skip
        layers.append(nn.Conv2d(width, 4 if kind == "aggan" else 3, 7, 1, 3, bias=False))
        if kind == "stargan":
            layers.append(nn.Tanh())
        self.main = nn.Sequential(*layers)

    def forward(self, image, labels):
        planes = labels.view(len(labels), -1, 1, 1).repeat(1, 1, *image.shape[2:])
        out = self.main(torch.cat([image, planes], dim=1))
        if self.kind == "stargan":
            return out
        if self.kind == "fpgan":
            return (image + out).tanh()
        attention = out[:, :1].sigmoid()
        return out[:, 1:] * attention + image * (1 - attention)


def reference(kind):
    with tiny.seeded(5):
        network = Reference(kind)
        for module in network.modules():  # statistics nobody may use, and weights that act
            if isinstance(module, nn.InstanceNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(1, 5)
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(std=0.3)
    return network.train()


def load(kind, folder, state, extra="", name="200000-G.ckpt"):
    torch.save(state, folder / name)
    write_card(folder, "official", "manipulator", kind, file=name, extra=extra)
    return models.load(
        "manipulator", "official", store=WeightStore(folder), device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("network", "count"),
    [(StarGenerator, 8_430_528), (AttentionGenerator, 8_433_664), (FixedPointGenerator, 8_430_528)],
)
def test_sizes_are_the_published_ones(network, count):
    with torch.device("meta"):
        built = network()
    assert sum(parameter.numel() for parameter in built.parameters()) == count
    assert len(built.state_dict()) == 103


@EVERY
def test_an_official_file_forges_as_its_authors_do(kind, tmp_path):
    network, image = reference(kind), tiny.faces_image(3, 32)
    labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    model = load(kind, tmp_path, network.state_dict())
    condition = models.manipulation.Condition(name="three", value=labels)
    wanted = (network(image * 2 - 1, labels) + 1) / 2
    torch.testing.assert_close(model(image, condition), wanted, atol=1e-4, rtol=0)


def prefixed(state):
    return {f"module.{key}": value for key, value in state.items()}


def without(*endings):
    return lambda state: {key: v for key, v in state.items() if not key.endswith(endings)}


@EVERY
@pytest.mark.parametrize(
    "aged",
    [
        prefixed,
        without("num_batches_tracked"),
        without("num_batches_tracked", "running_mean", "running_var"),
        lambda state: {"state_dict": state},
    ],
)
def test_files_of_every_age_load_to_the_same_output(kind, aged, tmp_path):
    state, image = dict(reference(kind).state_dict()), tiny.faces_image(1, 32)
    model = load(kind, tmp_path, state)
    (tmp_path / "old").mkdir()
    other = load(kind, tmp_path / "old", aged(state))
    assert torch.equal(model(image, "male"), other(image, "male"))


@EVERY
def test_the_mode_of_a_caller_changes_no_bit_and_no_buffer(kind, tmp_path):
    model, image = load(kind, tmp_path, reference(kind).state_dict()), tiny.faces_image(2, 32)
    before, buffers = model(image, "young"), [b.clone() for b in model.buffers()]
    for module in model.modules():
        if module is not model:
            module.train()
    assert torch.equal(model.train()(image, "young"), before)
    assert torch.equal(model.eval()(image, "young"), before)
    assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True))


@EVERY
def test_the_gradient_reaches_the_image_alone_and_a_batch_equals_its_singles(kind, tmp_path):
    model, image = load(kind, tmp_path, reference(kind).state_dict()), tiny.faces_image(3, 32)
    copy = image.clone().requires_grad_()
    forged, features = model.outputs(copy, "blond_hair")
    forged.square().sum().backward()
    assert copy.grad.abs().min() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert torch.equal(copy.detach(), image)
    singles = torch.cat([model(one[None], "blond_hair") for one in image])
    torch.testing.assert_close(forged, singles, atol=1e-5, rtol=0)
    assert torch.equal(features, model.features(image, "blond_hair"))
    assert features.shape == (3, 32, 8, 8)
    # after three of six residual blocks, their sum included
    trunk = model.network.main[:12](
        torch.cat([image * 2 - 1, torch.zeros(3, 5, 32, 32).index_fill_(1, torch.tensor(1), 1)], 1)
    )
    assert torch.equal(features, trunk)


def test_an_attention_of_zero_keeps_the_photo():
    network = AttentionGenerator(1, width=8, blocks=2)
    image = tiny.faces_image(1, 16) * 2 - 1
    rest = network.trunk
    network.trunk = lambda *given: (rest(*given)[0].index_fill(1, torch.tensor(0), -200.0), None)
    assert torch.equal(network(image, torch.ones(1, 1))[0], image)
    network.trunk = lambda *given: (rest(*given)[0].index_fill(1, torch.tensor(0), 200.0), None)
    assert torch.equal(network(image, torch.ones(1, 1))[0], rest(image, torch.ones(1, 1))[0][:, 1:])


def test_a_residual_of_zero_is_not_the_photo():
    network = FixedPointGenerator(1, width=8, blocks=2)
    nn.init.zeros_(network.main[-1].weight)
    image = tiny.faces_image(1, 16) * 2 - 1
    assert torch.equal(network(image, torch.ones(1, 1))[0], image.tanh())


def five():
    return StarGANModel(StarGenerator(5, width=8, blocks=2), CELEBA_FIVE)


def test_target_vectors_are_the_authors():
    edits = five().targets(torch.tensor([[1, 0, 0, 1, 1]]))
    assert [edit.value.int().tolist() for edit in edits] == [
        [[1, 0, 0, 1, 1]], [[0, 1, 0, 1, 1]], [[0, 0, 1, 1, 1]], [[1, 0, 0, 0, 1]],
        [[1, 0, 0, 1, 0]],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "labels", "wanted"),
    [
        ("blond_hair", None, [0, 1, 0, 0, 0]),
        ("blond_hair", [1, 0, 0, 1, 1], [0, 1, 0, 1, 1]),
        ("male", [1, 0, 0, 0, 1], [1, 0, 0, 1, 1]),
        ("male", [1, 0, 0, 1, 1], [1, 0, 0, 1, 1]),
        ("not_young", [1, 0, 0, 1, 1], [1, 0, 0, 1, 0]),
        ("", None, [1, 0, 0, 0, 0]),
    ],
)
def test_a_condition_is_chosen_by_name(name, labels, wanted):
    given = None if labels is None else torch.tensor([labels])
    assert five().condition(name, labels=given).value.int().tolist() == [wanted]
    assert given is None or given.tolist() == [labels]


def test_hair_colours_exclude_each_other_however_they_are_written():
    model = StarGANModel(StarGenerator(2, width=8, blocks=2), ("blond_hair", "black_hair"))
    edit = model.condition("black_hair", labels=torch.tensor([[1, 0]]))
    assert edit.value.tolist() == [[0, 1]]
    assert model.conditions == ("blond_hair", "black_hair")


def test_wrong_conditions_say_what_there_is():
    with pytest.raises(UnknownName, match="blond_hair"):
        five().condition("blonde_hair")
    with pytest.raises(ConfigError, match=r"labels must be \(B, 5\)"):
        five().condition("male", labels=torch.zeros(2, 4))


def test_sides_off_the_multiple_are_refused_and_a_native_size_takes_any(tmp_path):
    model = five()
    with pytest.raises(ImageError, match="multiples of 4, got 30x32; the nearest such size is 32x"):
        model(tiny.faces_image(1, 32)[:, :, :30])
    state = reference("stargan").state_dict()
    fixed = load("stargan", tmp_path, state, "[config]\nnative_size = 16\n")
    image = tiny.faces_image(1, 32)[:, :, :30]
    small = nn.functional.interpolate(image, size=(16, 16), mode="bilinear", antialias=True)
    back = nn.functional.interpolate(fixed(small), size=(30, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(fixed(image), back)


def no_stem(state):
    return {key: value for key, value in state.items() if key != "main.0.weight"}


def truncated(state):
    return dict(list(state.items())[:40])


def poisoned(state):
    return {**state, "main.3.weight": state["main.3.weight"] * float("nan")}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_stem, "not those of a StarGANModel"),
        (truncated, "missing"),
        (poisoned, "not finite"),
        (lambda state: {**state, "extra": torch.zeros(1)}, "unexpected"),
    ],
)
def test_a_wrong_file_is_a_clear_error(spoil, said, tmp_path):
    with pytest.raises(WeightsError, match=said):
        load("stargan", tmp_path, spoil(reference("stargan").state_dict()))


def test_another_architecture_and_another_number_of_attributes_are_errors(tmp_path):
    with pytest.raises(WeightsError, match=r"main.21.weight is \(4, 8, 7, 7\)"):
        load("stargan", tmp_path, reference("aggan").state_dict())
    extra = '[config]\nattributes = ["Smiling", "Young"]\n'
    with pytest.raises(WeightsError, match="take 5 attributes, 2 are named"):
        load("stargan", tmp_path, reference("stargan").state_dict(), extra)


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_a_file_that_runs_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps({"main.0.weight": Bomb()}))
    card = Card(name="bomb", role="manipulator", architecture="stargan", file="bomb.ckpt")
    with pytest.raises(WeightsError, match="more than tensors"):
        StarGANModel.load(tmp_path / "bomb.ckpt", card)
    assert not (tmp_path / "exploded").exists()
