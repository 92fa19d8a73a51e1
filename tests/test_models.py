"""The contracts of networks with a gradient: autoencoders, recognizers, manipulators, and so on.

Every architecture is built small and random, saved as its publisher does, and loaded by name.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from shields import models
from shields.errors import WeightsError
from shields.models.autoencoders import stages
from shields.models.perceptual import DeepFeatures, LpipsModel
from tests import tiny

CPU = torch.device("cpu")

AUTOENCODERS = ("tiny", "small-portrait-ae", "small-taef2", "small-kl", "small-tiny", "small-flux2")
RECOGNIZERS = ("tiny", "small-face-embedder", "random-mobilefacenet", "random-facenet",
               "small-arcface-ir", "small-arcface-iresnet", "small-arcface-ir-se101")  # fmt: skip
PERCEPTUAL = ("tiny", "random-lpips-squeeze", "features:small-portrait-ae", "features:small-kl",
              "features:small-tiny", "features:random-mobilefacenet")  # fmt: skip
MANIPULATORS = ("tiny", "small-stargan", "small-aggan", "small-fpgan", "small-relgan", "small-hisd")


def fetch(role, name, store):
    if name == "tiny":
        return getattr(tiny, role)()
    return models.load(role, name, store=store, device=CPU)


CASES = [
    *(("autoencoder", name) for name in AUTOENCODERS),
    *(("recognizer", name) for name in RECOGNIZERS),
    *(("perceptual", name) for name in PERCEPTUAL),
    *(("manipulator", name) for name in MANIPULATORS),
    ("classifier", "small-classifier"),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, store):
    """Role, network, and an image that it takes."""
    role, name = request.param
    network = fetch(role, name, store)
    if role == "recognizer":
        height, width = network.crop_size
        return role, network, tiny.faces_image(2, height, width=width)
    return role, network, tiny.faces_image(2, 32 if role == "manipulator" else 64)


def run(role, network, image):
    """One number a sample that depends on all that the network does."""
    if role == "autoencoder":
        return network.decode(network.encode(image)).flatten(1).square().mean(1)
    if role == "recognizer":
        return network.embed(image)[:, :3].sum(1)
    if role == "manipulator":
        return torch.stack(
            [network(image, name).square().mean((1, 2, 3)) for name in network.conditions]
        ).sum(0)
    if role == "classifier":
        return network(image).sum(1)
    return network(image, image.flip(3))


def test_every_architecture_is_under_test(store):
    architectures = {}
    for name in store.names():
        card = store.card(name)
        # Of the LPIPS backbones one is small enough; the others differ in data alone.
        if (store.folder / f"{name}.toml").is_file():
            architectures.setdefault(card.role, set()).add(card.architecture)
    assert architectures["autoencoder"] == set(models.AUTOENCODERS)
    assert architectures["recognizer"] == set(models.RECOGNIZERS)
    assert architectures["manipulator"] == set(models.MANIPULATORS)
    assert architectures["classifier"] == set(models.CLASSIFIERS)
    assert architectures["perceptual"] <= set(models.PERCEPTUAL)


def test_gradient_reaches_the_image_and_no_parameter(case):
    role, network, image = case
    image.requires_grad_(True)
    run(role, network, image).sum().backward()
    assert torch.isfinite(image.grad).all()
    per_sample = image.grad.flatten(1).abs().sum(1)
    assert (per_sample > 0).all()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_forward_changes_neither_input_nor_buffers_nor_random_state(case):
    role, network, image = case
    given, random = image.clone(), torch.get_rng_state()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    run(role, network, image)
    assert torch.equal(image, given)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_train_changes_no_bit(case):
    role, network, image = case
    expected = run(role, network, image)
    network.train()
    nn.Sequential(network).train()
    assert not any(module.training for module in network.modules())
    assert torch.equal(run(role, network, image), expected)


def test_batch_equals_its_singles(case):
    role, network, image = case
    singles = torch.cat([run(role, network, sample[None]) for sample in image])
    torch.testing.assert_close(run(role, network, image), singles, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_batch_is_that_of_its_singles(case):
    role, network, image = case

    def gradient(batch):
        batch = batch.clone().requires_grad_(True)
        run(role, network, batch).sum().backward()
        return batch.grad

    whole = gradient(image)
    singles = torch.cat([gradient(sample[None]) for sample in image])
    torch.testing.assert_close(whole, singles, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


def test_name_is_the_cards(case, request):
    _, network, _ = case
    name = request.node.callspec.params["case"][1]
    assert network.name == (f"tiny-{case[0]}-0" if name == "tiny" else name)


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("size", [(64, 64), (45, 51), (1, 9)])
def test_any_size_is_reconstructed_to_its_own_size(name, size, store):
    network = fetch("autoencoder", name, store)
    image = tiny.faces_image(1, size[0], width=size[1])
    rebuilt = network.reconstruct(image)
    assert rebuilt.shape == image.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    latent = network.encode(image)
    assert latent.shape[2:] == tuple(-(-side // network.multiple) for side in size)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_padding_does_not_touch_what_fits(name, store):
    network = fetch("autoencoder", name, store)
    image = tiny.faces_image(1, 4 * network.multiple)
    assert torch.equal(network.encode(image), network._encode(image))


@pytest.mark.parametrize("name", RECOGNIZERS)
def test_embeddings_have_unit_length_and_landmarks_lie_in_the_crop(name, store):
    network = fetch("recognizer", name, store)
    height, width = network.crop_size
    embedding = network.embed(tiny.faces_image(3, height, width=width))
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    assert network.template.shape == (5, 2)
    assert (network.template > 0).all()
    assert (network.template < torch.tensor([width, height])).all()
    # Eyes above nose above mouth, image-left before image-right.
    x, y = network.template.T
    assert max(y[0], y[1]) < y[2] < min(y[3], y[4])
    assert x[0] < x[2] < x[1]
    assert x[3] < x[4]


@pytest.mark.parametrize("name", RECOGNIZERS)
def test_feature_maps_go_from_fine_to_coarse(name, store):
    network = fetch("recognizer", name, store)
    height, width = network.crop_size
    maps = network.features(tiny.faces_image(1, height, width=width))
    sides = [features.shape[2] for features in maps]
    assert len(sides) >= 2
    assert sides == sorted(set(sides), reverse=True)


@pytest.mark.parametrize("name", PERCEPTUAL)
def test_distance_is_zero_for_equal_images_symmetric_and_grows(name, store):
    network = fetch("perceptual", name, store)
    image = tiny.faces_image(2, 75)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    near, far = ((image + scale * noise).clamp(0, 1) for scale in (0.02, 0.1))
    assert torch.equal(network(image, image), torch.zeros(2))
    torch.testing.assert_close(network(image, near), network(near, image))
    assert (network(image, far) > network(image, near)).all()
    assert (network(image, near) > 0).all()


# Ranges, against the foreign networks themselves


def test_kl_sees_signed_images_and_gives_the_posterior_mean(store):
    network = fetch("autoencoder", "small-kl", store)
    image = tiny.faces_image(1, 32)
    posterior = network.network.encode(2 * image - 1).latent_dist
    assert torch.equal(network.encode(image), posterior.mean)
    decoded = network.network.decode(posterior.mean).sample
    assert torch.equal(network.decode(posterior.mean), (decoded + 1) / 2)
    assert network.multiple == 4
    assert network.scaling == pytest.approx(0.18215)


def test_tiny_autoencoder_of_diffusers_sees_unsigned_images(store):
    network = fetch("autoencoder", "small-tiny", store)
    image = tiny.faces_image(1, 32)
    latent = network.network.encoder.layers(image)
    torch.testing.assert_close(network.encode(image), latent)
    decoded = network.network.decoder.layers(3 * torch.tanh(latent / 3))
    torch.testing.assert_close(network.decode(latent), decoded)


@pytest.mark.parametrize("name", ["random-mobilefacenet", "random-facenet"])
def test_recognizers_see_levels_around_the_middle(name, store):
    network = fetch("recognizer", name, store)
    height, width = network.crop_size
    face = tiny.faces_image(1, height, width=width)
    expected = network.network((face * 255 - 127.5) / 128)
    torch.testing.assert_close(network.embed(face), functional.normalize(expected))


def test_threshold_comes_from_the_card(store):
    assert fetch("recognizer", "random-mobilefacenet", store).threshold == 0.2
    assert fetch("recognizer", "small-face-embedder", store).threshold == 0.3
    assert fetch("recognizer", "random-facenet", store).threshold is None


def test_lpips_equals_the_package(store):
    network = fetch("perceptual", "random-lpips-squeeze", store)
    image, other = tiny.faces_image(2, 64), tiny.faces_image(2, 64, seed=1)
    expected = network.network(image, other, normalize=True).flatten()
    torch.testing.assert_close(network(image, other), expected)


def test_lpips_loads_every_weight_of_the_backbone(store):
    network = fetch("perceptual", "random-lpips-squeeze", store)
    state = torch.load(store.folder / "squeeze.pth", weights_only=True)
    ours = {
        f"features.{key.split('.', 1)[1]}": value
        for key, value in network.network.net.state_dict().items()
    }
    assert len(ours) == sum(key.startswith("features.") for key in state)
    for key, value in ours.items():
        assert torch.equal(value, state[key]), key


def test_lpips_gradient_is_finite_where_features_vanish():
    network = LpipsModel.untrained("squeeze")
    with torch.no_grad():  # a bias so low that every feature is cut off by the relu
        network.network.net.slice1[0].bias.fill_(-100)
    image = tiny.faces_image(1, 64).requires_grad_()
    network(image, tiny.faces_image(1, 64, seed=1)).sum().backward()
    assert torch.isfinite(image.grad).all()


def test_deep_features_are_the_mean_squared_gap_of_unit_features(store):
    network = fetch("perceptual", "features:random-mobilefacenet", store)
    image, other = tiny.faces_image(1, 64), tiny.faces_image(1, 64, seed=1)
    gaps = []
    for ours, theirs in zip(
        network.network.features(image), network.network.features(other), strict=True
    ):
        # |u - v|^2 = 2 - 2 cos for unit vectors
        gaps.append((2 - 2 * functional.cosine_similarity(ours, theirs, dim=1)).mean())
    torch.testing.assert_close(network(image, other), torch.stack(gaps).mean()[None])


def test_deep_features_need_a_network_that_has_some():
    with pytest.raises(WeightsError, match=r"tiny-autoencoder-0.*no feature maps"):
        DeepFeatures(tiny.autoencoder())


def test_stages_are_what_enters_each_halving_and_the_end():
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 1)
    )
    image = tiny.faces_image(1, 8)
    first, second = stages(layers, image)
    assert torch.equal(first, layers[0](image))
    assert torch.equal(second, layers[:3](image))


# The tracer looks at `.grad` of tensors that have none; nothing of ours does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_accelerate_changes_speed_and_not_the_result() -> None:
    plain, compiled = tiny.autoencoder(), tiny.autoencoder()
    compiled.accelerate(backend="eager")
    image = tiny.faces_image(1, 32).requires_grad_(True)
    assert torch.allclose(compiled.reconstruct(image), plain.reconstruct(image), atol=1e-6)
    assert compiled._encode is not plain._encode
    (gradient,) = torch.autograd.grad(compiled.reconstruct(image).sum(), image)
    assert gradient.any()


@pytest.mark.parametrize("name", MANIPULATORS)
def test_every_condition_of_a_manipulator_does_something_of_its_own(name, store):
    network, image = fetch("manipulator", name, store), tiny.faces_image(2, 32)
    forged = [network(image, condition) for condition in network.conditions]
    assert all(picture.shape == image.shape for picture in forged)
    for index, picture in enumerate(forged):
        others = forged[:index] + forged[index + 1 :]
        assert all((picture - other).abs().max() > 1e-4 for other in others)
    assert torch.equal(network(image), forged[0])


@pytest.mark.parametrize("name", MANIPULATORS)
def test_features_of_a_manipulator_are_a_quarter_of_the_image(name, store):
    network, image = fetch("manipulator", name, store), tiny.faces_image(2, 32)
    forged, features = network.outputs(image, network.conditions[0])
    assert features.shape[2:] == (8, 8)
    assert torch.equal(network.features(image), features)
    assert torch.equal(network(image), forged)
