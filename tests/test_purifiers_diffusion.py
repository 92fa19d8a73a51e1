"""Purifiers that run networks: closed forms, and independent ways to the same result."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from robustness.purifiers import load
from robustness.purifiers.diffusion import (
    DiffPure,
    DiffPureConfig,
    DiffPureFast,
    FreqPure,
    FreqPureConfig,
    GridPure,
    GridPureConfig,
)
from robustness.purifiers.impress import Impress, ImpressConfig, inconsistency
from robustness.purifiers.spectrum import exchange
from robustness.purifiers.tiles import Tiles
from shields.errors import ConfigError
from shields.models.unconditional import UnconditionalDiffusion
from shields.weights import WeightStore
from tests import tiny
from tests.test_unconditional import unet

SIZE = 16
#: each purifier with settings that take a moment
QUICK = (
    (DiffPure, DiffPureConfig(timestep=20, steps=4)),
    (DiffPure, DiffPureConfig(timestep=20, steps=4, fit="tiles", batch=3)),
    (DiffPureFast, None),
    (GridPure, GridPureConfig(timestep=4, steps=2, iterations=2)),
    (FreqPure, FreqPureConfig(timestep=20, steps=3, rounds=2)),
    (FreqPure, FreqPureConfig(timestep=20, steps=3, rounds=2, official=True)),
)


class Gaussian(nn.Module):
    """The best denoiser there is of independent pixels with a mean and a standard deviation."""

    def __init__(self, mean, deviation):
        super().__init__()
        self.register_buffer("mean", mean)
        self.deviation = deviation
        beta = np.linspace(1e-4, 0.02, 1000)
        self.signals = np.cumprod(1 - beta)

    def forward(self, state, timestep):
        signal, variance = self.signals[timestep], self.deviation**2
        gain = math.sqrt(signal) * variance / (signal * variance + 1 - signal)
        clean = self.mean + gain * (state - math.sqrt(signal) * self.mean)
        return UNet2DOutput(sample=(state - math.sqrt(signal) * clean) / math.sqrt(1 - signal))


def gaussian(mean=0.0, deviation=0.0):
    """A model whose posterior is known; `mean` is a state, or a number for all of it."""
    network = Gaussian(torch.as_tensor(mean), deviation)
    return UnconditionalDiffusion(network, {}, size=SIZE)


def denoiser():
    with tiny.seeded(0):
        network = UNet2DModel(
            sample_size=SIZE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            add_attention=False,
        )  # fmt: skip
    return UnconditionalDiffusion(network, {}, size=SIZE, multiple=2)


@pytest.fixture(scope="module")
def network():
    return denoiser()


@pytest.mark.parametrize(("kind", "config"), QUICK)
def test_a_purifier_keeps_the_size_and_depends_on_its_seed_alone(network, kind, config):
    purifier = kind(config, network=network)
    image = tiny.faces_image(2, 24, width=29)
    with torch.no_grad():
        first, again = purifier.purify(image, seed=3), purifier.purify(image, seed=3)
        other = purifier.purify(image, seed=4)
    assert first.shape == image.shape
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1 / 255)
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1


@pytest.mark.parametrize(("kind", "config"), QUICK)
def test_a_batch_gives_what_its_photos_give_one_by_one(network, kind, config):
    purifier = kind(config, network=network)
    image = tiny.faces_image(2, 20)
    with torch.no_grad():
        together = purifier.purify(image, seed=1)
        alone = torch.cat([purifier.purify(one[None], seed=1) for one in image])
    # GridPure rounds to levels, where a rounding error may cross the border.
    tolerance = 1.5 / 255 if kind is GridPure else 1e-4
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)
    assert float((together - alone).abs().median()) < 1e-5


@pytest.mark.parametrize(
    ("kind", "config"),
    [(DiffPure, DiffPureConfig()), (GridPure, GridPureConfig()), (FreqPure, FreqPureConfig())],
)
def test_no_noise_leaves_the_photo_alone(network, kind, config):
    purifier = kind(replace(config, timestep=0), network=network)
    image = tiny.faces_image(1, 40, width=33)
    assert torch.equal(purifier.purify(image), image)


@pytest.mark.parametrize("kind", [DiffPure, DiffPureFast, GridPure])
def test_a_network_that_knows_the_photo_returns_it(kind):
    image = tiny.faces_image(1, SIZE)
    purifier = kind(network=gaussian(2 * image - 1))
    protected = (image + 8 / 255 * torch.sign(image - 0.5)).clamp(0, 1)
    if kind is GridPure:
        purifier = GridPure(GridPureConfig(blend=0.0), network=purifier.network)
    purified = purifier.purify(protected)
    torch.testing.assert_close(purified, image, rtol=0, atol=0.51 / 255)


@pytest.mark.parametrize("steps", [1, 5, 100])
@pytest.mark.parametrize("timestep", [100, 400])
def test_ancestral_steps_contract_towards_the_mean_as_much_as_the_posterior(timestep, steps):
    # E[x0 | x_T] is linear in x_T, and the chain's slopes multiply to just that at any number of
    # steps; what differs between two photos is what the noise, common to both, cannot hide.
    deviation = 0.1
    config = DiffPureConfig(timestep=timestep, steps=steps, clip=False)
    purifier = DiffPure(config, network=gaussian(0.0, deviation))
    image = 0.5 + 0.1 * (tiny.faces_image(2, SIZE) - 0.5)
    purified = purifier.purify(image, seed=2)
    signal = float(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timestep - 1])
    factor = signal * deviation**2 / (signal * deviation**2 + 1 - signal)
    expected = factor * (image[0] - image[1])
    torch.testing.assert_close(purified[0] - purified[1], expected, rtol=1e-3, atol=1e-6)


def test_deterministic_steps_keep_the_spread_of_the_photos_that_the_network_knows():
    # The flow of a Gaussian scales about the mean by the ratio of its standard deviations.
    deviation, timestep = 0.3, 300
    config = DiffPureConfig(timestep=timestep, sampler="deterministic", clip=False)
    purifier = DiffPure(config, network=gaussian(0.0, deviation))
    image = 0.5 + 0.1 * (tiny.faces_image(2, SIZE) - 0.5)
    purified = purifier.purify(image, seed=2)
    signal = float(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timestep - 1])
    factor = math.sqrt(signal) * deviation / math.sqrt(signal * deviation**2 + 1 - signal)
    measured = (purified[0] - purified[1]) / (image[0] - image[1])
    assert float(measured.median()) == pytest.approx(factor, rel=0.02)


def counted(height, width):
    return Tiles(height, width, size=256, stride=128, corner_tile=True).count


def test_tiles_are_as_many_as_published():
    assert (counted(512, 512), counted(1024, 1024), counted(256, 256)) == (10, 50, 1)


@pytest.mark.parametrize("corner_tile", [True, False])
def test_merging_averages_like_a_loop_over_pixels(corner_tile):
    height, width, size, stride = 13, 18, 8, 3
    tiles = Tiles(height, width, size=size, stride=stride, corner_tile=corner_tile)
    rng = np.random.default_rng(0)
    values = rng.random((2, tiles.count, 3, size, size))
    tops, lefts = [0, 3, 5], [0, 3, 6, 9, 10]
    said = {}
    index = 0
    for top in tops:
        for left in lefts:
            for y in range(size):
                for x in range(size):
                    said.setdefault((top + y, left + x), []).append(values[:, index, :, y, x])
            index += 1
    if corner_tile:
        for y in range(size):
            for x in range(size):
                place = (y if y < 4 else height - size + y, x if x < 4 else width - size + x)
                said.setdefault(place, []).append(values[:, index, :, y, x])
        index += 1
    assert index == tiles.count
    expected = np.zeros((2, 3, height, width))
    for (y, x), each in said.items():
        expected[:, :, y, x] = np.mean(each, axis=0)
    merged = tiles.merge(torch.from_numpy(values).flatten(0, 1))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12)


def test_merging_undoes_cutting():
    image = tiny.faces_image(2, 21, width=40)
    tiles = Tiles(21, 40, size=16, stride=8, corner_tile=True)
    torch.testing.assert_close(tiles.merge(tiles.cut(image)), image)


def test_gridpure_blends_with_the_iterate_before_and_rounds_to_levels():
    # A network that knows nothing but grey makes every iteration a step towards it.
    config = GridPureConfig(timestep=2, iterations=2, blend=0.25)
    purifier = GridPure(config, network=gaussian(0.0))
    image = torch.full((1, 3, 24, 24), 200 / 255)
    purified = purifier.purify(image)
    once = round(0.75 * 127.5 + 0.25 * 200)
    assert (purified * 255).round().unique().tolist() == [round(0.75 * 127.5 + 0.25 * once)]
    levels = purified * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def numpy_exchange(image, reference, radius, delta):
    """Full spectra, loops over bins, the angle wrapped by hand; the real part in the end."""
    ours, theirs = np.fft.fft2(image), np.fft.fft2(reference)
    height, width = image.shape[-2:]
    mended = ours.copy()
    for y in range(height):
        for x in range(width):
            if math.hypot(min(y, height - y), min(x, width - x)) > radius:
                continue
            target = np.angle(theirs[..., y, x])
            apart = np.angle(ours[..., y, x]) - target
            apart = (apart + np.pi) % (2 * np.pi) - np.pi
            phase = target + np.clip(apart, -delta, delta)
            mended[..., y, x] = np.abs(theirs[..., y, x]) * np.exp(1j * phase)
    return np.fft.ifft2(mended).real


@pytest.mark.parametrize("shape", [(16, 16), (15, 18)])
@pytest.mark.parametrize("radius", [2.0, 4.5])
def test_low_frequencies_get_the_references_amplitude_and_nearly_its_phase(shape, radius):
    rng = torch.Generator().manual_seed(0)
    image, reference = (torch.rand(2, 3, *shape, generator=rng) for _ in range(2))
    mended = exchange(image, reference, amplitude_radius=radius, phase_radius=radius, delta=0.3)
    expected = numpy_exchange(image.double().numpy(), reference.double().numpy(), radius, 0.3)
    np.testing.assert_allclose(mended.numpy(), expected, atol=1e-5)
    after, before = np.fft.fft2(mended.numpy()), np.fft.fft2(image.numpy())
    np.testing.assert_allclose(after[..., 0, 7], before[..., 0, 7], atol=1e-4)


def test_radius_zero_changes_nothing_and_an_endless_one_everything():
    image, reference = tiny.faces_image(2, SIZE), tiny.faces_image(2, SIZE, seed=1)
    none = exchange(image, reference, amplitude_radius=0, phase_radius=0, delta=0.0)
    torch.testing.assert_close(none, image)
    whole = exchange(image, reference, amplitude_radius=99, phase_radius=99, delta=0.0)
    torch.testing.assert_close(whole, reference)


def test_freqpure_keeps_the_low_frequencies_that_diffpure_loses():
    # The network believes in grey, so whatever is left of the photo came through the exchange.
    image = tiny.faces_image(1, SIZE)
    radius = 3.0 * 256 / SIZE
    config = FreqPureConfig(rounds=1, amplitude_radius=radius, phase_radius=radius, delta=0.0)
    purified = FreqPure(config, network=gaussian(0.0)).purify(image)
    shares = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE, 1 / SIZE), np.fft.fftfreq(SIZE, 1 / SIZE)))
    spectrum = np.fft.fft2(image.double().numpy())
    low = np.fft.ifft2(spectrum * (shares <= 3)).real
    np.testing.assert_allclose(purified.numpy(), low, atol=1e-4)


def test_the_official_freqpure_differs_and_has_no_use_for_its_limit(network):
    image = tiny.faces_image(1, SIZE)
    config = FreqPureConfig(rounds=1, amplitude_radius=60.0, phase_radius=60.0, official=True)
    with torch.no_grad():
        official, wider, ours = (
            FreqPure(replace(config, **change), network=network).purify(image)
            for change in ({}, {"delta": 3.0}, {"official": False})
        )
    assert torch.equal(official, wider)
    assert not torch.allclose(official, ours, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(DiffPureFast, None), (GridPure, GridPureConfig(timestep=2, iterations=1)),
     (FreqPure, FreqPureConfig(timestep=5, steps=1, rounds=1))],
)  # fmt: skip
def test_a_gradient_reaches_the_protected_photo(network, kind, config):
    image = tiny.faces_image(1, SIZE).requires_grad_(True)
    kind(config, network=network).purify(image).square().sum().backward()
    assert float(image.grad.abs().sum()) > 0
    assert bool(image.grad.isfinite().all())


def test_settings_that_make_no_sense_are_refused(network):
    for kind, settings in (
        (DiffPureConfig, {"timestep": 10, "steps": 11}),
        (DiffPureConfig, {"timestep": -1}),
        (DiffPureConfig, {"sampler": "quick"}),
        (GridPureConfig, {"blend": 1.5}),
        (FreqPureConfig, {"delta": -0.1}),
        (ImpressConfig, {"keep": "first"}),
    ):
        with pytest.raises(ConfigError):
            kind(**settings)
    with pytest.raises(ConfigError, match="at most 1000"):
        DiffPure(DiffPureConfig(timestep=1001), network=network)


def test_impress_makes_the_round_trip_consistent_within_its_radius():
    autoencoder, perceptual = tiny.autoencoder(), tiny.perceptual()
    image = tiny.faces_image(2, 24, width=30)
    config = ImpressConfig(steps=30, step=1.0, noise=1.0, radius=0.05, weight=1.0)
    purified = Impress(config, autoencoder=autoencoder, perceptual=perceptual).purify(image)
    before, after = (inconsistency(autoencoder, each) for each in (image, purified))
    assert bool((after < 0.6 * before).all())
    assert bool((perceptual(purified, image) <= config.radius).all())
    # Without the penalty it goes further than that.
    free = replace(config, radius=99.0, keep="last")
    further = Impress(free, autoencoder=autoencoder, perceptual=perceptual).purify(image)
    assert bool((perceptual(further, image) > config.radius).all())
    assert bool((inconsistency(autoencoder, further) < after).all())


def test_inconsistency_is_the_error_of_the_round_trip_between_minus_one_and_one():
    autoencoder, image = tiny.autoencoder(), tiny.faces_image(2, 24)
    again = 2 * autoencoder.reconstruct(image) - 1
    expected = (again - (2 * image - 1)).square().mean((1, 2, 3))
    torch.testing.assert_close(inconsistency(autoencoder, image), expected)


def test_impress_depends_on_its_seed_and_not_on_its_neighbours():
    impress = Impress(
        ImpressConfig(steps=4), autoencoder=tiny.autoencoder(), perceptual=tiny.perceptual()
    )
    image = tiny.faces_image(2, 24)
    with torch.no_grad():
        together, again = impress.purify(image, seed=1), impress.purify(image, seed=1)
        other = impress.purify(image, seed=2)
        alone = torch.cat([impress.purify(one[None], seed=1) for one in image])
    assert torch.equal(together, again)
    assert not torch.allclose(together, other, atol=1e-3)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)
    assert not together.requires_grad


def test_impress_without_steps_leaves_the_photo_alone():
    impress = Impress(
        ImpressConfig(steps=0), autoencoder=tiny.autoencoder(), perceptual=tiny.perceptual()
    )
    image = tiny.faces_image(1, 24)
    assert torch.equal(impress.purify(image), image)


def test_impress_runs_on_what_ships_with_the_package():
    impress = Impress.load(ImpressConfig(steps=1), store=WeightStore(), device=torch.device("cpu"))
    image = tiny.faces_image(1, 24)
    assert impress.purify(image).shape == image.shape


def test_the_authors_settings_of_impress_are_theirs():
    photoguard, glaze = ImpressConfig.photoguard(), ImpressConfig.glaze()
    in_signed_range = 2 / 255
    for config, rate, noise in ((photoguard, 0.005, 0.05), (glaze, 0.01, 0.1)):
        assert config.step * in_signed_range == pytest.approx(rate)
        assert config.noise * in_signed_range == pytest.approx(noise)


def test_a_purifier_is_loaded_by_name_with_a_folder_as_diffusers_writes_it(tmp_path):
    folder = tmp_path / "prior"
    DDPMPipeline(unet(), DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    loaded = load(f"diffpure:{folder},timestep=3", store=WeightStore(), device=torch.device("cpu"))
    assert loaded.network.name == "prior"
    image = tiny.faces_image(1, 16)
    purified = loaded.purify(image, seed=1)
    assert purified.shape == image.shape
    assert not torch.equal(purified, image)
    assert torch.equal(purified, loaded.purify(image, seed=1))
