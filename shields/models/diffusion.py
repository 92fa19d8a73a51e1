"""What comes through diffusers: its autoencoders, and latent diffusion for the objectives.

Source:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022),
    https://arxiv.org/abs/2112.10752.
    Denoising Diffusion Implicit Models (Song, Meng, Ermon, 2021),
    https://arxiv.org/abs/2010.02502: `ddim_step`.
    InstructPix2Pix (Brooks, Holynski, Efros, 2023), https://arxiv.org/abs/2211.09800: the photo as
    further input channels, unscaled.

Differs:
    Latents are posterior means, never samples: what a protector optimises should not be noise.
    Estimates of the clean latent are not clipped; the latents of a photo are not bounded by 1.
    A prompt that the text encoder would cut off is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from shields.errors import ConfigError, WeightsError
from shields.models.autoencoders import stages
from shields.models.base import Autoencoder, Frozen, signed_range_to_unit, unit_range_to_signed
from shields.types import Image
from shields.weights import Card, read_table

__all__ = ["DiffusersAutoencoder", "LatentDiffusion", "from_folder"]

#: classes of diffusers; looked up by name, since its older versions lack the third
_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLFlux2")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal, and leave its setting as it was."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def from_folder(network: Any, folder: Path) -> Any:  # noqa: ANN401  diffusers' and transformers' loaders
    """Load one part of a pipeline in float32 from a folder; never asks the network."""
    names = {path.name for path in folder.glob("*model*")}
    plain = {"diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
             "model.safetensors", "pytorch_model.bin"}  # fmt: skip
    half_only = not names & plain and any(".fp16." in name for name in names)
    try:
        with _quiet():
            loaded, report = network.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                variant="fp16" if half_only else None,
                local_files_only=True,
                output_loading_info=True,
            )
    # Three libraries raise whatever they like on a damaged file; the cause is kept.
    except Exception as error:
        raise WeightsError(f"{folder} cannot be loaded as {network.__name__}: {error}") from error
    # Both libraries fill what is missing with random numbers and only warn.
    absent = sorted(map(str, report["missing_keys"]))
    if absent or report["mismatched_keys"]:
        wrong = absent or [str(entry) for entry in report["mismatched_keys"]]
        raise WeightsError(f"{folder} does not fit {network.__name__}: {', '.join(wrong[:5])}")
    # Tensors mapped from a file lie at odd addresses, where kernels round differently.
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()
    return loaded


class DiffusersAutoencoder(Autoencoder):
    """`AutoencoderKL`, `AutoencoderKLFlux2` or `AutoencoderTiny`, in [0, 1] like all the others.

    diffusers wants [-1, 1] from all three; its `AutoencoderTiny` converts to the [0, 1] of its
    weights on its own.
    """

    def __init__(self, network: Any) -> None:  # noqa: ANN401  one of three unrelated classes
        super().__init__()
        self.network = network
        widths = (
            network.config.encoder_block_out_channels
            if isinstance(network, AutoencoderTiny)
            else network.config.block_out_channels
        )
        self.multiple = 2 ** (len(widths) - 1)
        #: what a denoiser multiplies latents by
        self.scaling = float(getattr(network.config, "scaling_factor", 1.0))
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load a folder in diffusers' layout: an autoencoder, or a pipeline with one in `vae`."""
        if source.is_file():
            raise WeightsError(
                f"{card.name}: diffusers loads a folder with config.json, not a file"
            )
        pipeline = not (source / "config.json").is_file() and (source / "vae").is_dir()
        folder = source / "vae" if pipeline else source
        config = read_table(
            folder / "config.json",
            f"{folder} should hold a network as diffusers saves it, but its config.json cannot be "
            "read",
        )
        kind = config.get("_class_name")
        if kind not in _AUTOENCODERS:
            known = ", ".join(_AUTOENCODERS)
            raise WeightsError(f"{folder} holds a {kind}; autoencoders known here: {known}")
        if not hasattr(diffusers, kind):
            raise WeightsError(
                f"{folder} holds a {kind}; it needs a newer diffusers than installed"
            )
        return cls(from_folder(getattr(diffusers, kind), folder))

    def _encode(self, image: Image) -> Tensor:
        code = self.network.encode(unit_range_to_signed(image))
        latent: Tensor = code.latent_dist.mode() if "latent_dist" in code else code.latents
        return latent

    def _decode(self, latent: Tensor) -> Image:
        return signed_range_to_unit(self.network.decode(latent).sample)

    def features(self, image: Image) -> tuple[Tensor, ...]:
        """Feature maps of the encoder, shallow to deep; sides must be legal."""
        encoder = self.network.encoder
        if isinstance(self.network, AutoencoderTiny):
            return stages(encoder.layers, image)
        hidden = encoder.conv_in(unit_range_to_signed(image))
        maps = []
        for block in encoder.down_blocks:
            hidden = block(hidden)
            maps.append(hidden)
        return tuple(maps)


