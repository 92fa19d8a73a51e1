"""Keras weights of RelGAN: a file in the published layout becomes the same network."""

from __future__ import annotations

import sys

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shields.errors import MissingPackage, WeightsError
from shields.models.keras import convert_relgan
from shields.models.relgan import PRESETS, RelGANModel
from shields.models.relgan_network import RelganGenerator
from shields.weights import Card
from tests import tiny
from tests.test_relgan import network as random_network

STAGES = {
    "conv_in": "conv_in_conv", "down1": "down1_conv", "down2": "down2_conv",
    "up2": "up2_deconv2", "up1": "up1_deconv2", "conv_out": "conv_out_conv",
}  # fmt: skip
VARIABLES = {
    "gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
    "moving_variance": "running_var", "mean_weights": "mean_weight",
    "variance_weights": "var_weight",
}  # fmt: skip


def keras_layers(network, first=1):
    """Layer -> variable -> array, as Keras 2 names and lays them out."""
    layers = {}

    def convolution(name, module):
        # PyTorch's (out, in, h, w), or transposed (in, out, h, w).
        kernel = np.transpose(module.weight.detach().numpy(), (2, 3, 1, 0))
        layers[name] = {"kernel": kernel, "bias": module.bias.detach().numpy()}

    def norm(name, module):
        state = module.state_dict()
        layers[name] = {theirs: state[ours].flatten().numpy() for theirs, ours in VARIABLES.items()}

    for stage, name in STAGES.items():
        convolution(name, getattr(network, stage)[0])
        if stage != "conv_out":
            norm(f"{stage}_norm", getattr(network, stage)[1])
    for index, block in enumerate(network.resb):
        for place in (0, 1):
            convolution(f"conv2d_{first + 2 * index + place}", block.f[3 * place])
            norm(f"block{index + 1}_{place}", block.f[3 * place + 1])
    return layers


def save_h5(path, layers, *, whole=False):
    with h5py.File(path, "w") as archive:
        root = archive.create_group("model_weights") if whole else archive
        if whole:
            optimizer = archive.create_group("optimizer_weights/conv_in_conv")
            optimizer["kernel:0"] = np.zeros(3)
        root.attrs["layer_names"] = [name.encode() for name in layers]
        root.create_group("conv_in_relu").attrs["weight_names"] = []
        for name, variables in layers.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = [f"{name}/{key}:0".encode() for key in variables]
            for key, value in variables.items():
                group[f"{name}/{key}:0"] = value


@pytest.fixture
def network():
    return random_network(seed=1).eval()


@pytest.mark.parametrize("whole", [False, True], ids=["weights", "model"])
@pytest.mark.parametrize("first", [1, 7], ids=["first-in-session", "later"])
def test_converted_file_forges_the_same(tmp_path, network, whole, first):
    save_h5(tmp_path / "g.h5", keras_layers(network, first), whole=whole)
    state, attributes, sign = convert_relgan(tmp_path / "g.h5")
    assert (attributes, sign) == (PRESETS[5], 1)
    built = RelganGenerator(5, 8, blocks=4).eval()
    built.load_state_dict(state, strict=True)
    image, vector = 2 * tiny.faces_image(2, 32) - 1, torch.rand(2, 5) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(built(image, vector)[0], network(image, vector)[0], atol=1e-4)
        assert torch.equal(built(image, vector)[1], network(image, vector)[1])


def test_conversion_becomes_a_manipulator(tmp_path, network):
    save_h5(tmp_path / "g.h5", keras_layers(network))
    state, attributes, sign = convert_relgan(tmp_path / "g.h5")
    save_file(state, tmp_path / "relgan.safetensors")
    card = Card(
        name="relgan", role="manipulator", architecture="relgan", file="relgan.safetensors",
        config={"attributes": list(attributes), "sign": sign},
    )  # fmt: skip
    loaded = RelGANModel.load(tmp_path / "relgan.safetensors", card)
    assert loaded.condition("blond_hair").value[0, 1] == 1


