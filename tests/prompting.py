"""A random IP-Adapter for a small denoiser: a real one, seeded, never a mock."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from shields.models.ip_adapter import IpAdapterModel
from tests import tiny


def adapter(unet: Any, seed: int = 0) -> tuple[IpAdapterModel, dict[str, Tensor]]:
    """A random IP-Adapter of four tokens for a denoiser, and its published layout."""
    with tiny.seeded(seed):
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16, intermediate_size=16, projection_dim=12, num_hidden_layers=1,
                num_attention_heads=2, image_size=32, patch_size=8,
            )
        )  # fmt: skip
        for parameter in encoder.parameters():
            parameter.data.normal_(std=0.3)
        width = unet.config.cross_attention_dim
        proj, norm = nn.Linear(12, 4 * width), nn.LayerNorm(width)
        state = {
            "image_proj.proj.weight": proj.weight.data * 3,
            "image_proj.proj.bias": proj.bias.data,
            "image_proj.norm.weight": norm.weight.data,
            "image_proj.norm.bias": norm.bias.data,
        }
        cross = [name for name in unet.attn_processors if "attn2" in name]
        for index, name in enumerate(cross):
            wide = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
            for kind in ("k", "v"):
                state[f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight"] = torch.randn(wide)
    network = IpAdapterModel.from_state(encoder.eval(), state, "tiny-adapter")
    network.name = "tiny-adapter"
    return network, state
