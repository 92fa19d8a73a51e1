"""Settings of diffusers' pipelines, and their parts as it saves them in a folder.

Parts are read strictly, and nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from shields.errors import ConfigError, WeightsError
from shields.models.diffusion import from_folder
from shields.weights import read_table

__all__ = [
    "InpaintSampling",
    "InstructSampling",
    "PartialSampling",
    "Sampling",
    "load_network",
    "load_scheduler",
    "load_text_reader",
    "pipeline_kind",
    "stable_diffusion_parts",
]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an editor samples, and what it does to need less memory."""

    #: side of the square that is edited, pixels
    size: int = 512
    #: denoising steps
    steps: int = 50
    #: weight of the text; 1 or less for none
    guidance: float = 7.5
    #: samples that run at once; above 1 an edit depends on its neighbours by rounding errors
    batch: int = 1
    #: of the networks
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    #: compute attention in slices: slower, less memory
    slicing: bool = False
    #: keep on an accelerator only the network that is running: much slower, far less memory
    offload: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be 1 or more, got {getattr(self, name)}")
        if self.precision not in {"float32", "bfloat16", "float16"}:
            raise ConfigError(
                f"`precision` must be float32, bfloat16 or float16, got {self.precision!r}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The type of that precision."""
        return {
            "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16
        }[self.precision]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InstructSampling(Sampling):
    """FaceLock's settings of InstructPix2Pix."""

    #: weight of the photo, 1 or more
    image_guidance: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_guidance < 1 or self.guidance <= 1:
            raise ConfigError(
                "InstructPix2Pix needs `guidance` above 1 and `image_guidance` of 1 or more: below "
                f"it is not guided at all; got {self.guidance} and {self.image_guidance}"
            )


@dataclass(frozen=True, kw_only=True)
class PartialSampling(Sampling):
    """Noise is added to the photo, and part of the steps remove it again."""

    #: share of the steps that are run, (0, 1]
    strength: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.strength <= 1:
            raise ConfigError(f"`strength` must be above 0 and at most 1, got {self.strength}")
        if int(self.steps * self.strength) < 1:
            raise ConfigError(
                f"{self.steps} steps at strength {self.strength} leave none to run; raise either"
            )


@dataclass(frozen=True, kw_only=True)
class InpaintSampling(PartialSampling):
    """What is edited is made from noise alone."""

    strength: float = 1.0


def _part_table(path: Path) -> dict[str, Any]:
    return read_table(path, f"{path} should be part of a pipeline's folder")


def pipeline_kind(source: Path) -> tuple[str, dict[str, Any]]:
    """Return the class of the pipeline in a folder, and all of its `model_index.json`.

    Raises:
        WeightsError: It is not such a folder.
    """
    index = _part_table(source / "model_index.json")
    return str(index.get("_class_name")), index


def _demand(source: Path, parts: Sequence[str]) -> None:
    absent = [part for part in parts if not (source / part).is_dir()]
    if absent:
        raise WeightsError(
            f"{source} is not the folder of a whole pipeline: no {', '.join(absent)}"
        )


def load_network(kind: Any, folder: Path, precision: torch.dtype) -> nn.Module:  # noqa: ANN401
    """Load one network by its class of diffusers or transformers.

    Raises:
        WeightsError: It is absent, damaged or does not fit.
    """
    _demand(folder.parent, [folder.name])
    network: nn.Module = from_folder(kind, folder)
    # Parameters alone: buffers, such as the frequencies of rotary positions, need their precision.
    for parameter in network.parameters():
        parameter.data = parameter.data.to(precision)
    return network


def load_text_reader(kind: Any, folder: Path) -> Any:  # noqa: ANN401  any tokenizer or processor
    """Load a tokenizer, or a processor that holds one.

    Raises:
        WeightsError: It is absent or damaged.
    """
    _demand(folder.parent, [folder.name])
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # libraries raise whatever they like on damaged files
        raise WeightsError(f"{folder} cannot be loaded as {kind.__name__}: {error}") from error


def load_scheduler(folder: Path) -> Any:  # noqa: ANN401  any scheduler of diffusers
    """Load the sampler that a pipeline came with.

    Raises:
        WeightsError: It is absent, damaged or of no known class.
    """
    config = _part_table(folder / "scheduler_config.json")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if diffusers.SchedulerMixin not in getattr(kind, "__mro__", ()):
        raise WeightsError(f"{folder} holds a scheduler {config.get('_class_name')!r}: not known")
    try:
        return kind.from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{folder} holds a scheduler that cannot be set up: {error}") from error


def stable_diffusion_parts(
    source: Path, channels: Sequence[int], precision: torch.dtype
) -> dict[str, Any]:
    """Load what every Stable Diffusion 1 pipeline is made of; its safety checker stays out.

    A safety checker blackens edits, which would count as protection.

    Args:
        source: The folder.
        channels: How many channels the denoiser may take.
        precision: Of all networks.

    Returns:
        Keyword arguments of diffusers' pipeline classes.

    Raises:
        WeightsError: A part is absent, damaged, or of another kind of pipeline.
    """
    _demand(source, ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    unet = load_network(UNet2DConditionModel, source / "unet", precision)
    taken = int(unet.config.in_channels)  # type: ignore[union-attr, arg-type]
    if taken not in channels:
        wanted = " or ".join(map(str, channels))
        raise WeightsError(
            f"the denoiser in {source} takes {taken} channels, this editing needs {wanted}; it "
            "belongs to another kind of pipeline"
        )
    return {
        "unet": unet,
        "vae": load_network(AutoencoderKL, source / "vae", precision),
        "text_encoder": load_network(CLIPTextModel, source / "text_encoder", precision),
        "tokenizer": load_text_reader(CLIPTokenizer, source / "tokenizer"),
        "scheduler": load_scheduler(source / "scheduler"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
