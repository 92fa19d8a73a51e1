"""ArcFace's networks against an independent reading of their tables, and published files."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from shields.errors import WeightsError
from shields.faces import similarity
from shields.models.arcface import FaceInput, IResNetModel, IrModel, SharedSlopeModel
from shields.models.arcface_networks import IResNetwork, IrNetwork, SharedSlopeNetwork
from shields.weights import Card
from tests import tiny
from tests.cards import randomised

BLOCKS, WIDTHS = (2, 1, 1, 2), (16, 32, 32, 48)
SMALL = {"blocks": BLOCKS, "widths": WIDTHS, "dimensions": 24}
FLAVOURS = {
    "adaface": {},
    "treb1en": {"inner_norm": False, "affine": True},
    "treb1en-se": {"inner_norm": False, "attention": True, "affine": True},
}
LAYOUTS = {**dict.fromkeys(FLAVOURS, IrModel), "iresnet": IResNetModel, "se101": SharedSlopeModel}


def small(kind, seed=0):
    with tiny.seeded(seed):
        network = LAYOUTS[kind].NETWORK(**SMALL, **FLAVOURS.get(kind, {}))
        for parameter in network.parameters():
            if parameter.ndim == 1:  # slopes, scales and shifts of their own
                torch.nn.init.uniform_(parameter, 0.1, 0.9)
    return randomised(network, seed).eval()


def card(kind, **config):
    return Card(
        name="small", role="recognizer", architecture=LAYOUTS[kind].LAYOUT, file="small.pth",
        config={**SMALL, **config},  # sizes alone: the flavour is read from the file
    )  # fmt: skip


def load(path, kind, **config):
    return LAYOUTS[kind].load(path, card(kind, **config))


def saved(folder, kind, seed=0):
    path = folder / "small.safetensors"
    save_file(small(kind, seed).state_dict(), path)
    return path


def face(seed=0, count=2):
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed))


def norm(state, key, features):
    return functional.batch_norm(
        features, state[f"{key}.running_mean"], state[f"{key}.running_var"],
        state.get(f"{key}.weight"), state.get(f"{key}.bias"),
    )  # fmt: skip


def reference_ir(state, features):
    """The sheet's table, read literally from the keys of a file."""

    def conv(key, features, stride=1):
        weight = state[f"{key}.weight"]
        return functional.conv2d(features, weight, stride=stride, padding=weight.shape[2] // 2)

    features = norm(state, "input_layer.1", conv("input_layer.0", features))
    features = functional.prelu(features, state["input_layer.2.weight"])
    firsts = {sum(BLOCKS[:stage]) for stage in range(4)}
    for index in range(sum(BLOCKS)):
        unit, stride = f"body.{index}.", 2 if index in firsts else 1
        shortcut = features[:, :, ::stride, ::stride]
        if f"{unit}shortcut_layer.0.weight" in state:
            shortcut = conv(unit + "shortcut_layer.0", features, stride)
            shortcut = norm(state, unit + "shortcut_layer.1", shortcut)
        layers = [unit + f"res_layer.{layer}" for layer in range(7)]
        inner = conv(layers[1], norm(state, layers[0], features))
        if f"{layers[2]}.running_mean" in state:
            inner = norm(state, layers[2], inner)
            layers = layers[1:]
        inner = conv(layers[3], functional.prelu(inner, state[f"{layers[2]}.weight"]), stride)
        inner = norm(state, layers[4], inner)
        if f"{layers[5]}.fc1.weight" in state:
            mean = functional.adaptive_avg_pool2d(inner, 1)
            mean = conv(layers[5] + ".fc2", conv(layers[5] + ".fc1", mean).relu())
            inner = inner * mean.sigmoid()
        features = inner + shortcut
    features = norm(state, "output_layer.0", features).flatten(1)
    features = features @ state["output_layer.3.weight"].T + state["output_layer.3.bias"]
    return norm(state, "output_layer.4", features)


def reference_iresnet(state, features):
    def conv(key, features, stride=1, padding=1):
        return functional.conv2d(features, state[key], stride=stride, padding=padding)

    features = norm(state, "bn1", conv("conv1.weight", features))
    features = functional.prelu(features, state["prelu.weight"])
    for stage, count in enumerate(BLOCKS, start=1):
        for index in range(count):
            unit, stride = f"layer{stage}.{index}.", 1 if index else 2
            inner = conv(unit + "conv1.weight", norm(state, unit + "bn1", features))
            inner = functional.prelu(norm(state, unit + "bn2", inner), state[unit + "prelu.weight"])
            inner = norm(state, unit + "bn3", conv(unit + "conv2.weight", inner, stride))
            if index == 0:
                features = conv(unit + "downsample.0.weight", features, stride, padding=0)
                features = norm(state, unit + "downsample.1", features)
            features = inner + features
    features = norm(state, "bn2", features).flatten(1)
    return norm(state, "features", features @ state["fc.weight"].T + state["fc.bias"])


def reference_se101(state, features):
    def bend(key, features):
        return torch.where(features > 0, features, features * state[f"{key}.weight"])

    def linear(key, features):
        return features @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    features = bend("prelu", norm(state, "bn1", functional.conv2d(features, state["conv1.weight"])))
    assert features.shape[2:] == (110, 110)
    features = functional.max_pool2d(features, 2)
    for stage, count in enumerate(BLOCKS, start=1):
        for index in range(count):
            unit, stride = f"layer{stage}.{index}.", 2 if stage > 1 and index == 0 else 1
            inner = norm(state, unit + "bn0", features)
            inner = functional.conv2d(inner, state[unit + "conv1.weight"], padding=1)
            inner = bend(unit + "prelu", norm(state, unit + "bn1", inner))
            inner = functional.conv2d(inner, state[unit + "conv2.weight"], None, stride, 1)
            inner = norm(state, unit + "bn2", inner)
            weights = bend(unit + "se.fc.1", linear(unit + "se.fc.0", inner.mean(dim=(2, 3))))
            weights = linear(unit + "se.fc.2", weights).sigmoid()
            if f"{unit}downsample.0.weight" in state:
                skip = state[unit + "downsample.0.weight"]
                features = functional.conv2d(features, skip, stride=stride)
                features = norm(state, unit + "downsample.1", features)
            features = bend(unit + "prelu", inner * weights[..., None, None] + features)
    return norm(state, "bn3", linear("fc", norm(state, "bn2", features).flatten(1)))


REFERENCES = {
    **dict.fromkeys(FLAVOURS, reference_ir),
    "iresnet": reference_iresnet,
    "se101": reference_se101,
}


@pytest.mark.parametrize(
    ("network", "settings", "parameters", "keys"),
    [
        (IrNetwork, FLAVOURS["treb1en-se"], 43_797_696, 397),
        (SharedSlopeNetwork, {}, 52_193_215, 796),
        (IrNetwork, FLAVOURS["adaface"], 43_585_600, 467),
        (IResNetwork, {}, 43_590_848, 475),
    ],
    ids=["ir-se50", "ir-se101", "adaface-ir50", "iresnet50"],
)
def test_published_size(network, settings, parameters, keys) -> None:
    with torch.device("meta"):
        built = network(**settings)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
    assert len(built.state_dict()) == keys


def test_ir101_fills_the_published_file() -> None:
    """CVLFace's has 260,980,552 bytes, less than 100 kB of them header."""
    with torch.device("meta"):
        state = IrNetwork((3, 13, 30, 3)).state_dict()
    assert 0 < 260_980_552 - sum(value.nbytes for value in state.values()) < 100_000


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYOUTS)
def test_network_computes_what_its_table_says(kind) -> None:
    network, pixels = small(kind), face() * 2 - 1
    expected = REFERENCES[kind](network.state_dict(), pixels)
    torch.testing.assert_close(network(pixels), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYOUTS)
