"""Face parsers: layout of the published files, one order of classes, pinned mode."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from shields import models
from shields.errors import WeightsError
from shields.masks import CLASSES
from shields.models import parsing
from shields.models.bisenet import BiSeNet
from shields.models.parsing import BiSeNetParser, SegformerParser, common_order
from shields.weights import Card, WeightStore
from tests import tiny
from tests.cards import randomised, write_card

CPU = torch.device("cpu")
#: the order of CelebAMask-HQ's own script, which the published SegFormer has
CELEBAMASK = (
    "background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear",
    "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth",
)  # fmt: skip
#: the order of zllrunning's BiSeNet
BISENET = (
    "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r",
    "nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat",
)  # fmt: skip


# --- classes -------------------------------------------------------------------------------------


def test_both_published_tables_name_the_same_classes() -> None:
    assert CLASSES == BISENET
    assert parsing.CLASSES is CLASSES
    assert common_order(dict(enumerate(BISENET)), "bisenet") == list(range(19))
    order = common_order({str(index): name for index, name in enumerate(CELEBAMASK)}, "script")
    assert [CELEBAMASK[index] for index in order] == list(CLASSES)
    assert order[10] == 2  # the nose
    older = {str(index): f"{name}.png" for index, name in enumerate(CELEBAMASK)}
    assert common_order(older, "older") == order


@pytest.mark.parametrize(
    "table",
    [
        {},
        dict(enumerate(CLASSES[:18])),
        dict(enumerate((*CLASSES[:18], "beard"))),
        {index + 1: name for index, name in enumerate(CLASSES)},
        {"zero": "background", **dict(enumerate(CLASSES[1:], start=1))},
    ],
)
def test_other_classes_are_refused(table) -> None:
    with pytest.raises(WeightsError, match="must be the 19 of CelebAMask-HQ"):
        common_order(table, "odd")


# --- BiSeNet -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A folder with a card and a random file in the published layout, a bare state dict."""
    folder = tmp_path_factory.mktemp("bisenet")
    with tiny.seeded(0):
        network = randomised(BiSeNet(), 1)
    torch.save(network.state_dict(), folder / "79999_iter.pth")
    write_card(
        folder, "small-bisenet", "parser", "bisenet", file="79999_iter.pth",
        extra="[config]\nsize = 64\n",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bisenet(official: Path) -> BiSeNetParser:
    network = models.load("parser", "small-bisenet", store=WeightStore(official), device=CPU)
    assert isinstance(network, BiSeNetParser)
    return network


def test_bisenet_has_the_published_keys_and_parameters() -> None:
    with torch.device("meta"):
        network = BiSeNet()
    state = network.state_dict()
    assert len(state) == 191
    assert sum(parameter.numel() for parameter in network.parameters()) == 13_300_416
    assert not any(isinstance(m, nn.Conv2d) and m.bias is not None for m in network.modules())
    shapes = {
        "cp.resnet.conv1.weight": (64, 3, 7, 7),
        "cp.resnet.layer1.1.bn2.running_var": (64,),
        "cp.resnet.layer4.0.downsample.0.weight": (512, 256, 1, 1),
        "cp.resnet.layer2.0.downsample.1.weight": (128,),
        "cp.arm16.conv.conv.weight": (128, 256, 3, 3),
        "cp.arm32.conv_atten.weight": (128, 128, 1, 1),
        "cp.arm32.bn_atten.num_batches_tracked": (),
        "cp.conv_head32.bn.bias": (128,),
        "cp.conv_head16.conv.weight": (128, 128, 3, 3),
        "cp.conv_avg.conv.weight": (128, 512, 1, 1),
        "ffm.convblk.conv.weight": (256, 256, 1, 1),
        "ffm.conv1.weight": (64, 256, 1, 1),
        "ffm.conv2.weight": (256, 64, 1, 1),
        "conv_out.conv.conv.weight": (256, 256, 3, 3),
        "conv_out.conv_out.weight": (19, 256, 1, 1),
        "conv_out16.conv_out.weight": (19, 64, 1, 1),
        "conv_out32.conv.conv.weight": (64, 128, 3, 3),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_bisenet_backbone_is_torchvisions_resnet18() -> None:
    """An independent network with the same keys gives the three feature maps."""
    vision = pytest.importorskip("torchvision.models")
    with tiny.seeded(0):
        ours, theirs = BiSeNet().cp.resnet.eval(), vision.resnet18(weights=None).eval()
    randomised(theirs, 2)
    state = {key: value for key, value in theirs.state_dict().items() if "fc." not in key}
    ours.load_state_dict(state, strict=True)
    image = tiny.faces_image(1, 64)
    hidden = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image)))))
    for result, stage in zip(ours(image), ("layer2", "layer3", "layer4"), strict=True):
        hidden = getattr(theirs, stage)(hidden)
        torch.testing.assert_close(result, hidden)


