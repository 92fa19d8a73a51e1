"""ID-Guard's generators, the files they come from, and the universal perturbation by itself."""

import pytest
import torch
from safetensors.torch import save_file

from shields.card import Card
from shields.errors import ConfigError, WeightsError
from shields.models.idguard import IdGuardModel, bounded, joined
from shields.models.idguard_network import (
    NETWORKS,
    ResNetGenerator,
    TransformerGenerator,
    UNetGenerator,
)
from shields.models.manipulation import wrap
from shields.protectors.idguard_universal import IdGuard, IdGuardConfig, IdGuardUniversal
from tests import tiny
from tests.cards import randomised
from trainers.universal import UniversalPerturbation, gradient_prior, random_prior

SMALL = {
    "resnet": {"width": 4, "blocks": 2},
    "unet": {"width": 4, "depth": 3},
    "transformer": {"width": 8, "depth": 1, "heads": 2, "patch": 4},
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(kind, channels=6, seed=0):
    with tiny.seeded(seed):
        return randomised(NETWORKS[kind](**SMALL[kind], channels=channels), seed).eval()


def universal(size=16, seed=1):
    return (torch.rand(3, size, size, generator=rng(seed)) * 2 - 1) * 0.05


def model(kind="resnet", **settings):
    return IdGuardModel(network(kind), universal(), **settings)


@pytest.mark.parametrize(
    ("kind", "count"), [(ResNetGenerator, 7_850_819), (UNetGenerator, 54_414_595)]
)
def test_a_network_has_the_published_number_of_parameters(kind, count):
    with tiny.seeded(0):
        built = kind()
    assert sum(parameter.numel() for parameter in built.parameters()) == count


def test_the_trunk_is_numbered_from_the_padding_to_the_tanh():
    trunk = ResNetGenerator(width=4).main
    assert len(trunk) == 25
    assert isinstance(trunk[24], torch.nn.Tanh)
    assert [index for index, part in enumerate(trunk) if type(part).__name__ == "_Residual"] == [
        10, 11, 12, 13, 14, 15,
    ]  # fmt: skip
    assert [i for i, part in enumerate(trunk) if getattr(part, "bias", None) is not None] == [
        2, 5, 8, 17, 20, 23,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_any_size_is_perturbed_inside_the_budget_and_a_batch_is_its_singles(kind):
    found = model(kind)
    image = torch.rand(2, 3, 21, 30, generator=rng())
    both = found.perturb(image, levels=6.375, rng=rng())
    assert both.shape == image.shape
    assert 0 < both.abs().max() <= 6.375 / 255
    single = found.perturb(image[1:], levels=6.375, rng=rng())
    torch.testing.assert_close(both[1:], single, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_networks_look_at_the_image_and_at_the_prior(kind):
    built = network(kind)
    seen = torch.rand(1, 6, 16, 16, generator=rng()).requires_grad_(True)
    (gradient,) = torch.autograd.grad(built(seen).square().sum(), seen)
    assert gradient[:, :3].abs().max() > 0
    assert gradient[:, 3:].abs().max() > 0


def test_the_unet_trains_with_statistics_of_each_layer_but_one_scale_per_width():
    built = UNetGenerator(width=4, depth=4)
    built(torch.rand(2, 6, 32, 32, generator=rng()))
    norms = [*built.down_norms, *built.up_norms]
    assert len({float(norm.running_mean[0]) for norm in norms}) == len(norms)
    assert sorted(built.scale) == ["16", "4", "8"]


def test_a_transformer_tells_places_apart():
    with tiny.seeded(0):
        built = TransformerGenerator(width=8, depth=1, heads=2, patch=4)
    flat = torch.zeros(1, 6, 16, 16)
    made = built(flat)[0, 0]
    assert not torch.allclose(made[4:8, 4:8], made[8:12, 8:12], atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        TransformerGenerator(width=6, heads=2)


def test_tanh_scales_where_clamp_cuts():
    raw = torch.tensor([-1.0, 0.02, 0.5]).view(1, 1, 1, 3)
    scaled = bounded(raw, 6.375).flatten() * 255
    cut = bounded(raw, 6.375, "clamp").flatten() * 255
    torch.testing.assert_close(scaled, torch.tensor([-6.375, 0.1275, 3.1875]))
    torch.testing.assert_close(cut, torch.tensor([-6.375, 2.55, 6.375]))


def test_another_budget_scales_the_perturbation():
    found = model(levels=6.375)
    image = torch.rand(1, 3, 16, 16, generator=rng())
    once = found.perturb(image, levels=6.375, rng=rng())
    torch.testing.assert_close(found.perturb(image, levels=12.75, rng=rng()), 2 * once)


def save(folder, state, **config):
    path = folder / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path, Card(
        name="small", role="generator", architecture="idguard", file=path.name, config=config
    )


@pytest.mark.parametrize("kind", NETWORKS)
def test_saved_weights_give_the_same_bits(kind, tmp_path):
    built = network(kind)
    sizes = {} if kind == "resnet" else {**SMALL[kind], "network": kind}
    path, card = save(tmp_path, joined(built.state_dict(), universal()), **sizes, bound="clamp")
    loaded = IdGuardModel.load(path, card)
    image = torch.rand(1, 3, 16, 16, generator=rng())
    wanted = IdGuardModel(built, universal(), bound="clamp")
    assert torch.equal(
        loaded.perturb(image, levels=6.375, rng=rng()),
        wanted.perturb(image, levels=6.375, rng=rng()),
    )


def test_other_names_around_the_places_are_read_too(tmp_path):
    state = network("resnet").state_dict()
    foreign = {
        key.replace("main.", "net.", 1).replace(".main.", ".body."): value
        for key, value in state.items()
    }
    assert set(foreign).isdisjoint(state)
    path, card = save(tmp_path, joined(foreign, universal()))
    loaded = IdGuardModel.load(path, card).network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = network("resnet").state_dict()
    with pytest.raises(WeightsError, match="two files"):
        IdGuardModel.load(*save(tmp_path, state))
    with pytest.raises(WeightsError, match="not those of ID-Guard's ResNet"):
        IdGuardModel.load(*save(tmp_path, {"a": torch.zeros(2)}))
    with pytest.raises(WeightsError, match="`network` must be one of"):
        IdGuardModel.load(*save(tmp_path, state, network="vit"))
    with pytest.raises(WeightsError, match="`bound` must be one of"):
        IdGuardModel.load(*save(tmp_path, joined(state, universal()), bound="hard"))


def test_a_network_without_a_prior_needs_no_perturbation():
    found = IdGuardModel(network("resnet", channels=3), None)
    image = torch.rand(1, 3, 16, 16, generator=rng())
    assert found.perturb(image, levels=4, rng=rng()).abs().max() > 0
    with pytest.raises(ConfigError, match="no universal perturbation"):
        found.universal_perturbation((16, 16), levels=4)


def test_the_universal_protector_adds_the_stored_perturbation_to_every_photo():
    protector = IdGuardUniversal(IdGuardConfig.paper(), generator=model())
    image = torch.full((2, 3, 16, 16), 0.5)
    made = protector(image, rng=rng())
    torch.testing.assert_close(made, (universal() / 2).expand(2, -1, -1, -1))
    assert protector(torch.full((1, 3, 24, 40), 0.5), rng=rng()).shape == (1, 3, 24, 40)


@pytest.mark.parametrize("kind", [IdGuard, IdGuardUniversal])
def test_the_protectors_refuse_other_generators(kind):
    with pytest.raises(ConfigError, match="needs a network"):
        kind()
    with pytest.raises(ConfigError, match="is another"):
        kind(generator=wrap(lambda image: image))


def test_the_protector_runs_the_generator():
    held = model()
    image = torch.full((2, 3, 18, 16), 0.5)
    made = IdGuard(generator=held)(image, rng=rng())
    torch.testing.assert_close(made, held.perturb(image, levels=6.375, rng=rng()))
    assert not torch.allclose(made, IdGuardUniversal(generator=held)(image, rng=rng()))


def test_a_universal_perturbation_stays_inside_its_budget():
    held = UniversalPerturbation(torch.full((3, 8, 8), 0.5), levels=5.1)
    assert float(held((8, 8)).detach().abs().max()) * 255 == pytest.approx(5.1)
    held.value.data.add_(1.0)
    held.project()
    assert held((16, 12)).shape == (1, 3, 16, 12)
    assert float(held((16, 12)).detach().abs().max()) * 255 == pytest.approx(5.1)
    with pytest.raises(ConfigError, match="`start` must be"):
        UniversalPerturbation(torch.zeros(1, 8, 8))


def test_a_gradient_prior_is_the_mean_over_all_photos_and_moves_the_surrogate():
    surrogate = tiny.autoencoder()
    photos = torch.rand(4, 3, 16, 16, generator=rng())
    found = gradient_prior(surrogate, photos.split(2), rng=rng(5), steps=3)
    assert found.shape == (3, 16, 16)
    assert found.abs().max() <= 6.375 / 255 + 1e-7
    # Two batches of two, from one generator: the first one alone is half of it.
    shared = rng(5)
    halves = [gradient_prior(surrogate, [part], rng=shared, steps=3) for part in photos.split(2)]
    torch.testing.assert_close(found, (halves[0] + halves[1]) / 2)
    with pytest.raises(ConfigError, match="at least one photo"):
        gradient_prior(surrogate, [], rng=rng())


def test_a_random_prior_is_at_full_budget_everywhere():
    found = random_prior(8, rng=rng(), levels=6.375)
    torch.testing.assert_close(found.abs(), torch.full((3, 8, 8), 6.375 / 255))
    assert found.min() < 0 < found.max()