def test_feature_maps_shrink_by_stages_at_any_size(kind) -> None:
    network = small(kind)
    maps = network.maps(torch.zeros(1, 3, 64, 96))
    sides = [(32, 48), (16, 24), (8, 12), (4, 6)]
    if kind == "se101":
        sides[0] = (31, 47)  # no border in its first convolution
    assert [tuple(features.shape[1:]) for features in maps] == [
        (width, *side) for width, side in zip(WIDTHS, sides, strict=True)
    ]


WRAPPINGS = {
    "bare": ("small.pth", lambda state: state),
    "safetensors of a wrapper": ("small.safetensors", lambda state: prefixed(state, "model.net.")),
    "state dict of a wrapper": ("small.pt", lambda state: prefixed(state, "net.")),
    "data parallel": ("small.pth", lambda state: prefixed(state, "module.")),
    "lightning, with its loss": (
        "small.ckpt",
        lambda state: {
            "epoch": 3,
            "state_dict": prefixed(state, "model.") | {"head.kernel": torch.ones(8, 5)},
        },
    ),
    "older than counters": (
        "small.pth",
        lambda state: {key: state[key] for key in state if "num_batches" not in key},
    ),
}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("kind", ["adaface", "iresnet"])
def test_published_wrappings_load_to_the_same_bits(tmp_path, wrapping, kind) -> None:
    name, wrap = WRAPPINGS[wrapping]
    path = tmp_path / name
    network = small(kind).to(memory_format=torch.channels_last)
    state = wrap(small(kind).state_dict())
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    model = load(path, kind)
    expected = functional.normalize(network((face() - 0.5) / 0.5), dim=1)
    assert torch.equal(model.embed(face()), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYOUTS)
