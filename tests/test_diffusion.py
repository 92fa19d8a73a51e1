"""Latent diffusion: against diffusers' own schedulers and pipelines, on random small networks."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from shields import models
from shields.errors import ConfigError, WeightsError
from shields.models.diffusion import DiffusersAutoencoder, LatentDiffusion
from shields.weights import WeightStore
from tests import tiny

CPU = torch.device("cpu")


def noise_like(latent, seed=0):
    return torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))


def build(parts, scheduler=None, unet=None):
    return LatentDiffusion.from_parts(
        unet or parts["unet"],
        DiffusersAutoencoder(parts["vae"]),
        parts["text_encoder"],
        parts["tokenizer"],
        scheduler or parts["scheduler"],
    )


@pytest.fixture(scope="module")
def network():
    return tiny.diffusion()


@pytest.fixture(scope="module")
def parts():
    return tiny.diffusion_parts()


def schedules(**changed):
    """The same noise schedule under schedulers that pipelines come with."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= changed
    kinds = (DDIMScheduler, PNDMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler)
    with warnings.catch_warnings():  # numpy about the way one of them makes an array
        warnings.simplefilter("ignore", DeprecationWarning)
        return [kind(**settings) for kind in kinds]


# The schedule


def test_latent_is_the_scaled_posterior_mean(network):
    image = tiny.faces_image(2, 32)
    mean = network.autoencoder.network.encode(2 * image - 1).latent_dist.mean
    torch.testing.assert_close(network.latent(image), 0.18215 * mean)
    assert network.scaling == pytest.approx(0.18215)
    assert network.timesteps == 1000


@pytest.mark.parametrize("scheduler", schedules(), ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_noise_is_mixed_as_diffusers_does_whatever_the_pipelines_sampler(
    parts, scheduler, timestep
):
    network = build(parts, scheduler)
    latent = noise_like(torch.zeros(2, 4, 8, 8), 1)
    noise = noise_like(latent, 2)
    reference = schedules()[0].add_noise(latent, noise, torch.tensor([timestep] * 2))
    torch.testing.assert_close(network.noisy(latent, noise, timestep), reference)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_timesteps_are_those_of_diffusers(network, parts, steps):
    scheduler = DDIMScheduler.from_config(parts["scheduler"].config)
    scheduler.set_timesteps(steps)
    assert network.ddim_timesteps(steps) == scheduler.timesteps.tolist()


def test_every_step_can_be_taken(network):
    timesteps = network.ddim_timesteps(1000)
    assert len(timesteps) == 1000
    assert max(timesteps) == 999


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_are_those_of_diffusers(network, parts, eta):
    scheduler = DDIMScheduler.from_config(parts["scheduler"].config)
    scheduler.set_timesteps(4)
    timesteps = network.ddim_timesteps(4)
    latent = noise_like(torch.zeros(2, 4, 8, 8))
    for index, timestep in enumerate(timesteps):
        previous = timesteps[index + 1] if index + 1 < len(timesteps) else -1
        eps, noise = noise_like(latent, 10 + index), noise_like(latent, 20 + index)
        reference = scheduler.step(eps, timestep, latent, eta=eta, variance_noise=noise)
        ours = network.ddim_step(latent, eps, timestep, previous, eta=eta, noise=noise)
        torch.testing.assert_close(ours, reference.prev_sample, rtol=1e-4, atol=1e-5)
        latent = ours


def test_ddim_step_with_the_true_noise_lands_on_the_less_noisy_latent(network):
    latent = noise_like(torch.zeros(1, 4, 8, 8), 1)
    noise = noise_like(latent, 2)
    stepped = network.ddim_step(network.noisy(latent, noise, 700), noise, 700, 300)
    torch.testing.assert_close(stepped, network.noisy(latent, noise, 300), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda network, latent: network.noisy(latent, latent, 1000), "0 to 999, got 1000"),
        (lambda network, latent: network.noisy(latent, latent, -1), "0 to 999, got -1"),
        (lambda network, latent: network.ddim_timesteps(0), "1 to 1000, got 0"),
        (lambda network, latent: network.ddim_timesteps(1001), "1 to 1000, got 1001"),
        (lambda network, latent: network.ddim_step(latent, latent, 9, 3, eta=1.0), "needs `noise`"),
    ],
)
def test_impossible_settings_are_refused(network, call, said):
    with pytest.raises(ConfigError, match=said):
        call(network, torch.zeros(1, 4, 8, 8))


