"""PhotoGuard and the other attacks on an encoder, against formulas written anew."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from shields.errors import ConfigError
from shields.protectors.cw import Cw, CwConfig
from shields.protectors.editshield import EditShield, EditShieldConfig
from shields.protectors.encoder import Encoder, EncoderConfig, Vae, VaeConfig
from shields.protectors.photoguard import (
    EotConfig,
    PhotoGuard,
    PhotoGuardConfig,
    PhotoGuardDiffusion,
    PhotoGuardDiffusionConfig,
    PhotoGuardEot,
)
from shields.types import Step
from tests import tiny

SIZE = 32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def network():
    return tiny.autoencoder()


@pytest.fixture
def image():
    return tiny.faces_image(2, SIZE)


@pytest.fixture
def mask():
    return torch.ones(2, 1, SIZE, SIZE)


def moved(image, seed=1, levels=8):
    noise = torch.rand(image.shape, generator=generator(seed)) * 2 - 1
    return (image + noise * levels / 255).clamp(0, 1)


def per_sample(values):
    return torch.stack([value.detach() for value in values])


@pytest.fixture(scope="module")
def diffusion():
    return tiny.diffusion()


@pytest.fixture(scope="module")
def instructed():
    return tiny.diffusion(image_condition=True)


class TestPhotoGuard:
    def test_zero_and_grey_targets_are_distances_of_latents(self, network, image, mask):
        view = moved(image)
        grey = network.encode(torch.full((1, 3, SIZE, SIZE), 0.5))
        for target, goal in (("zero", torch.zeros_like(grey)), ("grey", grey)):
            protector = PhotoGuard(PhotoGuardConfig(target=target), autoencoder=network)
            expected = per_sample(-(network.encode(one[None]) - goal).norm() for one in view)
            assert torch.allclose(protector.evaluate(image, view, mask), expected, atol=1e-5)

    def test_an_image_target_is_read_from_a_file_and_fitted(self, network, image, mask, tmp_path):
        pixels = np.full((20, 50, 3), 64, dtype=np.uint8)
        PillowImage.fromarray(pixels).save(tmp_path / "target.png")
        config = PhotoGuardConfig(target="image", target_image=str(tmp_path / "target.png"))
        found = PhotoGuard(config, autoencoder=network).evaluate(image, image, mask)
        goal = network.encode(torch.full((1, 3, SIZE, SIZE), 64 / 255))
        expected = per_sample(-(network.encode(one[None]) - goal).norm() for one in image)
        assert torch.allclose(found, expected, atol=1e-4)

    @pytest.mark.parametrize(
        "settings", [{"target": "image"}, {"target_image": "a.png"}, {"target": "black"}], ids=str
    )
    def test_targets_that_make_no_sense_are_refused(self, settings):
        with pytest.raises(ConfigError, match="target"):
            PhotoGuardConfig(**settings)

    def test_presets_are_the_parameter_card(self):
        code, demo = PhotoGuardConfig.code(), PhotoGuardConfig.demo()
        assert (code.levels, code.step, code.steps, code.target) == (7.65, 2.55, 1000, "zero")
        assert (demo.levels, demo.step, demo.steps, demo.target) == (15.3, 1.275, 200, "grey")
        assert code.decay == demo.decay == "linear"


class TestEncoderAndVae:
    def test_encoder_pushes_the_latent_away_on_every_seed(self, mask):
        for seed in range(20):
            image, network = tiny.faces_image(2, SIZE, seed=seed), tiny.autoencoder(seed)
            protector = Encoder(EncoderConfig(steps=5), autoencoder=network)
            change = protector(image, mask, rng=generator(seed))
            noise = moved(image, seed) - image
            assert (
                protector.evaluate(image, image + change, mask)
                > 2 * protector.evaluate(image, image + noise, mask)
            ).all()

    def test_vae_pulls_the_reconstruction_to_its_target(self, network, image, mask):
        for target in (0.5, 0.0):
            protector = Vae(VaeConfig(target=target, steps=8), autoencoder=network)
            change = protector(image, mask, rng=generator())
            distance = [
                (network.decode(network.encode(view)) - target).square().mean()
                for view in (image, image + change)
            ]
            assert distance[1] < distance[0]

    def test_a_target_out_of_range_is_refused(self):
        with pytest.raises(ConfigError, match="target"):
            VaeConfig(target=127)

    def test_presets_are_the_parameter_card(self):
        for config in (EncoderConfig.paper(), VaeConfig.paper()):
            assert (config.levels, config.step, config.steps) == (2.55, 0.3825, 100)
            assert config.decay == "linear"


class TestCw:
    def test_the_objective_is_shift_less_change(self, network, image, mask):
        view = moved(image)
        protector = Cw(CwConfig(weight=0.3), autoencoder=network)
        expected = per_sample(
            0.3 * (network.encode(new[None]) - network.encode(old[None])).square().sum()
            - (new - old).square().sum()
            for new, old in zip(view, image, strict=True)
        )
        assert torch.allclose(protector.evaluate(image, view, mask), expected, rtol=1e-4)

    def test_faithful_feeds_the_wrong_range_and_sums_lengths_of_rows(self, network, image, mask):
        view = moved(image)
        protector = Cw(CwConfig.faithful(), autoencoder=network)

        def raw(one):  # the tiny network maps [0, 1] to [-1, 1] itself
            return network.encoder(one[None])

        expected = per_sample(
            0.03 * (raw(new) - raw(old)).norm(dim=-1).sum() - (new - old).square().sum()
            for new, old in zip(view, image, strict=True)
        )
        assert torch.allclose(protector.evaluate(image, view, mask), expected, atol=1e-3)

    def test_ours_gains_and_the_faithful_one_draws_the_photo_from_grey(self, network, image, mask):
        ours = Cw(CwConfig(steps=20), autoencoder=network)
        change = ours(image, mask, rng=generator())
        assert (ours.evaluate(image, image + change, mask) > 0).all()
        faithful = Cw(
            dataclasses.replace(CwConfig.faithful(), steps=1, step=1e-6), autoencoder=network
        )
        change = faithful(image, mask, rng=generator())
        low, high = faithful.config.budget.bounds(image, mask)
        assert torch.allclose(change, (0.5 - image).clamp(low, high), atol=1e-5)

    def test_more_steps_gain_more_although_the_result_is_clipped(self, network, image, mask):
        values = []
        for steps in (5, 40):
            protector = Cw(CwConfig(steps=steps), autoencoder=network)
            change = protector(image, mask, rng=generator())
            values.append(protector.evaluate(image, image + change, mask))
        assert (values[1] > values[0]).all()

    def test_hardened_the_encoder_sees_transforms_and_the_penalty_the_photo(
        self, network, image, mask
    ):
        config = CwConfig(weight=1e-6).hardened()
        assert config.keep == "last"
        protector = Cw(config, autoencoder=network)
        assert protector.transform() is None
        objective = protector.objective(image, mask, landmarks=None, rng=generator())
        values = torch.stack(
            [objective(image, Step(index=0, total=1, rng=generator(seed))) for seed in range(8)]
        )
        assert (values >= 0).all(), "the photo itself has not changed"
        assert values.max() > 0

    def test_presets_are_the_parameter_card(self):
        for config in (CwConfig.paper(), CwConfig.faithful()):
            assert (config.levels, config.step, config.steps) == (5.1, 0.03, 100)
            assert (config.start, config.space, config.update) == ("grey", "tanh", "adam")


class TestTransforms:
    @pytest.mark.parametrize("reference", ["clean", "transformed"])
    def test_the_penalty_sees_the_photo_and_the_shift_its_transforms(
        self, network, image, mask, reference
    ):
        from shields.transforms import ROBUST

        view = moved(image)
        protector = PhotoGuardEot(EotConfig(penalty=2.0, reference=reference), autoencoder=network)
        objective = protector.objective(image, mask, landmarks=None, rng=generator())
        for seed in range(6):
            found = objective(view, Step(index=0, total=1, rng=generator(seed)))
            handled = ROBUST(view, generator(seed))
            clean = image if reference == "clean" else ROBUST(image, generator(seed))
            expected = per_sample(
                (network.encode(a[None]) - network.encode(b[None])).square().mean()
                - 2.0 * (c - d).square().mean()
                for a, b, c, d in zip(handled, clean, view, image, strict=True)
            )
            assert torch.allclose(found, expected, atol=1e-5)

    def test_draws_are_averaged_although_the_loop_has_no_transform(self, network, image, mask):
        protector = PhotoGuardEot(EotConfig(draws=3, steps=2, robust=True), autoencoder=network)
        assert protector.transform() is None
        calls = []
        inner = network._encode
        network._encode = lambda view: calls.append(len(view)) or inner(view)
        protector(image, mask, rng=generator())
        assert len(calls) == 1 + 3 * 2

    def test_editshield_walks_by_adam_and_reaches_less_than_eight_levels(
        self, network, image, mask
    ):
        config = EditShieldConfig.paper()
        assert (config.norm, config.update, config.steps) == ("none", "adam", 30)
        assert config.step / 255 == pytest.approx(1e-3)
        change = EditShield(config, autoencoder=network)(image, mask, rng=generator())
        assert 1 / 255 < change.abs().max() < 9 / 255

    def test_faithful_editshield_compares_two_unlike_draws_of_noise(self, network, image, mask):
        protector = EditShield(EditShieldConfig.faithful(), autoencoder=network)
        objective = protector.objective(image, mask, landmarks=None, rng=generator(1))
        values = [
            objective(image, Step(index=0, total=1, rng=generator(seed))) for seed in (2, 2, 3)
        ]
        assert torch.equal(values[0], values[1])
        assert not torch.equal(values[0], values[2])
        assert (values[0] > 0.01).all(), "at the photo itself the distance is noise, not zero"

    def test_faithful_editshield_shares_its_noise_over_the_batch(self, network, image, mask):
        protector = EditShield(EditShieldConfig.faithful(), autoencoder=network)
        twice = image[:1].repeat(2, 1, 1, 1)
        objective = protector.objective(twice, mask, landmarks=None, rng=generator(1))
        first, second = objective(
            moved(twice[:1]).repeat(2, 1, 1, 1), Step(index=0, total=1, rng=generator())
        )
        assert first.item() == pytest.approx(second.item(), rel=1e-5)


class TestDiffusion:
    def small(self, **settings):
        return PhotoGuardDiffusionConfig(**({"steps": 2, "inference_steps": 2} | settings))

    def test_the_objective_is_the_distance_of_the_sampled_photo(self, diffusion, image, mask):
        """The sampler is written out anew, in signal and noise shares."""
        config = self.small(prompt="a hat", guidance=3.0, eta=0.5)
        protector = PhotoGuardDiffusion(config, diffusion=diffusion)
        found = protector.evaluate(image, image, mask)
        rng = generator()

        def noise():
            return torch.randn(latent.shape[1:], generator=rng)[None]

        with torch.no_grad():
            first, second = diffusion.ddim_timesteps(2)
            latent = diffusion.latent(image)
            now = diffusion.noisy(latent, noise(), first)
            for timestep, previous in ((first, second), (second, -1)):
                free = diffusion.predict(now, timestep, diffusion.embed(""))
                told = diffusion.predict(now, timestep, diffusion.embed("a hat"))
                eps = 3.0 * told - 2.0 * free
                now = diffusion.ddim_step(now, eps, timestep, previous, eta=0.5, noise=noise())
            edited = 2 * diffusion.autoencoder.decode(now / diffusion.scaling) - 1
        expected = per_sample(-one.norm() for one in edited)
        assert torch.allclose(found, expected, rtol=1e-4)

    def calls(self, diffusion, image, **settings):
        count = []
        inner = diffusion._denoise
        diffusion._denoise = lambda *args: count.append(1) or inner(*args)
        try:
            protector = PhotoGuardDiffusion(self.small(**settings), diffusion=diffusion)
            protector.evaluate(image, image, torch.ones_like(image[:, :1]))
        finally:
            del diffusion._denoise
        return len(count)

    def test_branches_of_the_guidance_that_agree_are_run_once(self, diffusion, instructed, image):
        assert self.calls(diffusion, image) == 2
        assert self.calls(diffusion, image, prompt="a hat", guidance=1.0) == 2
        assert self.calls(diffusion, image, prompt="a hat") == 4
        assert self.calls(diffusion, image, strength=0.5) == 1
        assert self.calls(instructed, image, prompt="a hat") == 6
        assert self.calls(instructed, image, prompt="a hat", image_guidance=1.0) == 4

    @pytest.mark.parametrize("guidance", [7.5, 1.0])
    def test_three_way_guidance_is_the_papers_sum(self, instructed, guidance):
        config = self.small(prompt="a hat", guidance=guidance, image_guidance=1.5)
        predict = PhotoGuardDiffusion(config, diffusion=instructed)._guided()
        latent, condition = (torch.randn(1, 4, 8, 8, generator=generator(s)) for s in (1, 2))
        empty, told = instructed.embed(""), instructed.embed("a hat")
        with torch.no_grad():
            nothing = instructed.predict(latent, 500, empty, torch.zeros_like(condition))
            photo = instructed.predict(latent, 500, empty, condition)
            both = instructed.predict(latent, 500, told, condition)
            expected = nothing + 1.5 * (photo - nothing) + guidance * (both - photo)
            found = predict(latent, 500, condition)
        assert torch.allclose(found, expected, atol=1e-4)

    def test_the_edit_comes_nearer_to_the_target(self, diffusion, image, mask):
        protector = PhotoGuardDiffusion(self.small(steps=8, draws=2, eta=0.0), diffusion=diffusion)
        change = protector(image, mask, rng=generator())
        before, after = (protector.evaluate(image, v, mask) for v in (image, image + change))
        assert (after > before).all()

    def test_presets_are_the_parameter_card(self):
        code, linf = PhotoGuardDiffusionConfig.code(), PhotoGuardDiffusionConfig.linf()
        assert code.budget.epsilon == pytest.approx(8.0), "16 in [-1, 1]"
        assert code.step / 255 == pytest.approx(0.5), "1 in [-1, 1]"
        assert (code.norm, code.update, code.steps, code.draws) == ("l2", "l2", 200, 10)
        assert (linf.levels, linf.step, linf.steps, linf.draws) == (12.75, 0.765, 200, 5)
        for config in (code, linf):
            assert (config.inference_steps, config.guidance, config.eta) == (4, 7.5, 1.0)
            assert (config.prompt, config.start, config.decay) == ("", "zero", "constant")