def test_range_and_order_of_colours_are_hidden(tmp_path, kind) -> None:
    path, network = saved(tmp_path, kind), small(kind)
    rgb = face()
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    if kind != "se101":
        mean, deviation = [0.5] * 3, [0.5] * 3
    for channels, order in (("rgb", [0, 1, 2]), ("bgr", [2, 1, 0])):
        native = torch.stack(
            [(rgb[:, c] - mean[i]) / deviation[i] for i, c in enumerate(order)], dim=1
        )
        model = load(path, kind, channels=channels)
        expected = functional.normalize(network(native), dim=1)
        torch.testing.assert_close(model.embed(rgb), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_card_may_give_another_range(tmp_path) -> None:
    path = saved(tmp_path, "se101")
    model = load(path, "se101", mean=[0.5, 0.5, 0.5], deviation=[0.5, 0.5, 0.5])
    maps = small("se101").maps(face() * 2 - 1)
    for given, expected in zip(model.features(face()), maps, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_landmarks_land_on_the_usual_template(tmp_path) -> None:
    """An upright face: eyes level at 46 %, 35 pixels apart; a turned photo gives the same crop."""
    model = load(saved(tmp_path, "adaface"), "adaface")
    template = model.template
    assert model.crop_size == (112, 112)
    middles = (template[0] + template[1]) / 2, (template[3] + template[4]) / 2
    torch.testing.assert_close(
        torch.stack(middles)[:, 0], torch.tensor([56.0] * 2), atol=0.2, rtol=0
    )
    assert 35 < template[1, 0] - template[0, 0] < 35.5
    turned = template.flip(1) * torch.tensor([2.0, -2.0]) + torch.tensor([20.0, 300.0])
    image = torch.zeros(1, 3, 320, 320)
    matrix = model.matrix(turned[None], image)[0]
    found = turned @ matrix[:, :2].T + matrix[:, 2]
    torch.testing.assert_close(found, template, atol=1e-3, rtol=0)
    assert torch.equal(matrix, similarity(turned[None], template)[0])
    assert model.align(image, matrix[None]).shape == (1, 3, 112, 112)


def test_a_gradient_reaches_the_image(tmp_path) -> None:
    model = load(saved(tmp_path, "treb1en-se"), "treb1en-se", channels="bgr")
    image = face(count=1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model.embed(image)[0, 0], image)
    assert float(gradient.abs().amax(dim=(2, 3)).min()) > 0  # of every colour


def test_threshold_comes_from_the_card(tmp_path) -> None:
    path = saved(tmp_path, "adaface")
    assert load(path, "adaface").threshold is None
    measured = Card(**{**vars(card("adaface")), "results": {"threshold": 0.2}})
    assert IrModel.load(path, measured).threshold == 0.2


@pytest.mark.parametrize(("kind", "other"), list(permutations(["adaface", "iresnet", "se101"], 2)))
def test_another_layout_is_named(tmp_path, kind, other) -> None:
    path = saved(tmp_path, other)
    with pytest.raises(WeightsError, match=f"laid out as '{LAYOUTS[other].LAYOUT}'"):
        load(path, kind)


DAMAGES = {
    "no face network": (lambda state: {"conv.weight": torch.ones(2)}, "none of 'arcface-ir'"),
    "a unit is missing": (
        lambda state: {key: state[key] for key in state if "body.5." not in key}, "15 missing",
    ),
    "a key is missing": (
        lambda state: {key: state[key] for key in state if key != "output_layer.3.bias"},
        r"1 missing \(output_layer.3.bias\)",
    ),
    "a key too many": (lambda state: state | {"body.0.more": torch.ones(1)}, "1 unexpected"),
    "another width": (
        lambda state: state | {"output_layer.3.bias": torch.ones(25)}, "1 of another shape",
    ),
    "not finite": (
        lambda state: state | {"output_layer.3.bias": torch.full((24,), torch.nan)}, "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_does_not_fit_is_refused(tmp_path, damage) -> None:
    change, message = DAMAGES[damage]
    path = tmp_path / "small.safetensors"
    save_file(change(small("adaface").state_dict()), path)
    with pytest.raises(WeightsError, match=message):
        load(path, "adaface")


def test_depth_is_read_from_the_file_and_must_be_a_published_one(tmp_path) -> None:
    with tiny.seeded(0):
        network = IrNetwork((2, 2, 2, 2), (8, 8, 8, 8), 4)
    path = tmp_path / "small.safetensors"
    save_file(network.state_dict(), path)
    config = {"widths": [8, 8, 8, 8], "dimensions": 4}
    plain = Card(**{**vars(card("adaface")), "config": config})
    assert len(IrModel.load(path, plain).network.body) == 8
    cut = {key: value for key, value in network.state_dict().items() if "body.7." not in key}
    save_file(cut, path)
    with pytest.raises(WeightsError, match=r"7 units.*is the file whole"):
        IrModel.load(path, plain)


@pytest.mark.parametrize(
    "config", [{"channels": "gbr"}, {"mean": [0.5, 0.5]}, {"deviation": [1, 1, 0]}, {"depth": 3}]
)
def test_a_wrong_setting_is_refused(tmp_path, config) -> None:
    with pytest.raises(WeightsError, match=f"card 'small'.*{next(iter(config))}"):
        load(saved(tmp_path, "adaface"), "adaface", **config)


def test_a_truncated_file_is_refused(tmp_path) -> None:
    whole = saved(tmp_path, "adaface").read_bytes()
    path = tmp_path / "half.safetensors"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        load(path, "adaface")


class Trap:
    """A pickle of it makes a folder when it is opened carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path) -> None:
    path, proof = tmp_path / "small.ckpt", tmp_path / "ran"
    torch.save({"state_dict": small("adaface").state_dict(), "callback": Trap(proof)}, path)
    with pytest.raises(WeightsError, match="more than tensors"):
        load(path, "adaface")
    assert not proof.exists()
    torch.load(path, weights_only=False)  # and it was a trap
    assert proof.exists()


def test_shipped_cards_name_layouts_and_settings_that_exist() -> None:
    folder = Path(__file__).parents[1] / "checkpoints"
    cards = [Card.read(path) for path in folder.glob("*.toml")]
    cards = [card for card in cards if card.architecture.startswith("arcface-")]
    assert {card.architecture for card in cards} == {kind.LAYOUT for kind in LAYOUTS.values()}
    for card in cards:
        assert card.role == "recognizer"
        assert all((card.licence, card.source))
        replace(FaceInput(), **card.config)