class LatentDiffusion(Frozen):
    """Autoencoder, text encoder and denoiser; predictions are always of the noise.

    Build it with `from_parts`, or from a pipeline folder with `load`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        autoencoder: DiffusersAutoencoder,
        text_encoder: nn.Module,
        tokenizer: CLIPTokenizer,
        scheduler: Any,  # noqa: ANN401  any scheduler of diffusers; only its settings are read
    ) -> None:
        super().__init__()
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.tokenizer = tokenizer
        self._schedule = dict(scheduler.config)
        ddim = self._ddim()
        # Plain numbers: reading them from a GPU would wait for it at every step.
        self._signals: list[float] = ddim.alphas_cumprod.tolist()
        self._final_signal = float(ddim.final_alpha_cumprod)
        self._prediction = str(ddim.config.prediction_type)
        self.timesteps = int(ddim.config.num_train_timesteps)
        self.scaling = autoencoder.scaling
        self.image_channels = int(unet.config.in_channels) - int(unet.config.out_channels)
        self._check()
        self.freeze()

    @classmethod
    def from_parts(
        cls,
        unet: UNet2DConditionModel,
        autoencoder: DiffusersAutoencoder,
        text_encoder: nn.Module,
        tokenizer: CLIPTokenizer,
        scheduler: Any,  # noqa: ANN401  see __init__
    ) -> Self:
        """Put a diffusion model together from its parts."""
        return cls(unet, autoencoder, text_encoder, tokenizer, scheduler)

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load the folder of a Stable Diffusion or InstructPix2Pix pipeline; no safety checker."""
        parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
        absent = [part for part in parts if not (source / part).is_dir()]
        if absent:
            raise WeightsError(
                f"{source} is not the folder of a latent diffusion pipeline: no {', '.join(absent)}"
            )
        try:
            tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer", local_files_only=True)
            scheduler = DDIMScheduler.from_pretrained(source, subfolder="scheduler")
        except Exception as error:  # see from_folder
            raise WeightsError(f"{source}: tokenizer or scheduler: {error}") from error
        autoencoder = DiffusersAutoencoder.load(source / "vae", card)
        autoencoder.name = card.name
        return cls.from_parts(
            from_folder(UNet2DConditionModel, source / "unet"),
            autoencoder,
            from_folder(CLIPTextModel, source / "text_encoder"),
            tokenizer,
            scheduler,
        )

    def _ddim(self) -> DDIMScheduler:
        return DDIMScheduler.from_config(self._schedule, clip_sample=False)

    def _check(self) -> None:
        latent = int(self.unet.config.out_channels)
        if self.image_channels not in {0, latent}:
            raise WeightsError(
                f"the denoiser takes {self.image_channels} channels beside its {latent}: only "
                "text-to-image and InstructPix2Pix networks are known, inpainting ones are not"
            )
        if self._prediction not in {"epsilon", "v_prediction"}:
            raise WeightsError(f"a denoiser that predicts {self._prediction!r} is not known")
        if not min(self._signals) > 0:
            raise WeightsError("a noise schedule that ends without any signal is not known")

    def latent(self, image: Image) -> Tensor:
        """Encode (B, 3, H, W), [0, 1] to what the denoiser works on: the scaled posterior mean."""
        return self.autoencoder.encode(image) * self.scaling

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """Embed a prompt: (1, T, D). It never changes, so compute it once.

        Raises:
            ConfigError: The prompt is longer than the text encoder reads.
        """
        longest = int(self.tokenizer.model_max_length)
        tokens = self.tokenizer(prompt, padding="max_length", max_length=longest).input_ids
        if len(tokens) > longest:
            raise ConfigError(
                f"the prompt has {len(tokens)} tokens with its two ends, the text encoder reads "
                f"{longest}; shorten it"
            )
        device = next(self.text_encoder.parameters()).device
        embedding: Tensor = self.text_encoder(torch.tensor([tokens], device=device))[0]
        return embedding

    def noisy(self, latent: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Mix a scaled latent (B, C, h, w) with noise (B or 1, C, h, w) as at `timestep`."""
        signal = self._signal(timestep)
        return math.sqrt(signal) * latent + math.sqrt(1 - signal) * noise

    def predict(
        self,
        latent: Tensor,
        timestep: int,
        embedding: Tensor,
        image_latent: Tensor | None = None,
        *,
        checkpoint: bool = False,
    ) -> Tensor:
        """Predict the noise in a latent.

        Args:
            latent: (B, C, h, w), noisy and scaled.
            timestep: 0 up to `timesteps` - 1.
            embedding: (B or 1, T, D) from `embed`.
            image_latent: (B or 1, C, h, w), the photo's latent **not** scaled, where
                `image_channels` is not 0.
            checkpoint: Run the denoiser anew in the backward pass instead of keeping its
                activations: half as fast again, a fraction of the memory.

        Returns:
            (B, C, h, w), also where the network predicts velocity.
        """
        if (image_latent is None) != (self.image_channels == 0):
            needed = "needs the" if self.image_channels else "takes no"
            raise ConfigError(f"the denoiser {self.name!r} {needed} latent of the photo")
        view = latent
        if image_latent is not None:
            view = torch.cat([latent, image_latent.expand_as(latent)], dim=1)
        embedding = embedding.expand(len(latent), -1, -1)
        if checkpoint and torch.is_grad_enabled():
            predicted: Tensor = recompute(
                self._denoise, view, timestep, embedding, use_reentrant=False
            )
        else:
            predicted = self._denoise(view, timestep, embedding)
        if self._prediction == "epsilon":
            return predicted
        signal = self._signal(timestep)
        return math.sqrt(signal) * predicted + math.sqrt(1 - signal) * latent

    def _denoise(self, view: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        sample: Tensor = self.unet(view, timestep, encoder_hidden_states=embedding).sample
        return sample

    def ddim_timesteps(self, steps: int) -> list[int]:
        """Timesteps of a sampler with that many steps, from the noisiest down."""
        if not 1 <= steps <= self.timesteps:
            raise ConfigError(f"`steps` must be 1 to {self.timesteps}, got {steps}")
        ddim = self._ddim()
        ddim.set_timesteps(steps)
        # An offset of 1 would lead past the end of the schedule where every step is taken.
        return [min(int(timestep), self.timesteps - 1) for timestep in ddim.timesteps]

    def ddim_step(
        self,
        latent: Tensor,
        eps: Tensor,
        timestep: int,
        previous: int,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Take one step of the sampler.

        Args:
            latent: (B, C, h, w) at `timestep`.
            eps: (B, C, h, w), the noise predicted in it, after any guidance.
            timestep: Where the latent is.
            previous: The next, less noisy timestep; below 0 after the last one.
            eta: 0 for none, 1 for as much fresh noise as ancestral sampling has.
            noise: (B or 1, C, h, w), standard normal, needed where `eta` is above 0.

        Returns:
            (B, C, h, w) at `previous`.
        """
        signal = self._signal(timestep)
        target = self._signal(previous) if previous >= 0 else self._final_signal
        clean = (latent - math.sqrt(1 - signal) * eps) / math.sqrt(signal)
        spread = eta * math.sqrt((1 - target) / (1 - signal) * (1 - signal / target))
        stepped = math.sqrt(target) * clean + math.sqrt(max(1 - target - spread**2, 0)) * eps
        if eta == 0:
            return stepped
        if noise is None:
            raise ConfigError(f"`eta` is {eta}, so `ddim_step` needs `noise`")
        return stepped + spread * noise

    def _signal(self, timestep: int) -> float:
        if not 0 <= timestep < self.timesteps:
            raise ConfigError(f"`timestep` must be 0 to {self.timesteps - 1}, got {timestep}")
        return self._signals[timestep]
