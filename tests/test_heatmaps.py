"""Heat maps against a Grad-CAM written by hand, and where on the photo they lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from shields import models
from shields.errors import ConfigError, ImageError
from shields.models.heatmaps import Method, heat_map, last_map
from tests import tiny

pytest.importorskip("pytorch_grad_cam")

METHODS: tuple[Method, ...] = ("grad-cam", "grad-cam++")
CPU = torch.device("cpu")


class NamingRecognizer(tiny.TinyRecognizer):
    """The same network with five people behind its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.people = nn.Linear(16, 5)

    def logits(self, face):
        return self.people(self._embed(face))


def naming_recognizer() -> NamingRecognizer:
    with tiny.seeded(3):
        network = NamingRecognizer()
    network.freeze()
    return network


def stretched(values: torch.Tensor) -> torch.Tensor:
    """From 0 to 1, every map on its own."""
    flat = values.flatten(1)
    least, most = flat.min(1).values, flat.max(1).values
    return (values - least[:, None, None]) / (most - least)[:, None, None]


def by_hand(score, activation: torch.Tensor, method: Method) -> torch.Tensor:
    """Grad-CAM(++) at the layer's own resolution, from the papers: (B, h, w)."""
    maps = activation.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(score(maps).sum(), maps)
    maps = maps.detach()
    if method == "grad-cam":
        weights = slope.mean(dim=(2, 3))
    else:
        total = maps.sum(dim=(2, 3), keepdim=True)
        alpha = slope**2 / (2 * slope**2 + total * slope**3 + 1e-6)
        weights = (slope.clamp_min(0) * alpha).sum(dim=(2, 3))
    return torch.relu(torch.einsum("bc,bcyx->byx", weights, maps))


