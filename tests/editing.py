"""Random editing pipelines, small but whole, saved as diffusers saves them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from tests import tiny

#: of the image encoder beside an adapter, pixels
ENCODER_SIZE = 16
_TOKENS, _WIDTH, _EMBEDDING = 4, 8, 8
_LAYERS = {
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "hidden_size": _WIDTH,
    "intermediate_size": 8, "max_position_embeddings": 512, "initializer_range": 0.5,
}  # fmt: skip


def save_instruct(folder: Path) -> Path:
    return tiny.save_diffusion(folder, image_condition=True)


def save_plain(folder: Path) -> Path:
    """Stable Diffusion with the sampler that 1.5 comes with, which keeps a memory of its steps."""
    parts = tiny.diffusion_parts(1)
    parts["scheduler"] = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return _save_stable(StableDiffusionPipeline, parts, folder)


def save_inpainting(folder: Path) -> Path:
    parts = tiny.diffusion_parts(2)
    with tiny.seeded(2):
        parts["unet"] = UNet2DConditionModel(**{**parts["unet"].config, "in_channels": 9})
    return _save_stable(StableDiffusionInpaintPipeline, parts, folder)


def _save_stable(kind: Any, parts: dict[str, Any], folder: Path) -> Path:
    kind(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def save_adapter(folder: Path) -> Path:
    """A plain adapter as its authors lay it out, for the network of `save_plain`."""
    with tiny.seeded(3):
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=8, intermediate_size=8, projection_dim=_EMBEDDING, num_hidden_layers=2,
                num_attention_heads=2, image_size=ENCODER_SIZE, patch_size=8,
            )
        )  # fmt: skip
        state = {
            "image_proj.proj.weight": torch.randn(_TOKENS * _WIDTH, _EMBEDDING),
            "image_proj.proj.bias": torch.randn(_TOKENS * _WIDTH),
            "image_proj.norm.weight": torch.ones(_WIDTH),
            "image_proj.norm.bias": torch.zeros(_WIDTH),
        }
        # Where the network looks at the text: one block down, two up, one in the middle; 16 wide.
        for number in (1, 3, 5, 7):
            for role in "kv":
                state[f"ip_adapter.{number}.to_{role}_ip.weight"] = torch.randn(16, _WIDTH)
    encoder.save_pretrained(folder / "image_encoder")
    save_file(state, folder / "ip-adapter_sd15.safetensors")
    return folder


def _letters(*specials: str) -> Qwen2Tokenizer:
    words = ["<pad>", "</s>", *specials, *dict.fromkeys(string.printable)]
    return Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[], pad_token="<pad>",
        eos_token="</s>", unk_token="<pad>", additional_special_tokens=list(specials),
    )  # fmt: skip


def _flux2_parts(*, guided: bool) -> dict[str, Any]:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4,
              "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
    parts: dict[str, Any] = {
        "vae": AutoencoderKLFlux2(
            block_out_channels=(8,) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            **blocks,
        ),
        "transformer": Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, guidance_embeds=guided,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=3 * _WIDTH,
            timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4),
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }  # fmt: skip
    for parameter in parts["transformer"].parameters():  # so that text and photo make a difference
        parameter.data.mul_(2)
    return parts


def save_klein(folder: Path) -> Path:
    """A distilled one; its text comes from the 9th, 18th and 27th layer."""
    reader = _letters()
    reader.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    with tiny.seeded(4):
        encoder = Qwen3ForCausalLM(
            Qwen3Config(vocab_size=len(reader), num_hidden_layers=27, **_LAYERS)
        )
        parts = _flux2_parts(guided=False)
    pipeline = Flux2KleinPipeline(
        **parts, text_encoder=encoder, tokenizer=reader, is_distilled=True
    )
    return _save_quietly(pipeline, folder)


def save_flux2(folder: Path) -> Path:
    """Like FLUX.2-dev; its text comes from the 10th, 20th and 30th layer."""
    reader = _letters("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    processor = PixtralProcessor(
        PixtralImageProcessor(), reader, patch_size=4,
        chat_template="{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}"
        "{% endfor %}\n{% endfor %}",
    )  # fmt: skip
    text = MistralConfig(vocab_size=len(reader), num_hidden_layers=30, **_LAYERS)
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    with tiny.seeded(5):
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=2
            )
        )
        parts = _flux2_parts(guided=True)
    return _save_quietly(Flux2Pipeline(**parts, text_encoder=encoder, tokenizer=processor), folder)


def _save_quietly(pipeline: Any, folder: Path) -> Path:
    logging.disable_progress_bar()
    pipeline.save_pretrained(folder)
    logging.enable_progress_bar()
    return folder
