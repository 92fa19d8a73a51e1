"""Editors driven by a text prompt, through the pipelines of diffusers.

Source:
    InstructPix2Pix (Brooks, Holynski, Efros, 2023), https://arxiv.org/abs/2211.09800.
    SDEdit (Meng et al., 2022), https://arxiv.org/abs/2108.01073: what img2img does.
    Latent diffusion (Rombach et al., 2022), https://arxiv.org/abs/2112.10752: inpainting.
    IP-Adapter (Ye et al., 2023), https://arxiv.org/abs/2308.06721.
    FLUX.2 (Black Forest Labs, 2025), https://bfl.ai/blog/flux-2.

Differs:
    Every sample has a generator of its own, on the CPU: an edit depends on nothing but its photo,
    prompt and seed, and is the same on all machines but for rounding.
    A prompt that a text encoder would cut off is an error.
    There is no safety checker: it blackens edits, which would count as protection.
    A photo that is not square is squeezed into the square that is edited; crop it before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from torch import Tensor, nn

from shields.errors import ConfigError, WeightsError
from shields.models.manipulation import Editor, resized
from shields.models.pipelines import (
    InpaintSampling,
    InstructSampling,
    PartialSampling,
    Sampling,
    pipeline_kind,
    stable_diffusion_parts,
)
from shields.types import Image, Mask, check_image, check_mask
from shields.weights import Card

__all__ = [
    "ImageToImageEditor",
    "InpaintingEditor",
    "InstructPix2PixEditor",
    "PipelineEditor",
    "centred_background",
]


class PipelineEditor(Editor, ABC):
    """A pipeline of diffusers behind the contract of an editor."""

    SAMPLING: ClassVar[type[Sampling]] = Sampling
    #: whether several photos can run at once
    BATCHED: ClassVar[bool] = True
    #: whether attention can be computed in slices
    SLICED: ClassVar[bool] = True
    sampling: Sampling

    def __init__(self, pipeline: Any, sampling: Sampling | None = None) -> None:  # noqa: ANN401
        super().__init__()
        self.pipeline = pipeline
        self.sampling = sampling or self.SAMPLING()
        self.size = self.sampling.size
        self._check_sampling()
        #: the pipeline's networks: it is no module itself, and they must move with this one
        self.parts = nn.ModuleDict(
            {
                name: part
                for name, part in pipeline.components.items()
                if isinstance(part, nn.Module)
            }
        )
        pipeline.set_progress_bar_config(disable=True)
        if self.sampling.slicing:
            pipeline.enable_attention_slicing()
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> PipelineEditor:
        """Load any pipeline folder; which editor it makes follows from its `model_index.json`.

        The card's `[config]` holds settings of that editor's `SAMPLING`.

        Raises:
            WeightsError: It is no such folder, not whole, or of a pipeline that is not known.
            ConfigError: A setting makes no sense.
        """
        from shields.models.reference_editors import Flux2Editor, IPAdapterEditor

        if not (source / "model_index.json").is_file() and any(source.glob("ip-adapter*")):
            return IPAdapterEditor.load(source, card)
        kind, _ = pipeline_kind(source)
        editors: dict[str, type[PipelineEditor]] = {
            "StableDiffusionInstructPix2PixPipeline": InstructPix2PixEditor,
            "StableDiffusionPipeline": ImageToImageEditor,
            "StableDiffusionImg2ImgPipeline": ImageToImageEditor,
            "StableDiffusionInpaintPipeline": InpaintingEditor,
            **dict.fromkeys(Flux2Editor.KINDS, Flux2Editor),
        }
        if kind not in editors:
            known = ", ".join(editors)
            raise WeightsError(f"{source} holds a {kind}; editing pipelines known here: {known}")
        return editors[kind].load(source, card)

    @classmethod
    def settings(cls, card: Card) -> Sampling:
        """Read the settings of a card; what it does not name is left at its default."""
        try:
            return cls.SAMPLING(**card.config)
        except TypeError as error:
            raise WeightsError(
                f"card {card.name!r}: {cls.__name__} cannot be set up from its [config]: {error}"
            ) from error

    def _check_sampling(self) -> None:
        multiple = self._multiple()
        if self.size % multiple:
            raise ConfigError(f"`size` must be a multiple of {multiple} here, got {self.size}")
        if self.sampling.batch > 1 and not self.BATCHED:
            raise ConfigError(f"{type(self).__name__} takes photos one by one: `batch` must be 1")
        if self.sampling.slicing and not self.SLICED:
            raise ConfigError(
                f"{type(self).__name__} cannot slice its attention; use `offload` to save memory"
            )

    def _multiple(self) -> int:
        """Sides must be multiples of this, pixels."""
        return int(self.pipeline.vae_scale_factor)

    def to(self, device: torch.device | str) -> Self:  # type: ignore[override]
        """Move to a device; with `offload` the networks follow when their turn comes."""
        if self.sampling.offload and torch.device(device).type != "cpu":
            self.pipeline.enable_model_cpu_offload(device=device)
            return self
        return super().to(device)

    @torch.no_grad()
    def edit(self, image: Image, prompts: Sequence[str], *, seeds: Sequence[int]) -> Image:
        """Edit photos; see `Editor`. No gradient passes.

        Args:
            image: (B, 3, H, W), [0, 1].
            prompts: B instructions or descriptions.
            seeds: B numbers; `shields.models.prompts.edit_seed` gives good ones.

        Returns:
            (B, 3, size, size), [0, 1].

        Raises:
            ConfigError: Not B prompts and B seeds, or a prompt is too long for the text encoder.
        """
        view = self._prepare(image, prompts, seeds)
        return self._in_turn(view, prompts, seeds).to(image)

    @abstractmethod
    def _sample(self, view: Tensor, prompts: list[str], rngs: list[torch.Generator]) -> Tensor:
        """Run the pipeline on what `_view` made: (b, 3, size, size), [0, 1]."""

    def _run(self, **inputs: object) -> Tensor:
        """Call the pipeline with what all editors share, and with inputs of one's own."""
        edited: Tensor = self.pipeline(
            num_inference_steps=self.sampling.steps,
            guidance_scale=self.sampling.guidance,
            output_type="pt",
            **inputs,
        ).images
        return edited

    def _view(self, image: Image) -> Tensor:
        """Bring photos to what the pipeline takes."""
        # A value below 0 would make diffusers take the image for one in [-1, 1].
        return resized(image, (self.size, self.size)).clamp(0, 1)

    def _tokens(self, prompt: str) -> tuple[int, int]:
        """How many tokens a prompt has, and how many the text encoder reads."""
        tokenizer = self.pipeline.tokenizer
        return len(tokenizer(prompt).input_ids), int(tokenizer.model_max_length)

    def _prepare(self, image: Image, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        check_image(image)
        if isinstance(prompts, str) or not len(prompts) == len(seeds) == len(image):
            count = "one text" if isinstance(prompts, str) else len(prompts)
            raise ConfigError(
                f"every photo needs a prompt and a seed: got {len(image)} photos, {count} as "
                f"prompts, {len(seeds)} seeds"
            )
        for prompt in set(prompts):
            tokens, longest = self._tokens(prompt)
            if tokens > longest:
                raise ConfigError(
                    f"the prompt {prompt[:40]!r}… has {tokens} tokens with what is put around it, "
                    f"the text encoder reads {longest}; shorten it"
                )
        return self._view(image)

    def _in_turn(self, view: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Run `batch` samples at a time, each with a generator of its own."""
        edits = []
        for start in range(0, len(view), self.sampling.batch):
            part = slice(start, start + self.sampling.batch)
            rngs = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            edits.append(self._sample(view[part], list(prompts[part]), rngs))
        return torch.cat(edits)


class InstructPix2PixEditor(PipelineEditor):
    """Follows an instruction; the photo enters as unscaled posterior mean beside the noise."""

    SAMPLING = InstructSampling
    sampling: InstructSampling

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load the folder of an InstructPix2Pix pipeline; it samples by Euler's ancestral rule."""
        sampling = cls.settings(card)
        parts = stable_diffusion_parts(source, (8,), sampling.dtype)
        parts["scheduler"] = EulerAncestralDiscreteScheduler.from_config(parts["scheduler"].config)
        return cls(StableDiffusionInstructPix2PixPipeline(**parts), sampling)

    def _sample(self, view: Tensor, prompts: list[str], rngs: list[torch.Generator]) -> Tensor:
        return self._run(
            prompt=prompts,
            image=view,
            image_guidance_scale=self.sampling.image_guidance,
            generator=rngs,
        )


class ImageToImageEditor(PipelineEditor):
    """Adds noise to the photo and removes it under a description; needs no special network."""

    SAMPLING = PartialSampling
    sampling: PartialSampling

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load the folder of a Stable Diffusion 1 pipeline."""
        sampling = cls.settings(card)
        parts = stable_diffusion_parts(source, (4,), sampling.dtype)
        return cls(StableDiffusionImg2ImgPipeline(**parts), sampling)

    def _sample(self, view: Tensor, prompts: list[str], rngs: list[torch.Generator]) -> Tensor:
        return self._run(
            prompt=prompts,
            image=view,
            strength=self.sampling.strength,
            generator=rngs,
        )


class InpaintingEditor(PipelineEditor):
    """Makes one part of the photo anew under a description, and keeps the rest.

    What is kept has gone through the autoencoder; it is not pasted back.

    Args:
        mask: (1, 1, H, W), [0, 1]: where `edit` is told no mask, what is 0.5 or more is made anew;
            everything outside an upright oval in the middle where left out, which suits aligned
            portraits.
    """

    SAMPLING = InpaintSampling
    sampling: InpaintSampling
    mask: Tensor

    def __init__(
        self,
        pipeline: Any,  # noqa: ANN401
        sampling: Sampling | None = None,
        *,
        mask: Mask | None = None,
    ) -> None:
        super().__init__(pipeline, sampling)
        self.register_buffer(
            "mask", centred_background(self.size) if mask is None else mask, persistent=False
        )

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load the folder of an inpainting pipeline, or of plain Stable Diffusion 1."""
        sampling = cls.settings(card)
        parts = stable_diffusion_parts(source, (9, 4), sampling.dtype)
        return cls(StableDiffusionInpaintPipeline(**parts), sampling)

    @torch.no_grad()
    def edit(
        self,
        image: Image,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        mask: Mask | None = None,
    ) -> Image:
        """Edit photos; see `PipelineEditor`.

        Args:
            image: (B, 3, H, W), [0, 1].
            prompts: B descriptions of the whole picture.
            seeds: B numbers.
            mask: (B, 1, H, W), [0, 1]; what is 0.5 or more is made anew, the rest is kept. The
                editor's own where left out.
        """
        view = self._prepare(image, prompts, seeds)
        if mask is not None:
            check_mask(mask, image)
            view[:, 3:] = resized(mask.to(view), (self.size, self.size))
        return self._in_turn(view, prompts, seeds).to(image)

    def _view(self, image: Image) -> Tensor:
        view = super()._view(image)
        mask = resized(self.mask.to(view), (self.size, self.size))
        return torch.cat([view, mask.expand(len(view), -1, -1, -1)], dim=1)

    def _sample(self, view: Tensor, prompts: list[str], rngs: list[torch.Generator]) -> Tensor:
        return self._run(
            prompt=prompts,
            image=view[:, :3],
            mask_image=view[:, 3:],
            height=self.size,
            width=self.size,
            strength=self.sampling.strength,
            generator=rngs,
        )


def centred_background(size: int) -> Mask:
    """Everything outside an upright oval in the middle: (1, 1, size, size), 0 or 1.

    The oval is 0.6 of the width and 0.8 of the height: a face as aligned portraits have it.
    """
    line = (torch.arange(size) + 0.5) / size - 0.5
    inside = (line[None, :] / 0.3).square() + (line[:, None] / 0.4).square() <= 1
    return (~inside).float()[None, None]
