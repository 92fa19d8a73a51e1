"""Unconditional diffusion, held to diffusers' own scheduler and to the folders it writes."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from shields.errors import ConfigError, WeightsError
from shields.models.unconditional import UnconditionalDiffusion
from shields.weights import Card
from tests import tiny

CARD = Card(name="small-denoiser", role="diffusion", architecture="unconditional", file="x")
SIZE = 16


def unet(seed=0, **settings):
    known = {
        "sample_size": SIZE, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16),
        "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    }  # fmt: skip
    with tiny.seeded(seed):
        return UNet2DModel(**{**known, **settings})


def denoiser(seed=0, *, channels=3, **schedule):
    network = unet(seed, out_channels=channels)
    return UnconditionalDiffusion(network, schedule, size=SIZE, multiple=2)


def states(batch=2, seed=0):
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def reference_step(network, scheduler, timesteps, index, state, seed):
    """What diffusers makes of a state and the noise of a seed."""
    scheduler.set_timesteps(timesteps=timesteps)
    with torch.no_grad():
        output = network.network(state, timesteps[index]).sample
    rng = torch.Generator().manual_seed(seed)
    return scheduler.step(output, timesteps[index], state, generator=rng).prev_sample


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("channels", "schedule"),
    [
        (3, {}),
        (3, {"variance_type": "fixed_large"}),
        (6, {"variance_type": "learned_range"}),
        (3, {"prediction_type": "v_prediction"}),
        (3, {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_an_ancestral_step_is_that_of_diffusers(channels, schedule, clip):
    network = denoiser(channels=channels, **schedule)
    scheduler = DDPMScheduler(clip_sample=clip, **schedule)
    timesteps, state = network.respaced(150, 15), states()
    rng = torch.Generator().manual_seed(5)
    noise = torch.randn(state.shape, generator=rng)
    for index in (0, 7, 13):
        expected = reference_step(network, scheduler, timesteps, index, state, 5)
        here, there = timesteps[index], timesteps[index + 1]
        with torch.no_grad():
            prediction = network.predict(state, here, clip=clip)
            result = network.ancestral_step(prediction, here, there, noise)
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=2e-4)


def test_the_last_step_gives_the_clean_state_and_no_noise():
    network = denoiser()
    with torch.no_grad():
        prediction = network.predict(states(), 9)
    for result in (
        network.ancestral_step(prediction, 9, -1, states(seed=1)),
        network.deterministic_step(prediction, -1),
    ):
        assert torch.equal(result, prediction.clean)


def test_deterministic_steps_undo_the_noise_that_a_network_knows():
    network, clean, noise = denoiser(), 0.5 * states().clamp(-1, 1), states(seed=1)
    state = network.noisy(clean, noise, 99)
    prediction = network.predict(state, 99)._replace(clean=clean, noise=noise)
    expected = network.noisy(clean, noise, 49)
    torch.testing.assert_close(network.deterministic_step(prediction, 49), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_and_noise_of_a_prediction_make_up_the_state_again(kind):
    network, state = denoiser(prediction_type=kind), states()
    for clip in (True, False):
        with torch.no_grad():
            prediction = network.predict(state, 400, clip=clip)
        again = network.noisy(prediction.clean, prediction.noise, 400)
        torch.testing.assert_close(again, state, rtol=1e-4, atol=1e-4)
        assert (float(prediction.clean.abs().max()) <= 1) == clip


def test_the_noise_of_150_steps_has_the_published_share():
    network = denoiser()
    noisy = network.noisy(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2), 149)
    assert float(noisy[0, 0, 0, 0]) == pytest.approx(0.4601, abs=5e-5)


@pytest.mark.parametrize("steps", [1, 3, 7, 15, 149])
@pytest.mark.parametrize("start", [149, 150, 1000])
def test_fewer_steps_start_at_the_noise_and_end_in_equal_strides(start, steps):
    timesteps = denoiser().respaced(start, steps)
    strides = [here - there for here, there in zip(timesteps, [*timesteps[1:], -1], strict=True)]
    assert timesteps[0] == start - 1
    assert len(timesteps) == steps
    assert set(strides) <= {start // steps, math.ceil(start / steps)}


def test_respacing_is_every_step_by_default_and_refuses_nonsense():
    network = denoiser()
    assert network.respaced(4) == [3, 2, 1, 0]
    assert network.respaced(150, 15)[-2:] == [19, 9]
    for start, steps in ((10, 11), (1001, 5), (0, 0)):
        with pytest.raises(ConfigError, match="steps"):
            network.respaced(start, steps)
    with pytest.raises(ConfigError, match="below 1000"):
        network.noisy(states(), states(), 1000)


def test_a_batch_is_its_parts():
    network, state = denoiser(), states(3)
    with torch.no_grad():
        whole, parts = network.predict(state, 40), network.predict(state, 40, batch=2)
    torch.testing.assert_close(whole.clean, parts.clean)


def test_a_gradient_reaches_the_image_and_no_parameter():
    network = denoiser()
    image = tiny.faces_image(2, SIZE).requires_grad_(True)
    state = network.noisy(network.state(image), states(1), 50)
    prediction = network.predict(state, 50, clip=False)
    network.image(network.deterministic_step(prediction, -1)).square().sum().backward()
    assert float(image.grad.abs().min()) > 0
    assert all(parameter.grad is None for parameter in network.parameters())


def test_images_and_states_convert_both_ways():
    network, image = denoiser(), tiny.faces_image(1, SIZE)
    assert float(network.state(image).min()) < 0
    torch.testing.assert_close(network.image(network.state(image)), image)


@pytest.mark.parametrize("flat", [False, True])
def test_folders_of_pipelines_load_in_both_layouts(tmp_path, flat):
    original, scheduler = unet(3), DDPMScheduler(beta_end=0.01, prediction_type="v_prediction")
    if flat:
        original.save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
    else:
        DDPMPipeline(original, scheduler).save_pretrained(tmp_path)
    network = UnconditionalDiffusion.load(tmp_path, CARD)
    expected = UnconditionalDiffusion(original, scheduler.config, size=SIZE)
    assert (network.size, network.multiple, network.timesteps) == (SIZE, 2, 1000)
    with torch.no_grad():
        ours, theirs = network.predict(states(), 70), expected.predict(states(), 70)
    assert torch.equal(ours.clean, theirs.clean)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_network_without_a_schedule_is_refused_unless_the_card_gives_one(tmp_path):
    unet().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="noise schedule"):
        UnconditionalDiffusion.load(tmp_path, CARD)
    card = Card(
        name="small", role="diffusion", architecture="unconditional", file="x",
        config={"num_train_timesteps": 500},
    )  # fmt: skip
    assert UnconditionalDiffusion.load(tmp_path, card).timesteps == 500


@pytest.mark.parametrize(
    ("settings", "schedule", "message"),
    [
        ({"in_channels": 1, "out_channels": 1}, {}, "denoiser of photos"),
        ({"num_class_embeds": 4}, {}, "unconditional"),
        ({"sample_size": None}, {}, "sample_size"),
        ({}, {"prediction_type": "sample"}, "predicts 'sample'"),
        ({}, {"rescale_betas_zero_snr": True}, "without any signal"),
        ({}, {"beta_schedule": "wavy"}, "cannot be read"),
    ],
)
def test_other_networks_are_refused_with_the_reason(tmp_path, settings, schedule, message):
    unet(**settings).save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"beta_start": 1e-4, **schedule}))
    with pytest.raises(WeightsError, match=message):
        UnconditionalDiffusion.load(tmp_path, CARD)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json"):
        UnconditionalDiffusion.load(tmp_path, CARD)
    unet().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read"):
        UnconditionalDiffusion.load(tmp_path, CARD)
