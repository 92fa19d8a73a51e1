"""IP-Adapter: a photo as a prompt, and where a denoiser looks at it.

Source:
    IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models (Ye, Zhang,
    Liu, Han, Yang, 2023), https://arxiv.org/abs/2308.06721; weights
    https://huggingface.co/h94/IP-Adapter, Apache-2.0.

Differs:
    Only the plain adapter is known (a pooled embedding turned into a few tokens), not the "plus"
    and "full" ones.
    The photo is squeezed to the encoder's square bilinearly, so that a gradient reaches it; the
    authors' processor crops it and is not differentiable.
    The denoiser is borrowed: its attention is replaced for one pass and put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shields.errors import ConfigError, WeightsError
from shields.models.base import Frozen
from shields.models.diffusion import LatentDiffusion, from_folder
from shields.types import Image
from shields.weights import Card, load_strictly, read_state_dict

__all__ = ["IpAdapterModel"]

_CROSS = "attn2.processor"
_FILE = "ip-adapter_sd15.safetensors"


class _Projection(nn.Module):
    """Embedding (B, D) -> (B, T, C), the tokens of a photo."""

    def __init__(self, embedding: int, tokens: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embedding, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embedding: Tensor) -> Tensor:
        width = self.norm.normalized_shape[0]
        tokens: Tensor = self.norm(self.proj(embedding).unflatten(1, (-1, width)))
        return tokens


class _Attention:
    """Cross-attention to the prompt and, beside it, to the photo's tokens; keeps the latter's map.

    Not a module, so that the denoiser it is lent to stays the module it was.
    """

    def __init__(self, key: nn.Module, value: nn.Module, tokens: Tensor) -> None:
        self.key, self.value = key(tokens), value(tokens)
        self.map: Tensor | None = None

    def __call__(
        self,
        attn: Any,  # noqa: ANN401  diffusers' own class
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        text_key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        text_value = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        seen = torch.bmm(attn.get_attention_scores(query, text_key, None), text_value)
        weights = attn.get_attention_scores(query, attn.head_to_batch_dim(self.key), None)
        seen = seen + torch.bmm(weights, attn.head_to_batch_dim(self.value))
        self.map = weights.unflatten(0, (len(hidden_states), -1))
        result: Tensor = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(seen)))
        return result


class IpAdapterModel(Frozen):
    """Image encoder, projection to tokens, and the keys and values of a denoiser's layers."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        projection: nn.Module,
        keys: Sequence[nn.Linear],
        values: Sequence[nn.Linear],
    ) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.keys, self.values = nn.ModuleList(keys), nn.ModuleList(values)
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)
        self.freeze()

    @classmethod
    def from_state(
        cls, encoder: CLIPVisionModelWithProjection, state: Mapping[str, Tensor], name: str
    ) -> Self:
        """Put an adapter together from its published state dict and the encoder it was made for."""
        found = (re.fullmatch(r"ip_adapter\.(\d+)\.to_k_ip\.weight", key) for key in state)
        layers = sorted(int(match[1]) for match in found if match)
        try:
            project = state["image_proj.proj.weight"]
            width = len(state["image_proj.norm.weight"])
            parts = {
                kind: [state[f"ip_adapter.{layer}.to_{kind}_ip.weight"] for layer in layers]
                for kind in "kv"
            }
        except KeyError as error:
            raise WeightsError(
                f"the weights of {name!r} are not those of a plain IP-Adapter: no {error}"
            ) from error
        with torch.random.fork_rng(devices=[]):
            projection = _Projection(project.shape[1], project.shape[0] // width, width)
        prefix = "image_proj."
        own = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
        load_strictly(projection, own, name)
        return cls(encoder, projection, _linears(parts["k"]), _linears(parts["v"]))

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load the folder `models` of h94/IP-Adapter, or one that holds it."""
        folder = source / "models" if (source / "models").is_dir() else source
        if not (folder / _FILE).is_file() or not (folder / "image_encoder").is_dir():
            raise WeightsError(f"{folder} should hold {_FILE} and the folder image_encoder")
        encoder = from_folder(CLIPVisionModelWithProjection, folder / "image_encoder")
        return cls.from_state(encoder, read_state_dict(folder / _FILE), card.name)

    def embed(self, image: Image) -> Tensor:
        """Embed (B, 3, H, W), [0, 1]: (B, D), not normalised."""
        side = int(self.encoder.config.image_size)
        small = functional.interpolate(image, size=(side, side), mode="bilinear")
        embedding: Tensor = self.encoder((small - self.mean) / self.std).image_embeds
        return embedding

    def attention(
        self, diffusion: LatentDiffusion, latent: Tensor, text: Tensor, embedding: Tensor
    ) -> list[Tensor]:
        """How much each place of a latent looks at each token of a photo.

        Args:
            diffusion: The denoiser, run once, at timestep 0.
            latent: (B, C, h, w), scaled, the places that look.
            text: (1, T, D), the prompt's embedding.
            embedding: (B, D) from `embed`.

        Returns:
            One (B, heads, places, tokens) per cross-attention layer; the tokens' shares sum to 1.

        Raises:
            ConfigError: The adapter was made for another denoiser.
        """
        own = dict(diffusion.unet.attn_processors)
        cross = [name for name in own if name.endswith(_CROSS)]
        if len(cross) != len(self.keys):
            raise ConfigError(
                f"the adapter {self.name!r} has {len(self.keys)} layers, the denoiser "
                f"{diffusion.name!r} {len(cross)}: it was made for another"
            )
        tokens = self.projection(embedding)
        pairs = zip(self.keys, self.values, strict=True)
        lent = {
            name: _Attention(key, value, tokens)
            for name, (key, value) in zip(cross, pairs, strict=True)
        }
        diffusion.unet.set_attn_processor({**own, **lent})
        try:
            diffusion.predict(latent, 0, text)
        finally:
            diffusion.unet.set_attn_processor(own)
        return [layer.map for layer in lent.values() if layer.map is not None]


def _linears(weights: Sequence[Tensor]) -> list[nn.Linear]:
    """Linear layers without bias that hold these weights."""
    layers = []
    for weight in weights:
        with torch.random.fork_rng(devices=[]):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        layers.append(layer)
    return layers