def test_an_official_file_comes_back_bit_for_bit(official, bisenet) -> None:
    saved = torch.load(official / "79999_iter.pth", weights_only=True)
    own = bisenet.network.state_dict()
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[key], saved[key]) for key in saved)
    assert bisenet.name == "small-bisenet"
    image = tiny.faces_image(2, 64)
    with tiny.seeded(5):
        plain = BiSeNet()
    plain.load_state_dict(saved)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = plain.eval()((image - mean) / deviation)
    torch.testing.assert_close(bisenet(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (130, 33)])
def test_logits_and_labels_have_the_size_of_the_photo(bisenet, size) -> None:
    image = tiny.faces_image(2, size[0], width=size[1])
    logits, labels = bisenet(image), bisenet.labels(image)
    assert logits.shape == (2, 19, *size)
    assert labels.shape == (2, *size)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, logits.argmax(dim=1))
    singles = torch.cat([bisenet(sample[None]) for sample in image])
    torch.testing.assert_close(logits, singles, atol=1e-4, rtol=1e-4)
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3


def test_statistics_stay_those_of_the_file_whatever_the_caller_does(bisenet) -> None:
    image = tiny.faces_image(1, 64)
    expected = bisenet.labels(image), bisenet(image)
    bisenet.train()
    nn.Sequential(bisenet).train()
    assert not any(module.training for module in bisenet.modules())
    assert torch.equal(bisenet.labels(image), expected[0])
    assert torch.equal(bisenet(image), expected[1])
    # with statistics of the batch a norm on a 1 x 1 map could not even run
    with tiny.seeded(0), pytest.raises(ValueError, match="more than 1 value per channel"):
        BiSeNet().train()(image)


def test_gradient_reaches_the_photo_alone(bisenet) -> None:
    image = tiny.faces_image(1, 48).requires_grad_(True)
    bisenet(image).square().mean().backward()
    assert float(image.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in bisenet.parameters())
    assert not bisenet.labels(image).requires_grad