def enlarged(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """As ID-Guard has it: from 0 to 1, enlarged, from 0 to 1 again."""
    grown = functional.interpolate(stretched(values)[:, None], size, mode="bilinear")
    return stretched(grown[:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_map_of_an_aligned_crop_is_that_of_the_paper(method) -> None:
    network = tiny.recognizer()
    face = tiny.faces_image(3, 32, width=24)
    deep = network.features(face)[-1]
    clean = network.head(deep.flatten(1))
    direction = clean / clean.norm(dim=1, keepdim=True)

    def length(maps):
        return (network.head(maps.flatten(1)) * direction).sum(1)

    expected = enlarged(by_hand(length, deep, method), (32, 24))
    result = heat_map(network, face, method=method)  # the photo is the crop: nothing is moved
    assert result.shape == (3, 1, 32, 24)
    torch.testing.assert_close(result[:, 0], expected, atol=2e-4, rtol=0)
    assert expected.flatten(1).std(dim=1).min() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_network_with_classes_is_asked_for_the_likeliest(method) -> None:
    network = naming_recognizer()
    face = tiny.faces_image(3, 32, width=24)
    deep = network.features(face)[-1]

    def largest(maps):
        return network.people(network.head(maps.flatten(1))).max(dim=1).values

    expected = enlarged(by_hand(largest, deep, method), (32, 24))
    result = heat_map(network, face, method=method)
    torch.testing.assert_close(result[:, 0], expected, atol=2e-4, rtol=0)
    plain = heat_map(tiny.recognizer(3), face, method=method)
    assert float((result - plain).abs().max()) > 0.05


def test_another_layer_can_be_asked() -> None:
    network = tiny.recognizer()
    face = tiny.faces_image(1, 32, width=24)
    shallow = network.features(face)[0]
    clean = network.embed(face)

    def length(maps):
        return (network.head(network.deep(maps).flatten(1)) * clean).sum(1)

    expected = enlarged(by_hand(length, shallow, "grad-cam"), (32, 24))
    result = heat_map(network, face, method="grad-cam", layer=network.shallow)
    torch.testing.assert_close(result[:, 0], expected, atol=2e-4, rtol=0)


def test_map_lies_where_the_face_is() -> None:
    """A face pasted at a known place: the map of the photo is that of the crop, at that place."""
    network = tiny.recognizer()
    face = tiny.faces_image(1, 32, width=24)
    alone = heat_map(network, face, network.template[None])
    for left, top in ((0, 0), (17, 9), (30, 5)):
        photo = torch.full((1, 3, 48, 60), 0.5)
        photo[..., top : top + 32, left : left + 24] = face
        points = network.template[None] + torch.tensor([left, top])
        result = heat_map(network, photo, points)
        inside = result[..., top : top + 32, left : left + 24]
        torch.testing.assert_close(inside, alone, atol=1e-3, rtol=0)
        outside = result.clone()
        outside[..., top : top + 32, left : left + 24] = 0
        assert float(outside.abs().max()) < 1e-3


def test_map_turns_and_grows_with_the_alignment() -> None:
    network = tiny.recognizer()
    face = tiny.faces_image(1, 32, width=24)
    alone = heat_map(network, face, network.template[None])[0, 0].numpy()
    # Twice as large and turned by a quarter: crop (x, y) lies at photo (70 - 2 y, 4 + 2 x).
    photo = functional.interpolate(face, scale_factor=2, mode="bilinear").rot90(-1, dims=(2, 3))
    canvas = torch.full((1, 3, 60, 80), 0.5)
    canvas[..., 4:52, 8:72] = photo
    x, y = network.template.T
    points = torch.stack([71 - 2 * (y + 0.5) + 0.5, 4 + 2 * (x + 0.5) - 0.5], dim=1)[None]
    result = heat_map(network, canvas, points)[0, 0].numpy()
    back = np.rot90(result[4:52, 8:72]).reshape(32, 2, 24, 2).mean(axis=(1, 3))
    assert np.corrcoef(back.ravel(), alone.ravel())[0, 1] > 0.98
    assert result[:3].max() == 0


def test_batch_equals_its_singles_and_lies_between_0_and_1() -> None:
    network = tiny.recognizer()
    image, points = tiny.faces_image(3, 64), tiny.landmarks(3, 64)
    together = heat_map(network, image, points)
    singles = [heat_map(network, image[i : i + 1], points[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(singles), atol=1e-5, rtol=0)
    assert torch.equal(together.amin(dim=(1, 2, 3)), torch.zeros(3))
    assert torch.equal(together.amax(dim=(1, 2, 3)), torch.ones(3))
    assert together.dtype == torch.float32


def test_no_gradient_flows_and_nothing_is_left_behind() -> None:
    network = tiny.recognizer()
    image = tiny.faces_image(2, 64).requires_grad_(True)
    kept, random = image.detach().clone(), torch.get_rng_state()
    result = heat_map(network, image, tiny.landmarks(2, 64))
    assert not result.requires_grad
    assert image.grad is None
    assert torch.equal(image.detach(), kept)
    assert torch.equal(torch.get_rng_state(), random)
    for module in network.modules():
        assert not module.training
        assert not module._forward_hooks
    for parameter in network.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_a_caller_without_gradients_gets_the_same_map() -> None:
    network = tiny.recognizer()
    image, points = tiny.faces_image(1, 64), tiny.landmarks(1, 64)
    expected = heat_map(network, image, points)
    with torch.no_grad():
        assert torch.equal(heat_map(network, image, points), expected)
    with torch.inference_mode():
        inferred = heat_map(network, image.clone(), points.clone())
    assert torch.equal(inferred.clone(), expected)


def test_a_map_without_any_evidence_is_zero() -> None:
    network = tiny.recognizer()
    with torch.no_grad():
        network.head.weight.zero_()
    result = heat_map(network, tiny.faces_image(1, 32, width=24))
    assert torch.equal(result, torch.zeros(1, 1, 32, 24))


class SharedActivation(tiny.TinyRecognizer):
    """One activation serves every layer, and `features` returns what it made last."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.shallow = nn.Sequential(self.shallow[0], self.act)
        self.deep = nn.Sequential(self.deep[0], self.act)


def test_a_module_that_runs_twice_is_no_layer() -> None:
    with tiny.seeded(0):
        network = SharedActivation()
    network.freeze()
    assert last_map(network, tiny.faces_image(1, 32, width=24)) is network.deep


class NoFeatures(tiny.TinyRecognizer):
    def _embed(self, face):
        return self.head(self.deep(self.shallow(face)).flatten(1))

    def features(self, face):
        raise ImageError("none are offered")


def test_without_features_the_last_map_on_the_way_is_taken() -> None:
    with tiny.seeded(0):
        network = NoFeatures()
    network.freeze()
    assert last_map(network, tiny.faces_image(1, 32, width=24)) is network.deep
    assert float(heat_map(network, tiny.faces_image(1, 64)).max()) == 1


def test_every_registered_recognizer_has_a_map(store) -> None:
    names = [name for name in store.names() if (store.folder / f"{name}.toml").is_file()]
    cards = [card for card in map(store.card, names) if card.role == "recognizer"]
    assert {card.architecture for card in cards} >= {"face-embedder", "mobilefacenet"}
    for card in cards:
        network = models.load("recognizer", card.name, store=store, device=CPU)
        height, width = network.crop_size
        face = tiny.faces_image(1, height, width=width)
        last = network.features(face)[-1]
        with torch.no_grad():
            seen = []
            hook = last_map(network, face).register_forward_hook(
                lambda _module, _given, output, seen=seen: seen.append(output)
            )
            network.embed(face)
            hook.remove()
        assert len(seen) == 1, card.name
        assert seen[0].shape == last.shape, card.name
        torch.testing.assert_close(seen[0], last)
        result = heat_map(network, tiny.faces_image(1, 64))
        assert result.shape == (1, 1, 64, 64)
        assert result.isfinite().all()


def test_what_makes_no_sense_is_refused() -> None:
    network, image = tiny.recognizer(), tiny.faces_image(1, 32, width=24)
    with pytest.raises(ConfigError, match="`method` must be one of"):
        heat_map(network, image, method="cam")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a module of the recognizer 'tiny-recognizer-0'"):
        heat_map(network, image, layer=nn.Conv2d(3, 3, 1))
    with pytest.raises(ImageError, match=r"must lie in \[0, 1\]"):
        heat_map(network, image - 1)