# The prompt


def test_embedding_is_that_of_the_pipeline(network, parts):
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    for prompt in ("", "a photo of a person"):
        with torch.no_grad():
            expected, _ = pipeline.encode_prompt(prompt, CPU, 1, do_classifier_free_guidance=False)
        assert torch.equal(network.embed(prompt), expected)
    assert not torch.equal(network.embed("a photo"), network.embed(""))


def test_prompt_that_would_be_cut_off_is_refused(network):
    with pytest.raises(ConfigError, match=r"52 tokens.*reads 40"):
        network.embed("a" * 50)


# The denoiser


def predict(network, image, *, timestep=300, checkpoint=False):
    latent = network.latent(image)
    noisy = network.noisy(latent, noise_like(latent[:1]), timestep)
    seen = network.autoencoder.encode(image) if network.image_channels else None
    embedding = network.embed("a photo")
    return network.predict(noisy, timestep, embedding, seen, checkpoint=checkpoint)


@pytest.fixture(params=[False, True], ids=["text", "text-and-photo"])
def either(request):
    return tiny.diffusion(image_condition=request.param)


def test_prediction_is_the_denoisers(either):
    image = tiny.faces_image(2, 32)
    latent = either.latent(image)
    noisy = either.noisy(latent, noise_like(latent[:1]), 300)
    view = noisy
    if either.image_channels:
        # InstructPix2Pix: behind the noisy latent, not scaled.
        view = torch.cat([noisy, either.autoencoder.encode(image)], dim=1)
    embedding = either.embed("a photo").repeat(2, 1, 1)
    expected = either.unet(view, 300, embedding).sample
    torch.testing.assert_close(predict(either, image), expected)


def test_gradient_reaches_the_image_and_no_parameter(either):
    image = tiny.faces_image(2, 32).requires_grad_()
    predict(either, image).square().sum().backward()
    assert torch.isfinite(image.grad).all()
    assert (image.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in either.parameters())


