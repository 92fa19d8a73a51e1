"""AdvDM, Mist, SDS and SDST on a tiny random pipeline: formulas, signs, draws."""

import dataclasses

import pytest
import torch

from shields.errors import ConfigError
from shields.pgd import pgd
from shields.protectors.advdm import (
    AdvDm,
    AdvDmConfig,
    Mist,
    MistConfig,
    Sds,
    SdsConfig,
    Sdst,
    SdstConfig,
    pattern,
)
from shields.types import Step
from tests import tiny

SIZE = 32
PLAIN = {"antithetic": False, "stratified": False}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def diffusion():
    return tiny.diffusion()


@pytest.fixture
def image():
    return tiny.faces_image(2, SIZE)


@pytest.fixture
def mask():
    return torch.ones(2, 1, SIZE, SIZE)


def gradient(protector, image, mask, seed=4, index=0):
    """Value and gradient at the photo, under the draws of a seed."""
    objective = protector.objective(image, mask, landmarks=None, rng=generator(9))
    view = image.clone().requires_grad_(True)
    value = objective(view, Step(index=index, total=protector.config.steps, rng=generator(seed)))
    return value.detach(), torch.autograd.grad(value.sum(), view)[0]


def drawn(diffusion, image, seed=4):
    """Timestep and noise as a plain Monte Carlo step draws them."""
    rng = generator(seed)
    timestep = int(torch.randint(diffusion.timesteps, (), generator=rng))
    latent = diffusion.latent(image)
    return timestep, torch.randn(latent.shape[1:], generator=rng)[None]


def loss(diffusion, latent, timestep, noise, prompt="a portrait photo"):
    noisy = diffusion.noisy(latent, noise, timestep)
    return diffusion.predict(noisy, timestep, diffusion.embed(prompt)) - noise


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("sign", ["+", "-"])
def test_advdm_is_the_denoisers_loss_with_its_gradient(diffusion, image, mask, sign):
    protector = AdvDm(AdvDmConfig(sign=sign, **PLAIN), diffusion=diffusion)
    value, slope = gradient(protector, image, mask)
    timestep, noise = drawn(diffusion, image)
    view = image.clone().requires_grad_(True)
    error = loss(diffusion, diffusion.latent(view), timestep, noise)
    expected = (1 if sign == "+" else -1) * error.square().flatten(1).mean(dim=1)
    assert close(value, expected.detach())
    assert close(slope, torch.autograd.grad(expected.sum(), view)[0])


def test_checkpointing_changes_no_gradient(diffusion, image, mask):
    slopes = [
        gradient(AdvDm(AdvDmConfig(checkpoint=checkpoint), diffusion=diffusion), image, mask)[1]
        for checkpoint in (False, True)
    ]
    assert close(*slopes)


@pytest.mark.parametrize("sign", ["+", "-"])
def test_sds_follows_the_error_through_the_encoder_alone(diffusion, image, mask, sign):
    protector = Sds(SdsConfig(sign=sign, **PLAIN), diffusion=diffusion)
    value, slope = gradient(protector, image, mask)
    timestep, noise = drawn(diffusion, image)
    view = image.clone().requires_grad_(True)
    latent = diffusion.latent(view)
    with torch.no_grad():
        error = loss(diffusion, latent, timestep, noise)
    (expected,) = torch.autograd.grad(latent, view, grad_outputs=error)
    factor = 1 if sign == "+" else -1
    assert close(slope, factor * expected)
    assert close(value, factor * error.square().flatten(1).mean(dim=1))


def test_sds_never_differentiates_the_denoiser(diffusion, image, mask):
    seen = []
    inner = diffusion._denoise
    diffusion._denoise = lambda *args: seen.append(torch.is_grad_enabled()) or inner(*args)
    try:
        Sds(SdsConfig(steps=2), diffusion=diffusion)(image, mask, rng=generator())
    finally:
        del diffusion._denoise
    assert seen == [False] * 4, "two steps, both signs of the noise"


def test_mist_adds_the_distance_to_its_target(diffusion, image, mask):
    protector = Mist(MistConfig(rate=30.0, **PLAIN), diffusion=diffusion)
    value, _ = gradient(protector, image, mask)
    timestep, noise = drawn(diffusion, image)
    with torch.no_grad():
        latent = diffusion.latent(image)
        semantic = loss(diffusion, latent, timestep, noise).square().flatten(1).mean(dim=1)
        textural = (latent - diffusion.latent(pattern(SIZE, SIZE))).square().flatten(1).sum(dim=1)
    assert close(value, 30.0 * semantic - textural)


@pytest.mark.parametrize("sign", ["+", "-"])
def test_sdst_weighs_the_surrogate_against_the_pull(diffusion, image, mask, sign):
    _, slope = gradient(
        Sdst(SdstConfig(sign=sign, rate=5.0, **PLAIN), diffusion=diffusion), image, mask
    )
    _, surrogate = gradient(Sds(SdsConfig(sign=sign, **PLAIN), diffusion=diffusion), image, mask)
    view = image.clone().requires_grad_(True)
    goal = diffusion.latent(pattern(SIZE, SIZE)).detach()
    pull = (diffusion.latent(view) - goal).square().sum()
    assert close(slope, 5 * surrogate - torch.autograd.grad(pull, view)[0])


def test_the_pull_brings_the_latent_nearer_to_the_target(diffusion, image, mask):
    protector = Mist(MistConfig(rate=1e-6, steps=8), diffusion=diffusion)
    change = protector(image, mask, rng=generator())
    goal = diffusion.latent(pattern(SIZE, SIZE))
    with torch.no_grad():
        before, after = (
            (diffusion.latent(v) - goal).square().sum() for v in (image, image + change)
        )
    assert after < before


