"""Editors that take the photo as a picture to go by: IP-Adapter and the FLUX.2 family.

Source:
    IP-Adapter (Ye et al., 2023), https://arxiv.org/abs/2308.06721.
    FLUX.2 (Black Forest Labs, 2025), https://bfl.ai/blog/flux-2.

Differs:
    IP-Adapter: the photo is resized to the image encoder's square as a tensor and not through
    Pillow, so that nothing is rounded to whole levels; it is squeezed and not cropped.
    FLUX.2: the pipeline of diffusers takes Pillow images alone, so the resized photo is rounded
    (not truncated) to whole levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shields.errors import ConfigError, WeightsError
from shields.models.editors import PipelineEditor
from shields.models.pipelines import (
    Sampling,
    load_network,
    load_scheduler,
    load_text_reader,
    pipeline_kind,
    stable_diffusion_parts,
)
from shields.types import Image
from shields.weights import Card, WeightStore, read_state_dict

__all__ = ["AdapterSampling", "Flux2Editor", "Flux2Sampling", "IPAdapterEditor"]

#: card of the Stable Diffusion that published adapters go with
_BASE = "stable-diffusion-1-5"


@dataclass(frozen=True, kw_only=True)
class AdapterSampling(Sampling):
    """A new picture after the photo."""

    #: weight of the photo against the text, 0 for none
    scale: float = 1.0


class IPAdapterEditor(PipelineEditor):
    """Makes a new picture of whom the photo shows; the text may be empty."""

    SAMPLING = AdapterSampling
    BATCHED = False  # diffusers shares the photo among all samples of a call
    SLICED = False  # and sets its adapters up with plain attention alone
    sampling: AdapterSampling

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load an adapter's safetensors file, or the folder that holds it.

        `image_encoder`, in transformers' layout, lies beside the file, as in `models` of the
        published repository. In the card's `[config]`, beside settings of `SAMPLING`: `adapter`,
        the file's name, where the folder holds several; `base`, the card or absolute folder of the
        Stable Diffusion 1 that it goes with, which is `stable-diffusion-1-5` unless the folder is
        itself one of a pipeline.
        """
        config = dict(card.config)
        base, wanted = str(config.pop("base", "")), str(config.pop("adapter", ""))
        sampling = cls.settings(replace(card, config=config))
        folder = source.parent if source.is_file() else source
        file = source if source.is_file() else _adapter_file(source, wanted)
        parts = stable_diffusion_parts(_base_folder(folder, base), (4,), sampling.dtype)
        parts["image_encoder"] = load_network(
            CLIPVisionModelWithProjection, folder / "image_encoder", sampling.dtype
        )
        pipeline = StableDiffusionPipeline(**parts)
        _plug_in(pipeline, file, sampling.dtype)
        return cls(pipeline, sampling)

    def __init__(self, pipeline: Any, sampling: Sampling | None = None) -> None:  # noqa: ANN401
        super().__init__(pipeline, sampling)
        pipeline.set_ip_adapter_scale(self.sampling.scale)

    def _view(self, image: Image) -> Tensor:
        side = int(self.pipeline.image_encoder.config.image_size)
        small = functional.interpolate(
            image, size=(side, side), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        mean, spread = (
            image.new_tensor(row)[:, None, None] for row in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        )
        return (small - mean) / spread

    def _sample(self, view: Tensor, prompts: list[str], rngs: list[torch.Generator]) -> Tensor:
        return self._run(
            prompt=prompts,
            ip_adapter_image=[view],
            height=self.size,
            width=self.size,
            generator=rngs,
        )


def _adapter_file(folder: Path, wanted: str) -> Path:
    found = sorted(path.name for path in folder.glob("ip-adapter*.safetensors"))
    if wanted in found:
        return folder / wanted
    if wanted or len(found) != 1:
        raise WeightsError(
            f"{folder} should hold {wanted or 'one ip-adapter*.safetensors'}, it holds "
            f"{', '.join(found) or 'none'}; name one as `adapter` in the card's [config]"
        )
    return folder / found[0]


def _base_folder(folder: Path, base: str) -> Path:
    if not base and (folder / "unet").is_dir():
        return folder
    if Path(base).is_absolute():
        return Path(base)
    store = WeightStore(folder)
    return store.find(store.card(base or _BASE))


def _plug_in(pipeline: Any, file: Path, precision: torch.dtype) -> None:  # noqa: ANN401
    """Put an adapter's weights into a pipeline; every key must be there and none be left over."""
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    state = read_state_dict(file)
    for key, value in state.items():
        group, _, rest = key.partition(".")
        groups.setdefault(group, {})[rest] = value.to(precision)
    crossings = sum("attn2" in name for name in pipeline.unet.attn_processors)
    # Official files number all attentions in turn, and every second one looks at the text.
    expected = {f"{2 * at + 1}.to_{role}_ip.weight" for at in range(crossings) for role in "kv"}
    if set(groups) != {"image_proj", "ip_adapter"} or set(groups["ip_adapter"]) != expected:
        raise WeightsError(
            f"{file} is no IP-Adapter for this Stable Diffusion: it has {len(state)} tensors, "
            f"{len(expected)} of them should be {min(expected)}, …, and the rest the projection"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            pipeline.load_ip_adapter(groups, subfolder="", weight_name="", low_cpu_mem_usage=False)
    # diffusers tells the variants apart by their keys, and fails in many ways.
    except Exception as error:
        raise WeightsError(f"{file} does not fit this Stable Diffusion: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Flux2Sampling(Sampling):
    """Settings of networks that were not distilled; `Flux2Editor.load` adapts them to others."""

    guidance: float = 4.0
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class Flux2Editor(PipelineEditor):
    """Follows an instruction; the photo enters as further tokens beside those of the picture."""

    SAMPLING = Flux2Sampling
    BATCHED = False  # diffusers shares the photos among all samples of a call
    SLICED = False
    #: pipeline of diffusers -> classes of its text encoder and of what reads the text for it
    KINDS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "Flux2KleinPipeline": ("Qwen3ForCausalLM", "AutoTokenizer"),
        "Flux2Pipeline": ("Mistral3ForConditionalGeneration", "AutoProcessor"),
    }
    sampling: Flux2Sampling

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load the folder of a FLUX.2 pipeline.

        A distilled one is sampled in 4 steps without guidance unless the card says otherwise.
        """
        kind, index = pipeline_kind(source)
        if kind not in cls.KINDS:
            known = ", ".join(cls.KINDS)
            raise WeightsError(f"{source} holds a {kind}; FLUX.2 pipelines known here: {known}")
        distilled = {"is_distilled": True} if index.get("is_distilled") else {}
        few = {"steps": 4, "guidance": 1.0} if distilled else {}
        sampling = cls.settings(replace(card, config=few | dict(card.config)))
        encoder, reader = cls.KINDS[kind]
        networks = {
            "vae": _known(diffusers, "AutoencoderKLFlux2"),
            "transformer": _known(diffusers, "Flux2Transformer2DModel"),
            "text_encoder": _known(transformers, encoder),
        }
        parts = {
            name: load_network(network, source / name, sampling.dtype)
            for name, network in networks.items()
        }
        pipeline = _known(diffusers, kind)(
            **parts,
            **distilled,
            tokenizer=load_text_reader(_known(transformers, reader), source / "tokenizer"),
            scheduler=load_scheduler(source / "scheduler"),
        )
        return cls(pipeline, sampling)

    def _multiple(self) -> int:
        return 2 * int(self.pipeline.vae_scale_factor)  # latents are taken in 2x2 patches

    def _check_sampling(self) -> None:
        super()._check_sampling()
        if not 64 <= self.size <= 1024:
            raise ConfigError(f"FLUX.2 takes photos of 64 to 1024 pixels, `size` is {self.size}")

    def _tokens(self, prompt: str) -> tuple[int, int]:
        longest, reader = int(self.pipeline.tokenizer_max_length), self.pipeline.tokenizer
        if not hasattr(self.pipeline, "system_message"):
            told = reader.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            return len(reader(told).input_ids), longest
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("system", self.pipeline.system_message), ("user", prompt))
        ]
        tokens = reader.apply_chat_template([messages], tokenize=True, return_dict=True)
        return len(tokens["input_ids"][0]), longest

    def _sample(self, view: Tensor, prompts: list[str], rngs: list[torch.Generator]) -> Tensor:
        levels = (view[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        return self._run(
            image=[PILImage.fromarray(levels)],
            prompt=prompts,
            height=self.size,
            width=self.size,
            generator=rngs,
        )


def _known(library: Any, name: str) -> Any:  # noqa: ANN401  classes of foreign libraries
    if not hasattr(library, name):
        raise WeightsError(
            f"these weights need {name}, which a newer {library.__name__} than the installed has"
        )
    return getattr(library, name)