def test_transposed_kernel_scatters_as_keras_does(tmp_path, network):
    layers = keras_layers(network)
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4, 4, 16, 32)).astype(np.float32)  # (h, w, out, in)
    layers["up2_deconv2"] = {"kernel": kernel, "bias": np.zeros(16, np.float32)}
    save_h5(tmp_path / "g.h5", layers)
    built = RelganGenerator(5, 8, blocks=4)
    built.load_state_dict(convert_relgan(tmp_path / "g.h5")[0])
    small = rng.standard_normal((3, 3, 32)).astype(np.float32)
    wide = np.zeros((8, 8, 16), np.float32)
    for row in range(3):
        for column in range(3):
            part = np.einsum("hwoi,i->hwo", kernel, small[row, column])
            wide[2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += part
    wanted = wide[1:-1, 1:-1]  # "same" padding
    with torch.no_grad():
        got = built.up2[0](torch.from_numpy(small).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    assert np.allclose(got.numpy(), wanted, atol=1e-4)


def test_kernel_slides_as_keras_does(tmp_path, network):
    layers = keras_layers(network)
    kernel = np.zeros((4, 4, 8, 16), np.float32)  # (h, w, in, out)
    kernel[0, 2, 5, 3] = 1
    layers["down1_conv"] = {"kernel": kernel, "bias": np.zeros(16, np.float32)}
    save_h5(tmp_path / "g.h5", layers)
    built = RelganGenerator(5, 8, blocks=4)
    built.load_state_dict(convert_relgan(tmp_path / "g.h5")[0])
    image = torch.zeros(1, 8, 8, 8)
    # "same" pads one row and one column before: output (1, 1) reads input (1, 3) there.
    image[0, 5, 1, 3] = 1
    with torch.no_grad():
        got = built.down1[0](image)
    assert got.nonzero().tolist() == [[0, 3, 1, 1]]


def test_variance_of_keras_differs_by_less_than_one_level(network):
    """Keras's instance variance is biased; at 64 pixels that moves the picture hardly at all."""
    image, vector = 2 * tiny.faces_image(1, 64) - 1, torch.ones(1, 5)
    with torch.no_grad():
        ours = network(image, vector)[0]
        for module in network.modules():
            if hasattr(module, "var_weight"):
                module.forward = _keras_norm(module)
        theirs = network(image, vector)[0]
    difference = (ours - theirs).abs().max() / 2 * 255
    assert 0 < difference < 1


def _keras_norm(module):
    def forward(x):
        mean_in, var_in = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = x.var((1, 2, 3), correction=0, keepdim=True)
        statistics = [
            (mean_in, mean_ln, module.running_mean[..., None]),
            (var_in, var_ln, module.running_var[..., None]),
        ]
        shares = [module.mean_weight.softmax(0), module.var_weight.softmax(0)]
        mean, variance = (
            sum(share[i] * values[i] for i in range(3))
            for share, values in zip(shares, statistics, strict=True)
        )
        return (x - mean) / (variance + 1e-5).sqrt() * module.weight + module.bias

    return forward


def test_missing_package_says_what_to_install(tmp_path, network, monkeypatch):
    save_h5(tmp_path / "g.h5", keras_layers(network))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingPackage, match=r"pip install 'shields\[keras\]'"):
        convert_relgan(tmp_path / "g.h5")


class TestWrongFiles:
    def refused(self, path, message):
        with pytest.raises(WeightsError, match=message):
            convert_relgan(path)

    def test_no_hdf5_at_all(self, tmp_path):
        (tmp_path / "g.h5").write_bytes(b"not hdf5")
        self.refused(tmp_path / "g.h5", "cannot be read")
        self.refused(tmp_path / "absent.h5", "cannot be read")

    def test_another_network(self, tmp_path):
        save_h5(tmp_path / "g.h5", {"dense_1": {"kernel": np.zeros((2, 2), np.float32)}})
        self.refused(tmp_path / "g.h5", "no layer conv_in with kernel; it holds dense_1")

    def test_a_block_too_few(self, tmp_path, network):
        layers = keras_layers(network)
        del layers["conv2d_8"]
        save_h5(tmp_path / "g.h5", layers)
        self.refused(tmp_path / "g.h5", "missing")

    def test_a_norm_without_its_statistics(self, tmp_path, network):
        layers = keras_layers(network)
        del layers["block2_1"]["moving_variance"]
        save_h5(tmp_path / "g.h5", layers)
        self.refused(tmp_path / "g.h5", "lacks moving_variance")

    def test_values_that_are_not_finite(self, tmp_path, network):
        layers = keras_layers(network)
        layers["block2_1"]["beta"] = np.full_like(layers["block2_1"]["beta"], np.nan)
        save_h5(tmp_path / "g.h5", layers)
        self.refused(tmp_path / "g.h5", "not finite")

    def test_attributes_whose_names_nobody_knows(self, tmp_path):
        save_h5(tmp_path / "g.h5", keras_layers(random_network(attributes=3)))
        self.refused(tmp_path / "g.h5", "takes 3 attributes")