def test_a_target_file_replaces_the_pattern(diffusion, image, mask, tmp_path):
    import numpy as np
    from PIL import Image as PillowImage

    path = tmp_path / "target.png"
    PillowImage.fromarray(np.full((16, 24, 3), 51, dtype=np.uint8)).save(path)
    config = MistConfig(rate=1e-9, target_image=str(path), **PLAIN)
    value, _ = gradient(Mist(config, diffusion=diffusion), image, mask)
    with torch.no_grad():
        goal = diffusion.latent(torch.full((1, 3, SIZE, SIZE), 0.2))
        expected = -(diffusion.latent(image) - goal).square().flatten(1).sum(dim=1)
    assert close(value, expected)


class TestDraws:
    def test_antithetic_noise_is_the_mean_of_both_signs(self, diffusion, image, mask):
        config = AdvDmConfig(antithetic=True, stratified=False)
        value, _ = gradient(AdvDm(config, diffusion=diffusion), image, mask)
        timestep, noise = drawn(diffusion, image)
        with torch.no_grad():
            latent = diffusion.latent(image)
            errors = [loss(diffusion, latent, timestep, s * noise) for s in (1, -1)]
        expected = sum(error.square().flatten(1).mean(dim=1) for error in errors) / 2
        assert close(value, expected)

    def test_stratified_timesteps_visit_every_stratum_once(self, diffusion):
        protector = AdvDm(AdvDmConfig(steps=50), diffusion=diffusion)
        timestep = protector._timesteps(generator(3))
        rng = generator(4)
        seen = [timestep(Step(index=index, total=50, rng=rng)) for index in range(50)]
        assert sorted(t * 50 // diffusion.timesteps for t in seen) == list(range(50))
        assert seen != sorted(seen)

    def test_plain_timesteps_cover_the_whole_schedule(self, diffusion):
        protector = AdvDm(AdvDmConfig(**PLAIN), diffusion=diffusion)
        timestep, rng = protector._timesteps(generator()), generator(1)
        seen = [timestep(Step(index=0, total=1, rng=rng)) for _ in range(2000)]
        assert min(seen) < 10
        assert max(seen) in range(990, 1000)

    def test_one_draw_serves_the_batch(self, diffusion, image, mask):
        twice = image[:1].repeat(2, 1, 1, 1)
        value, _ = gradient(AdvDm(diffusion=diffusion), twice, mask)
        assert value[0].item() == pytest.approx(value[1].item(), rel=1e-5)


@pytest.mark.parametrize("sign", ["+", "-"])
def test_the_loss_moves_its_way_on_nearly_every_seed(diffusion, sign):
    """Under draws that stay the same, for an untrained denoiser is mostly noise otherwise."""
    right = 0
    for seed in range(20):
        image, whole = tiny.faces_image(1, SIZE, seed=seed), torch.ones(1, 1, SIZE, SIZE)
        config = AdvDmConfig(sign=sign, steps=5)
        protector = AdvDm(config, diffusion=diffusion)
        inner = protector.objective(image, whole, landmarks=None, rng=generator(seed))

        def fixed(view, step, inner=inner, seed=seed):
            return inner(view, Step(index=0, total=5, rng=generator(seed)))

        change = pgd(image, fixed, config.budget, config, mask=whole, rng=generator(seed))
        with torch.no_grad():
            before, after = fixed(image, None), fixed(image + change, None)
        assert (before > 0) == (sign == "+"), "descent is ascent of the negative loss"
        right += int(after > before)
    assert right >= 19


def test_instruct_networks_see_the_protected_photo_beside_the_noise(image, mask):
    network = tiny.diffusion(image_condition=True)
    protector = AdvDm(AdvDmConfig(steps=2), diffusion=network)
    change = protector(image, mask, rng=generator())
    assert (change != 0).any()
    seen = []
    inner = network.predict
    network.predict = lambda *args, **kwargs: seen.append(args[3]) or inner(*args, **kwargs)
    protector.evaluate(image, image + change, mask)
    unscaled = network.latent(image + change) / network.scaling
    assert torch.allclose(seen[0], unscaled, atol=1e-5)


class TestPattern:
    @pytest.mark.parametrize("size", [(16, 16), (64, 48), (200, 333)])
    def test_it_is_black_and_white_of_any_size_and_always_the_same(self, size):
        page = pattern(*size)
        assert page.shape == (1, 3, *size)
        assert set(page.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(page, pattern(*size))
        assert 0.15 < page.mean() < 0.85

    def test_rows_of_letters_are_separated_by_white_lines(self):
        page = pattern(160, 160)  # dots of two pixels: letters are 14 high, 2 pixels between
        white = (page[0, 0] == 1).all(dim=1)
        assert white[14:16].all()
        assert white[30:32].all()
        assert not white[:14].any()


def test_presets_are_the_parameter_card():
    assert dataclasses.astuple(AdvDmConfig.code())  # every preset can be built
    for config in (AdvDmConfig.code(), MistConfig.paper(), SdsConfig.paper(), SdstConfig.paper()):
        assert (config.levels, config.step, config.steps) == (16, 1, 100)
        assert config.decay == "constant"
        assert not config.antithetic
        assert not config.stratified
    assert MistConfig.paper().start == "uniform"
    assert SdsConfig.paper().start == "zero"
    assert SdsConfig().sign == "-"
    assert (MistConfig().rate, SdstConfig().rate) == (1e4, 5.0)


@pytest.mark.parametrize("settings", [{"sign": "x"}, {"rate": 0.0}], ids=str)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MistConfig(**settings)
