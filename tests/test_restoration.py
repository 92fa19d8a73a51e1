"""Restoration networks: their layout, photos of any size, and the purifiers that run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from robustness.purifiers import load
from robustness.purifiers.adaptive import Adaptive
from shields.errors import ConfigError, WeightsError
from shields.models import load as load_network
from shields.models.restoration import (
    Compact,
    CompactRestorer,
    PerturbationUNet,
    Restorer,
    UNetRestorer,
)
from shields.weights import Card, WeightStore
from tests import cards, tiny

CPU = torch.device("cpu")


def awake(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill the last layer, which starts at zero, and the slopes, which start equal."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.randn(value.shape, generator=rng) * 0.05)
    return network


def compact(scale: int = 2, *, convolutions: int = 3) -> Compact:
    with tiny.seeded(1):
        network = Compact(scale, features=8, convolutions=convolutions)
    awake(network)
    return network


def unet() -> PerturbationUNet:
    with tiny.seeded(2):
        network = PerturbationUNet(widths=(8, 8, 16))
    awake(network)
    return network


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    for scale in (1, 2):
        cards.save_file_model(
            tmp_path, f"compact-{scale}", "purifier", "compact", compact(scale),
            f"[config]\nscale = {scale}\nfeatures = 8\nconvolutions = 3\n",
        )  # fmt: skip
    cards.save_file_model(
        tmp_path, "knowing", "purifier", "unet", unet(), "[config]\nwidths = [8, 8, 16]\n"
    )
    return tmp_path


# --- the networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2])
def test_compact_is_a_chain_added_to_the_nearest_enlargement(scale: int) -> None:
    network, image = compact(scale, convolutions=2), tiny.faces_image(2, 12)
    state: dict[str, Tensor] = network.state_dict()
    values = image
    for place in (0, 2, 4):
        weight, bias = state[f"body.{place}.weight"], state[f"body.{place}.bias"]
        values = functional.conv2d(functional.pad(values, (1, 1, 1, 1)), weight, bias)
        slope = state[f"body.{place + 1}.weight"].view(1, -1, 1, 1)
        values = torch.where(values > 0, values, values * slope)
    values = functional.conv2d(values, state["body.6.weight"], state["body.6.bias"], padding=1)
    wanted = image.repeat_interleave(scale, 2).repeat_interleave(scale, 3).clone()
    for channel in range(3):
        for down in range(scale):
            for right in range(scale):
                plane = values[:, (channel * scale + down) * scale + right]
                wanted[:, channel, down::scale, right::scale] += plane
    with torch.no_grad():
        torch.testing.assert_close(network(image), wanted, atol=1e-5, rtol=0)


def test_untrained_networks_change_next_to_nothing() -> None:
    image = tiny.faces_image(1, 16)
    assert torch.equal(PerturbationUNet((8, 8))(image), image)
    twice = functional.interpolate(image, scale_factor=2.0)
    torch.testing.assert_close(Compact(1, 8, 2)(image), image, atol=0.02, rtol=0)
    torch.testing.assert_close(Compact(2, 8, 2)(image), twice, atol=0.02, rtol=0)


def test_every_layer_of_a_deep_network_hears_of_the_first_step() -> None:
    with tiny.seeded(0):
        network = Compact(2, 16, 16)
    network(tiny.faces_image(1, 16)).square().mean().backward()
    sizes = [float(layer.weight.grad.abs().mean()) for layer in network.body
             if isinstance(layer, torch.nn.Conv2d) and layer.weight.grad is not None]  # fmt: skip
    assert len(sizes) == 18
    assert min(sizes) > 1e-3 * sizes[0]


def test_the_shipped_size_stays_within_four_megabytes() -> None:
    bytes_ = 2 * sum(value.numel() for value in Compact(2, 64, 16).parameters())
    assert bytes_ == 1_201_304
    assert bytes_ < 4e6


@pytest.mark.parametrize("scale", [1, 2])
def test_spandrel_loads_our_file_as_compact(weights: Path, scale: int) -> None:
    spandrel = pytest.importorskip("spandrel")
    descriptor = spandrel.ModelLoader().load_from_state_dict(
        load_file(weights / f"compact-{scale}.safetensors")
    )
    assert descriptor.architecture.id == "Compact"
    assert descriptor.scale == scale
    image = tiny.faces_image(1, 20)
    ours = load_network("purifier", f"compact-{scale}", store=WeightStore(weights), device=CPU)
    assert isinstance(ours, Restorer)
    theirs = descriptor.eval()(image)
    torch.testing.assert_close(ours.restore(image), theirs.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1, 2])
def test_tiles_give_what_the_whole_gives(scale: int) -> None:
    image = tiny.faces_image(2, 37, width=50)
    restorer = CompactRestorer(compact(scale))
    whole = restorer.restore(image)
    assert whole.shape == (2, 3, 37 * scale, 50 * scale)
    restorer.tile = 16
    torch.testing.assert_close(restorer.restore(image), whole, atol=1e-5, rtol=0)
    # One pixel less than what a pixel depends on, and a seam would show.
    restorer.network.reach -= 1
    assert float((restorer.restore(image) - whole).abs().max()) > 1e-4


def test_a_unet_takes_any_size_and_subtracts() -> None:
    image, network = tiny.faces_image(2, 21, width=30), unet()
    restorer = UNetRestorer(network)
    made = restorer.restore(image)
    assert made.shape == image.shape
    padded = functional.pad(image, (0, 2, 0, 3), mode="replicate")
    with torch.no_grad():
        found = (padded - network.unet(padded * 2 - 1))[..., :21, :30]
    torch.testing.assert_close(made, found.clamp(0, 1), atol=1e-6, rtol=0)


def test_networks_that_do_not_fit_their_card_are_named(weights: Path) -> None:
    card = Card(name="x", role="purifier", architecture="compact", file="compact-2.safetensors",
                config={"scale": 2, "features": 8, "convolutions": 4})  # fmt: skip
    with pytest.raises(WeightsError, match="missing"):
        CompactRestorer.load(weights / "compact-2.safetensors", card)
    card = Card(name="x", role="purifier", architecture="compact", file="compact-2.safetensors",
                config={"scale": 3})  # fmt: skip
    with pytest.raises(WeightsError, match="`scale` must be 1 or 2, got 3"):
        CompactRestorer.load(weights / "compact-2.safetensors", card)


# --- the purifiers -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["adaptive:knowing", "adaptive:compact-1"])
def test_the_contract_of_purifiers(text: str, weights: Path) -> None:
    purifier = load(text, store=WeightStore(weights), device=CPU)
    image = tiny.faces_image(2, 23, width=32)
    made = purifier.purify(image)
    assert made.shape == image.shape
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    assert not torch.equal(made, image)
    singles = torch.cat([purifier.purify(one[None]) for one in image])
    torch.testing.assert_close(made, singles, atol=1e-5, rtol=0)
    assert type(purifier.config)(**purifier.config.to_dict()) == purifier.config


def test_an_adaptive_purifier_has_to_be_named_and_keeps_the_size(weights: Path) -> None:
    store = WeightStore(weights)
    with pytest.raises(ConfigError, match="adaptive:purifier-ars-latent"):
        load("adaptive:", store=store, device=CPU)
    with pytest.raises(ConfigError, match="enlarges"):
        load("adaptive:compact-2", store=store, device=CPU)
    image = tiny.faces_image(1, 16)
    restorer = UNetRestorer(unet())
    assert torch.equal(Adaptive(restorer).purify(image), restorer.restore(image))


def test_gradients_pass_where_a_protector_could_use_them() -> None:
    image = tiny.faces_image(1, 16).requires_grad_(True)
    (gradient,) = torch.autograd.grad(Adaptive(UNetRestorer(unet())).purify(image).sum(), image)
    assert float(gradient.abs().max()) > 0


def test_a_damaged_file_is_refused(weights: Path) -> None:
    save_file({"body.0.weight": torch.zeros(1)}, weights / "compact-2.safetensors")
    with pytest.raises(WeightsError, match="compact-2"):
        load("super-resolution:compact-2", store=WeightStore(weights), device=CPU)