def test_checkpointing_changes_no_number(either):
    gradients = []
    for checkpoint in (False, True):
        image = tiny.faces_image(2, 32).requires_grad_()
        result = predict(either, image, checkpoint=checkpoint)
        result.square().sum().backward()
        gradients.append((result.detach(), image.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpointing_keeps_fewer_activations(network):
    saved = []
    for checkpoint in (False, True):
        sizes = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        latent = torch.zeros(1, 4, 16, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network.predict(latent, 300, network.embed(""), checkpoint=checkpoint)
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 5


def test_batch_equals_its_singles(either):
    image = tiny.faces_image(3, 32)
    singles = torch.cat([predict(either, sample[None]) for sample in image])
    torch.testing.assert_close(predict(either, image), singles, rtol=1e-4, atol=1e-5)


def test_train_changes_no_bit(either):
    image = tiny.faces_image(1, 32)
    expected = predict(either, image)
    either.train()
    assert not any(module.training for module in either.modules())
    assert torch.equal(predict(either, image), expected)


def test_forward_leaves_input_buffers_and_random_state_alone(either):
    image = tiny.faces_image(1, 32)
    given, random = image.clone(), torch.get_rng_state()
    before = {name: value.clone() for name, value in either.state_dict().items()}
    predict(either, image)
    assert torch.equal(image, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in either.state_dict().items())


def test_velocity_is_turned_into_noise(parts):
    velocity = build(parts, DDIMScheduler(prediction_type="v_prediction", clip_sample=False))
    plain = build(parts, DDIMScheduler(clip_sample=False))
    latent = noise_like(torch.zeros(1, 4, 8, 8))
    embedding = plain.embed("")
    predicted = plain.predict(latent, 400, embedding)
    # v = sqrt(a) eps - sqrt(1 - a) x0 and x = sqrt(a) x0 + sqrt(1 - a) eps, solved for eps.
    signal = float(DDIMScheduler().alphas_cumprod[400])
    expected = signal**0.5 * predicted + (1 - signal) ** 0.5 * latent
    torch.testing.assert_close(velocity.predict(latent, 400, embedding), expected)


def test_photo_is_asked_for_where_and_only_where_it_belongs(network):
    latent = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ConfigError, match="takes no latent"):
        network.predict(latent, 1, network.embed(""), latent)
    seeing = tiny.diffusion(image_condition=True)
    assert (network.image_channels, seeing.image_channels) == (0, 4)
    with pytest.raises(ConfigError, match="needs the latent"):
        seeing.predict(latent, 1, seeing.embed(""))


def test_networks_of_another_kind_are_refused(parts):
    settings = dict(parts["unet"].config) | {"in_channels": 9}
    with pytest.raises(WeightsError, match=r"5 channels beside its 4.*inpainting"):
        build(parts, unet=UNet2DConditionModel.from_config(settings))
    with pytest.raises(WeightsError, match="'sample'"):
        build(parts, DDIMScheduler(prediction_type="sample"))
    with pytest.raises(WeightsError, match="without any signal"):
        build(parts, DDIMScheduler(rescale_betas_zero_snr=True))


# Folders


@pytest.mark.parametrize("photo", [False, True])
def test_saved_pipeline_loads_to_the_same_bits(photo, tmp_path):
    folder = tiny.save_diffusion(tmp_path / "saved", image_condition=photo)
    loaded = models.load("diffusion", str(folder), store=WeightStore(), device=CPU)
    image = tiny.faces_image(1, 32)
    assert torch.equal(
        predict(loaded, image), predict(tiny.diffusion(image_condition=photo), image)
    )
    assert loaded.name == loaded.autoencoder.name == "saved"
    assert loaded.ddim_timesteps(4) == [751, 501, 251, 1]


def test_pipeline_serves_as_an_autoencoder_too(tmp_path):
    folder = tiny.save_diffusion(tmp_path / "saved")
    loaded = models.load("autoencoder", str(folder), store=WeightStore(), device=CPU)
    image = tiny.faces_image(1, 32)
    assert torch.equal(loaded.encode(image), tiny.diffusion().autoencoder.encode(image))


def test_pipeline_is_found_by_its_card(tmp_path):
    tiny.save_diffusion(tmp_path / "mine")
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nrole = "diffusion"\narchitecture = "latent-diffusion"\n'
        'repository = "nobody/mine"\n'
    )
    loaded = models.load("diffusion", "mine", store=WeightStore(tmp_path), device=CPU)
    assert loaded.name == "mine"


def test_vocabulary_of_older_folders_loads(tmp_path):
    folder = tiny.save_diffusion(tmp_path / "saved")
    saved = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    loaded = models.load("diffusion", str(folder), store=WeightStore(), device=CPU)
    assert torch.equal(loaded.embed("a photo"), tiny.diffusion().embed("a photo"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part_is_named(part, tmp_path):
    folder = tiny.save_diffusion(tmp_path / "saved")
    (folder / part).rename(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=part):
        models.load("diffusion", str(folder), store=WeightStore(), device=CPU)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("tokenizer", "tokenizer.json"),
        ("scheduler", "scheduler_config.json"),
    ],
)
def test_damaged_part_is_named(part, file, tmp_path):
    path = tiny.save_diffusion(tmp_path / "saved") / part / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(WeightsError, match=part):
        models.load("diffusion", str(tmp_path / "saved"), store=WeightStore(), device=CPU)


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ("text_encoder/model.safetensors", "final_layer_norm.bias"),
    ],
)
def test_part_that_lacks_a_weight_is_refused_not_filled_in(file, key, tmp_path):
    path = tiny.save_diffusion(tmp_path / "saved") / file
    state = load_file(path)
    dropped = next(name for name in state if name.endswith(key))
    state.pop(dropped)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=key):
        models.load("diffusion", str(tmp_path / "saved"), store=WeightStore(), device=CPU)