def test_building_one_fetches_nothing(monkeypatch) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("the constructor asked for weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with torch.device("meta"):
        BiSeNet()


def test_a_file_of_another_network_is_refused(official, tmp_path) -> None:
    state = torch.load(official / "79999_iter.pth", weights_only=True)
    state.pop("ffm.conv1.weight")
    state["cp.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "less.pth")
    card = Card(name="less", role="parser", architecture="bisenet", file="less.pth")
    words = r"1 missing \(ffm.conv1.weight\); 1 unexpected \(cp.extra\)"
    with pytest.raises(WeightsError, match=words):
        BiSeNetParser.load(tmp_path / "less.pth", card)


# --- SegFormer -----------------------------------------------------------------------------------


def save_segformer(folder: Path, labels: tuple[str, ...], **preprocessing: object) -> nn.Module:
    """A random SegFormer as its publishers lay it out; returns transformers' own network."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16, id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )  # fmt: skip
    with tiny.seeded(4):
        network = randomised(SegformerForSemanticSegmentation(config), 5).eval()
        for parameter in network.parameters():  # far enough from zero for classes to differ
            nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    settings = {"size": {"height": 64, "width": 64}, **preprocessing}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return network


def load_segformer(folder: Path) -> SegformerParser:
    card = Card(name="small-segformer", role="parser", architecture="segformer", repository="a/b")
    return SegformerParser.load(folder, card)


@pytest.fixture
def quiet(monkeypatch) -> None:
    """Saving draws bars on the terminal otherwise."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.usefixtures("quiet")
def test_segformer_classes_are_mapped_by_name(tmp_path) -> None:
    theirs = save_segformer(tmp_path, CELEBAMASK)
    ours = load_segformer(tmp_path)
    image = tiny.faces_image(2, 64)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    native = theirs(pixel_values=(image - mean) / deviation).logits
    native = functional.interpolate(native, size=(64, 64), mode="bilinear")
    result = ours(image)
    assert result.shape == (2, 19, 64, 64)
    for index, name in enumerate(CLASSES):
        torch.testing.assert_close(result[:, index], native[:, CELEBAMASK.index(name)])
    named = [CELEBAMASK[index] for index in native.argmax(dim=1).flatten().tolist()]
    assert [CLASSES[index] for index in ours.labels(image).flatten().tolist()] == named
    assert len(set(named)) > 1
    permuted = [CLASSES.index(name) for name in CELEBAMASK]
    assert permuted != list(range(19))
    assert not torch.allclose(result, native)


@pytest.mark.usefixtures("quiet")
def test_two_orders_of_one_network_agree(tmp_path) -> None:
    theirs = save_segformer(tmp_path / "script", CELEBAMASK)
    save_segformer(tmp_path / "ours", CLASSES)
    order = [CELEBAMASK.index(name) for name in CLASSES]
    # The same weights, their outputs in the other order.
    file = tmp_path / "ours" / "model.safetensors"
    state = load_file(file)
    state["decode_head.classifier.weight"] = theirs.decode_head.classifier.weight.data[order]
    state["decode_head.classifier.bias"] = theirs.decode_head.classifier.bias.data[order]
    save_file(state, file, metadata={"format": "pt"})
    image = tiny.faces_image(1, 40)
    one, other = load_segformer(tmp_path / "script"), load_segformer(tmp_path / "ours")
    torch.testing.assert_close(one(image), other(image))


@pytest.mark.usefixtures("quiet")
def test_segformer_reads_how_it_wants_its_pixels(tmp_path) -> None:
    theirs = save_segformer(
        tmp_path, CLASSES, size={"height": 96, "width": 96}, image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )  # fmt: skip
    ours = load_segformer(tmp_path)
    assert ours.size == 96
    image = tiny.faces_image(1, 96)
    native = theirs(pixel_values=4 * image - 2).logits
    native = functional.interpolate(native, size=(96, 96), mode="bilinear")
    torch.testing.assert_close(ours(image), native)
    assert not any(module.training for module in ours.train().modules())


@pytest.mark.usefixtures("quiet")
def test_segformer_keys_of_older_versions_load(tmp_path) -> None:
    """The published file dates from 2022; its keys have had other names since."""
    expected = save_segformer(tmp_path, CLASSES).state_dict()
    file = tmp_path / "model.safetensors"
    published = {older(key): value for key, value in load_file(file).items()}
    assert "segformer.encoder.block.0.0.attention.self.query.weight" in published
    assert "decode_head.linear_c.1.proj.weight" in published
    save_file(published, file, metadata={"format": "pt"})
    loaded = load_segformer(tmp_path).network.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def older(key: str) -> str:
    """A key of today's transformers as version 4 had it."""
    for pattern, name in (
        (r"segformer\.stages\.(\d+)\.blocks\.", r"segformer.encoder.block.\1."),
        (
            r"segformer\.stages\.(\d+)\.patch_embeddings\.",
            r"segformer.encoder.patch_embeddings.\1.",
        ),
        (r"segformer\.stages\.(\d+)\.layer_norm\.", r"segformer.encoder.layer_norm.\1."),
        (r"attention\.([qkv])_proj\.", lambda found: f"attention.self.{names[found[1]]}."),
        (r"attention\.sequence_reduction\.sequence_reduction\.", "attention.self.sr."),
        (r"attention\.sequence_reduction\.layer_norm\.", "attention.self.layer_norm."),
        (r"attention\.o_proj\.", "attention.output.dense."),
        (r"mlp\.fc", "mlp.dense"),
        (r"layernorm_before", "layer_norm_1"),
        (r"layernorm_after", "layer_norm_2"),
        (r"linear_projections", "linear_c"),
    ):
        key = re.sub(pattern, name, key)
    return key


names = {"q": "query", "k": "key", "v": "value"}


@pytest.mark.usefixtures("quiet")
def test_a_folder_that_does_not_fit_is_refused(tmp_path, capfd) -> None:
    save_segformer(tmp_path / "good", CLASSES)
    state = load_file(tmp_path / "good" / "model.safetensors")

    def broken(name: str, **changes: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((tmp_path / "good" / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    with pytest.raises(WeightsError, match="must be the 19 of CelebAMask-HQ"):
        load_segformer(broken("unnamed", id2label=None))
    with pytest.raises(WeightsError, match="holds a vit, not a segformer"):
        load_segformer(broken("other", model_type="vit"))
    with pytest.raises(WeightsError, match=r"do not fit|cannot be loaded"):
        load_segformer(broken("wide", decoder_hidden_size=24))
    with pytest.raises(WeightsError, match="do not fit"):
        load_segformer(broken("deep", depths=[1, 2]))
    empty = broken("empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds no weights"):
        load_segformer(empty)
    with pytest.raises(WeightsError, match="is a folder"):
        load_segformer(empty / "config.json")
    odd = broken("odd")
    (odd / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 32}}')
    with pytest.raises(WeightsError, match="one square size"):
        load_segformer(odd)
    capfd.readouterr()
    load_segformer(tmp_path / "good")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["bisenet-celebamask", "segformer-face-parsing"])
def test_cards_name_registered_parsers(name) -> None:
    card = WeightStore().card(name)
    assert card.role == "parser"
    assert card.architecture in models.PARSERS
    assert card.licence
    assert card.data
