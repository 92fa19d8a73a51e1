"""`models.load`: published sizes and layouts, names, paths, and what is said when it fails."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shields import models
from shields.errors import ConfigError, UnknownName, WeightsError
from shields.models.base import Detector
from shields.models.networks import MobileFaceNet, Taef2
from shields.weights import WeightStore, read_state_dict
from tests import tiny
from tests.cards import write_card

CPU = torch.device("cpu")


# Published sizes and layouts


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameter_counts_are_the_published_ones():
    network = Taef2()
    assert round(count(network.encoder) / 1e6, 2) == 1.34
    assert round(count(network.decoder) / 1e6, 2) == 1.34
    assert round(count(MobileFaceNet()) / 1e6, 1) == 1.0


@pytest.fixture(scope="module")
def whole_taef2():
    with tiny.seeded(4):
        return Taef2().eval()


def save_pair(network, folder):
    for half in ("encoder", "decoder"):
        torch.save(getattr(network, half).state_dict(), folder / f"taef2_{half}.pth")


@pytest.mark.parametrize("which", ["", "taef2_encoder.pth", "taef2_decoder.pth"])
def test_taef2_loads_the_published_pair(which, whole_taef2, tmp_path):
    save_pair(whole_taef2, tmp_path)
    path = tmp_path / which
    network = models.load("autoencoder", str(path), store=WeightStore(), device=CPU)
    image = tiny.faces_image(1, 32)
    # equal up to the order of sums, which the memory layout decides
    latent = network.encode(image)
    torch.testing.assert_close(latent, whole_taef2.encoder(image), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network.decode(latent), whole_taef2(image), atol=1e-5, rtol=1e-5)
    assert network.name == path.name


def test_taef2_says_which_half_is_missing(whole_taef2, tmp_path):
    save_pair(whole_taef2, tmp_path)
    (tmp_path / "taef2_decoder.pth").unlink()
    for path in (tmp_path, tmp_path / "taef2_encoder.pth"):
        with pytest.raises(WeightsError, match="decoder"):
            models.load("autoencoder", str(path), store=WeightStore(), device=CPU)


def test_taef2_loads_the_layout_of_hugging_face(whole_taef2, tmp_path):
    renamed = {}
    for key, value in whole_taef2.state_dict().items():
        half, index, rest = key.split(".", 2)
        # There the clamp in front of the decoder is no layer, so its count starts one later.
        place = int(index) - (half == "decoder")
        renamed[f"{half}.layers.{place}.{rest}"] = value.contiguous()
    save_file(renamed, tmp_path / "hub.safetensors")
    write_card(tmp_path, "hub", "autoencoder", "taef2", file="hub.safetensors")
    network = models.load(
        "autoencoder", str(tmp_path / "hub.safetensors"), store=WeightStore(), device=CPU
    )
    image = tiny.faces_image(1, 32)
    # equal up to the order of sums, which the memory layout decides
    latent = network.encode(image)
    torch.testing.assert_close(latent, whole_taef2.encoder(image), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network.decode(latent), whole_taef2(image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_folder_is_loaded_in_float32(variant, tmp_path):
    vae = tiny.diffusion_parts()["vae"].half()
    vae.save_pretrained(tmp_path / "half", variant=variant)
    network = models.load("autoencoder", str(tmp_path / "half"), store=WeightStore(), device=CPU)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(network.network.decoder.conv_in.bias, vae.decoder.conv_in.bias.float())


def test_damaged_folder_is_a_clear_error(tmp_path):
    folder = tmp_path / "vae"
    tiny.diffusion_parts()["vae"].save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="vae cannot be loaded as AutoencoderKL"):
        models.load("autoencoder", str(folder), store=WeightStore(), device=CPU)


def test_folder_that_lacks_weights_of_the_network_is_refused(tmp_path):
    folder = tmp_path / "vae"
    vae = tiny.diffusion_parts()["vae"]
    vae.save_pretrained(folder)
    state = vae.state_dict()
    state.pop("decoder.conv_in.bias")
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"decoder\.conv_in\.bias"):
        models.load("autoencoder", str(folder), store=WeightStore(), device=CPU)


def test_folder_of_another_kind_of_network_names_those_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(WeightsError, match=r"UNet2DModel.*AutoencoderKL"):
        models.load("autoencoder", str(tmp_path), store=WeightStore(), device=CPU)


# load


def test_weights_that_do_not_fit_their_card_name_the_keys(store, tmp_path):
    save_file(MobileFaceNet().state_dict(), tmp_path / "wrong.safetensors")
    write_card(tmp_path, "wrong", "autoencoder", "taef2", file="wrong.safetensors")
    with pytest.raises(WeightsError, match=r"'wrong' do not fit Taef2: .*encoder\.0\.weight"):
        models.load("autoencoder", "wrong", store=WeightStore(tmp_path), device=CPU)


@pytest.mark.parametrize(
    ("role", "name", "kind", "said"),
    [
        ("autoencoder", "smal-taef2", UnknownName, "did you mean small-taef2"),
        ("autoencoder", "random-facenet", ConfigError, "has role 'recognizer'"),
        ("perceptual", "features:random-lpips-squeeze", ConfigError, "not a perceptual"),
        ("perceptual", "features:nothing", UnknownName, "no autoencoder is called 'nothing'"),
        ("autoencoder", "./nothing.safetensors", WeightsError, "no file or folder"),
        ("recognizer", "nobody/nothing", WeightsError, "no file or folder"),
        ("autoencoder", "nobody/nothing", WeightsError, "hf download nobody/nothing"),
        ("diffusion", "nobody/nothing", WeightsError, "cache of Hugging Face"),
        ("recognizer", "", UnknownName, "there are"),
        ("recogniser", "random-facenet", UnknownName, "did you mean recognizer"),
    ],
)
def test_what_cannot_be_found_says_what_to_do(role, name, kind, said, store):
    with pytest.raises(kind, match=said):
        models.load(role, name, store=store, device=CPU)


def test_detector_is_found_by_name(store):
    detector = models.load("detector", "mtcnn", store=store, device=CPU)
    assert isinstance(detector, Detector)
    with pytest.raises(UnknownName, match="did you mean mtcnn"):
        models.load("detector", "mtcn", store=store, device=CPU)


def test_file_is_loaded_by_path_with_its_card_beside_it(store):
    path = store.folder / "small-taef2.safetensors"
    for given in (path, path.with_suffix(".toml")):
        network = models.load("autoencoder", str(given), store=WeightStore(), device=CPU)
        assert network.name == "small-taef2"
    with pytest.raises(ConfigError, match="describes role 'autoencoder', needed"):
        models.load("recognizer", str(path), store=WeightStore(), device=CPU)


def test_file_without_a_card_says_how_to_write_one(store, tmp_path):
    path = tmp_path / "mystery.safetensors"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"mystery\.toml.*portrait-ae"):
        models.load("autoencoder", str(path), store=store, device=CPU)


class _Caller:
    def __reduce__(self):
        return print, ("this was run",)


def test_a_pickle_that_asks_to_run_code_is_refused_without_telling_how_to_run_it(tmp_path, capsys):
    torch.save({"a": torch.zeros(1), "b": _Caller()}, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match="asks to run code") as caught:
        read_state_dict(tmp_path / "net.pth")
    assert "weights_only" not in str(caught.value)
    assert "this was run" not in capsys.readouterr().out


def test_a_factory_must_return_what_its_role_promises(tmp_path, monkeypatch):
    (tmp_path / "factories_of_mine.py").write_text(
        "from shields.models.manipulation import wrap\n"
        "def forger():\n    return wrap(lambda image: image)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    loaded = {"store": WeightStore(), "device": torch.device("cpu")}
    assert models.load("manipulator", "factories_of_mine:forger", **loaded)
    with pytest.raises(ConfigError, match=r"must return a recognizer: subclass .*base\.Recognizer"):
        models.load("recognizer", "factories_of_mine:forger", **loaded)
