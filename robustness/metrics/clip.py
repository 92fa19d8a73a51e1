"""Whether an edit followed its instruction, by CLIP: CLIP-S, CLIP-SD and CLIP-I.

Source:
    Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021),
    https://arxiv.org/abs/2103.00020, ViT-B/32; scores as FaceLock (Wang et al., 2025),
    https://arxiv.org/abs/2411.16832, takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from robustness.metrics import Facts, Measure, MeasureSettings, Scene
from robustness.metrics.memory import Memory
from shields.codec import resize
from shields.errors import ConfigError, WeightsError
from shields.models.base import Frozen
from shields.models.diffusion import from_folder
from shields.types import Image

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = ["ClipModel", "ClipSettings", "DescriptionScore", "ImageScore", "InstructionScore"]

#: what a folder of CLIP consists of; nothing else is fetched
_FILES = ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.json", "merges.txt",
          "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]  # fmt: skip


class ClipModel(Frozen):
    """CLIP's two encoders, frozen: images and texts to features that are not normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.network, self._tokenizer = network, tokenizer
        self.register_buffer("mean", torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1), persistent=False)
        self.freeze()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read a folder as transformers saves it.

        Raises:
            WeightsError: A file is absent, damaged, or does not fit.
        """
        network = from_folder(CLIPModel, folder)
        # transformers raises many types on a damaged tokenizer.
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise WeightsError(f"{folder} holds no tokenizer of CLIP's: {error}") from error
        return cls(network, tokenizer)

    def images(self, image: Image) -> Tensor:
        """(B, 3, H, W), [0, 1] -> (B, D): shorter side to the model's size, bicubic; the middle."""
        side = int(self.network.config.vision_config.image_size)
        height, width = image.shape[2:]
        scale = side / min(height, width)
        small = resize(image, (max(side, int(height * scale)), max(side, int(width * scale))),
                       "bicubic").clamp(0, 1)  # fmt: skip
        top, left = (int((length - side) / 2) for length in small.shape[2:])
        middle = small[..., top : top + side, left : left + side]
        return _projected(self.network.get_image_features((middle - self.mean) / self.std))

    def text(self, text: str) -> Tensor:
        """Encode a text, cut at the model's length: (1, D)."""
        length = int(self.network.config.text_config.max_position_embeddings)
        tokens = self._tokenizer([text], truncation=True, max_length=length, return_tensors="pt")
        return _projected(
            self.network.get_text_features(
                input_ids=tokens["input_ids"].to(self.mean.device),
                attention_mask=tokens["attention_mask"].to(self.mean.device),
            )
        )


def _projected(result: Any) -> Tensor:  # noqa: ANN401  transformers' own class
    """Up to version 4 transformers returns the features, from 5 on an object that holds them."""
    features: Tensor = getattr(result, "pooler_output", result)
    return features


def _folder(name: str, store: WeightStore) -> Path:
    """Find a folder by its path, below a place of the store, or in Hugging Face's cache."""
    for place in [Path(name).expanduser(), *(place / name for place in store.places())]:
        if (place / "config.json").is_file():
            return place
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, allow_patterns=_FILES, local_files_only=not store.download)
    # Of its own, of the HTTP client beneath, of the disk: the types are many and change.
    except Exception as error:
        raise WeightsError(
            f"CLIP {name!r} is not on this machine: neither a folder, nor in the cache of Hugging "
            f"Face; `hf download {name}` fetches it"
        ) from error
    return Path(found)


@dataclass(frozen=True, kw_only=True)
class ClipSettings(MeasureSettings):
    """Which CLIP."""

    #: a folder in transformers' layout, or a Hugging Face id
    model: str = "openai/clip-vit-base-patch32"


class _Clip(Measure):
    """What looks through CLIP; features of references and texts are computed once."""

    Settings: ClassVar = ClipSettings
    pairs: ClassVar = ("source",)

    def __init__(self, network: ClipModel, name: str) -> None:
        self._network, self._name = network, name
        self._memory = Memory()

    @classmethod
    def load(cls, settings: ClipSettings, *, store: WeightStore, device: torch.device) -> Self:
        """Find the folder and load both encoders."""
        return cls(ClipModel.load(_folder(settings.model, store)).to(device), settings.model)

    def _features(self, image: Image, other: Image, scene: Scene) -> tuple[Tensor, Tensor]:
        (reference,) = self._memory(
            scene.reference_keys(), len(other), lambda rows: (self._network.images(other[rows]),)
        )
        return self._network.images(image), reference

    def _text(self, text: str, what: str) -> Tensor:
        if not text:
            raise ConfigError(f"this score of CLIP's needs {what}; an edit without text has none")
        keys: Sequence[str] = (text,)
        (features,) = self._memory(keys, 1, lambda _: (self._network.text(text),))
        return features


class _Direction(_Clip):
    def _towards(self, image: Image, other: Image, text: Tensor, scene: Scene) -> Tensor:
        """Cosine between what the edit changed and a text (B,); NaN where it changed nothing."""
        ours, theirs = self._features(image, other, scene)
        change = ours - theirs
        cosine = functional.cosine_similarity(change, text)
        return cosine.where(change.norm(dim=1) > 0, torch.nan)


class InstructionScore(_Direction):
    """CLIP-S: whether what changed points to where the instruction does."""

    undefined: ClassVar = "the edit equals its source: nothing changed in any direction"

    def facts(self, pair: str) -> Facts:
        """Less is better for the defender."""
        return Facts(
            higher=False,
            low=-1,
            high=1,
            unit="cosine",
            summary="CLIP-S: cosine between the change from photo to edit and the instruction "
            f"({self._name}); small and noisy, never to rank by alone.",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        text = self._text(scene.prompt, "the instruction of the edit")
        return self._towards(image, other, text, scene)


class DescriptionScore(_Clip):
    """CLIP-SD: whether the edit shows what it should."""

    def facts(self, pair: str) -> Facts:
        """Less is better for the defender."""
        return Facts(
            higher=False,
            low=-1,
            high=1,
            unit="cosine",
            summary="CLIP-SD: cosine between the edit and a description of what it should show "
            f"({self._name}).",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        text = self._text(scene.description, "a description of what the edit should show")
        return functional.cosine_similarity(self._network.images(image), text)


class ImageScore(_Clip):
    """CLIP-I: whether the edit still shows what its source shows."""

    def facts(self, pair: str) -> Facts:
        """Less is better for the defender, as FaceLock has it."""
        return Facts(
            higher=False,
            low=-1,
            high=1,
            unit="cosine",
            summary=f"CLIP-I: cosine between the edit and the clean photo ({self._name}).",
        )

    def _measure(self, image: Image, other: Image, scene: Scene) -> Tensor:
        return functional.cosine_similarity(*self._features(image, other, scene))
