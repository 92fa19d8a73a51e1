"""IP-Adapter: where a denoiser looks, against diffusers' own, and loading."""

import pytest
import torch
from safetensors.torch import save_file

from shields.errors import ConfigError, WeightsError
from shields.models.ip_adapter import IpAdapterModel
from shields.weights import Card
from tests import tiny
from tests.prompting import adapter


@pytest.fixture
def image():
    return tiny.faces_image(2, 32)


@pytest.fixture(scope="module")
def diffusion():
    return tiny.diffusion()


def test_the_denoiser_sees_what_diffusers_own_adapter_shows_it(image):
    model = tiny.diffusion()
    network, state = adapter(model.unet)
    latent, text = model.latent(image), model.embed("")
    seen, predict = [], model.predict
    model.predict = lambda *values: seen.append(predict(*values))
    maps = network.attention(model, latent, text, network.embed(image))
    assert all(torch.allclose(layer.sum(dim=-1), torch.ones(())) for layer in maps)
    assert all(layer.shape[-1] == 4 and len(layer) == 2 for layer in maps)

    other = tiny.diffusion().unet
    halves = {
        half: {key.removeprefix(f"{half}."): state[key] for key in state if half in key}
        for half in ("image_proj", "ip_adapter")
    }
    other._load_ip_adapter_weights([halves], low_cpu_mem_usage=False)
    expected = other(
        latent, 0, encoder_hidden_states=text.expand(2, -1, -1),
        added_cond_kwargs={"image_embeds": [network.embed(image)[:, None]]},
    ).sample  # fmt: skip
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_the_denoiser_gets_its_own_attention_back(image, diffusion):
    model, (prompter, _) = tiny.diffusion(), adapter(diffusion.unet)
    before = {name: id(value) for name, value in model.unet.attn_processors.items()}
    latent, text = model.latent(image), model.embed("")
    plain = model.predict(latent, 0, text)
    prompter.attention(model, latent, text, prompter.embed(image))
    after = {name: id(value) for name, value in model.unet.attn_processors.items()}
    assert before == after
    assert torch.equal(model.predict(latent, 0, text), plain)


def test_an_adapter_of_another_denoiser_is_refused(image, diffusion):
    network, _ = adapter(diffusion.unet)
    network.keys = network.keys[:1]
    with pytest.raises(ConfigError, match="made for another"):
        network.attention(
            diffusion, diffusion.latent(image), diffusion.embed(""), network.embed(image)
        )


@pytest.mark.parametrize("lost", ["image_proj.proj.weight", "ip_adapter.1.to_v_ip.weight"])
def test_a_file_of_another_kind_is_refused(lost, diffusion):
    network, state = adapter(diffusion.unet)
    rest = {key: value for key, value in state.items() if key != lost}
    with pytest.raises(WeightsError, match="tiny-adapter"):
        IpAdapterModel.from_state(network.encoder, rest, "tiny-adapter")


def test_a_published_folder_loads(tmp_path, diffusion, image):
    network, state = adapter(diffusion.unet)
    network.encoder.save_pretrained(tmp_path / "models" / "image_encoder")
    save_file(state, tmp_path / "models" / "ip-adapter_sd15.safetensors")
    card = Card(name="ip", role="diffusion", architecture="ip-adapter", file="x")
    loaded = IpAdapterModel.load(tmp_path, card)
    assert torch.allclose(loaded.embed(image), network.embed(image), atol=1e-6)
    with pytest.raises(WeightsError, match="image_encoder"):
        IpAdapterModel.load(tmp_path / "models" / "image_encoder", card)
