"""Face parsers behind one contract: which pixel is skin, hair, nose, …, in one order of classes.

`shields.masks.from_labels` makes masks of what they return.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import WeightsError
from shields.masks import CLASSES
from shields.models.base import Frozen
from shields.models.bisenet import BiSeNet
from shields.models.manipulation import resized
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict, read_table

__all__ = ["CLASSES", "BiSeNetParser", "Parser", "SegformerParser", "common_order"]

#: of ImageNet, as nearly all networks of this kind have them
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Parser(Frozen, ABC):
    """Says of every pixel of a portrait what it shows, in the order of `CLASSES`."""

    #: side of the square that the network sees, pixels
    size: int = 512
    HOT = ("_parse",)

    def __init__(
        self, mean: Sequence[float] = _MEAN, deviation: Sequence[float] = _DEVIATION
    ) -> None:
        super().__init__()
        for name, values in (("_mean", mean), ("_deviation", deviation)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @abstractmethod
    def _parse(self, image: Tensor) -> Tensor:
        """(B, 3, size, size), normalised -> logits (B, 19, h, w), `CLASSES` in order."""

    def forward(self, image: Image) -> Tensor:
        """Logits (B, 19, H, W) of a portrait (B, 3, H, W), [0, 1], of any size and shape."""
        small = resized(image, (self.size, self.size))
        mean, deviation = self.get_buffer("_mean"), self.get_buffer("_deviation")
        logits = self._parse((small - mean) / deviation)
        return functional.interpolate(
            logits, size=image.shape[2:], mode="bilinear", align_corners=False
        )

    @torch.no_grad()
    def labels(self, image: Image) -> Tensor:
        """Label map (B, H, W), int64, indices into `CLASSES`."""
        return self(image).argmax(dim=1)


class BiSeNetParser(Parser):
    """BiSeNet with the weights that nearly everybody parses faces with.

    Source:
        See `shields.models.bisenet`.
    """

    def __init__(self, network: BiSeNet, size: int = 512) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.size = size
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from the published file; the card's `[config]` may name a `size`."""
        config = dict(card.config)
        size = int(config.pop("size", cls.size))
        network = build(BiSeNet, replace(card, config=config))
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network, size)

    def _parse(self, image: Tensor) -> Tensor:
        return self.network(image)


class SegformerParser(Parser):
    """SegFormer as transformers has it; its own order of classes is mapped by their names.

    Source:
        SegFormer (Xie et al., 2021), https://arxiv.org/abs/2105.15203.
    """

    order: Tensor

    def __init__(
        self,
        network: nn.Module,
        order: Sequence[int],
        size: int = 512,
        mean: Sequence[float] = _MEAN,
        deviation: Sequence[float] = _DEVIATION,
    ) -> None:
        super().__init__(mean, deviation)
        self.network, self.size = network, size
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load a folder in Hugging Face's layout; code that lies in it is not run.

        Raises:
            WeightsError: Something is absent or damaged, or the classes are not the known 19.
        """
        if source.is_file():
            raise WeightsError(
                f"{card.name}: a SegFormer is a folder with config.json and model.safetensors, "
                "not a file"
            )
        settings = read_table(source / "config.json", f"{source / 'config.json'} cannot be read")
        if settings.get("model_type") != "segformer":
            raise WeightsError(f"{source} holds a {settings.get('model_type')}, not a segformer")
        table = settings.get("id2label")
        order = common_order(table if isinstance(table, dict) else {}, card.name)
        network = _segformer(source, settings, card.name)
        return cls(network, order, **_preprocessing(source / "preprocessor_config.json"))

    def _parse(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=image).logits
        return logits[:, self.order]


def common_order(id2label: Mapping[str, str] | Mapping[int, str], name: str) -> list[int]:
    """Where each of `CLASSES` stands among a network's outputs.

    Args:
        id2label: Output -> class, as configurations of transformers have it; `.png` behind a
            class, as one publisher wrote it, is no part of its name.
        name: The network's, for the message.

    Raises:
        WeightsError: These are not the 19 classes.

    Example:
        >>> table = {str(index): name for index, name in enumerate(reversed(CLASSES))}
        >>> common_order(table, "mirrored")[:3]
        [18, 17, 16]
    """
    places = {str(label).removesuffix(".png"): str(index) for index, label in id2label.items()}
    wanted = {str(index) for index in range(len(CLASSES))}
    if places.keys() != set(CLASSES) or set(places.values()) != wanted:
        raise WeightsError(
            f"the classes of {name!r} must be the {len(CLASSES)} of CelebAMask-HQ, in any order: "
            f"{', '.join(CLASSES)}; got {', '.join(places) or 'none'}"
        )
    return [int(places[label]) for label in CLASSES]


def _preprocessing(path: Path) -> dict[str, Any]:
    """Size, mean and deviation as the folder asks for; what it leaves out stays at the usual."""
    if not path.is_file():
        return {}
    asked = read_table(path, f"{path} cannot be read")
    size = asked.get("size", 512)
    sides = set(size.values()) if isinstance(size, dict) else {size}
    values = [asked.get("image_mean", _MEAN), asked.get("image_std", _DEVIATION)]
    if len(sides) != 1 or not all(
        isinstance(entry, list | tuple) and len(entry) == 3 for entry in values
    ):
        raise WeightsError(f"{path} must ask for one square size and three means and deviations")
    return {"size": int(sides.pop()), "mean": values[0], "deviation": values[1]}


def _segformer(folder: Path, settings: Mapping[str, Any], name: str) -> nn.Module:
    """Build the network and fill it strictly; transformers knows the keys of its older versions."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    files = [folder / file for file in ("model.safetensors", "pytorch_model.bin")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise WeightsError(f"{folder} holds no weights: needed is {files[0].name}")
    state = read_state_dict(found)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            network, report = SegformerForSemanticSegmentation.from_pretrained(
                None,
                config=SegformerConfig.from_dict(dict(settings)),
                state_dict=state,
                output_loading_info=True,
            )
    # transformers raises whatever it likes where a configuration or a shape is wrong.
    except Exception as error:
        raise WeightsError(f"{folder} cannot be loaded as a SegFormer: {error}") from error
    wrong = [
        f"{len(report[kind])} {kind.replace('_', ' ')} ({sorted(map(str, report[kind]))[0]}, …)"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[kind]
    ]
    if wrong:
        raise WeightsError(f"the weights of {name!r} do not fit its config: {'; '.join(wrong)}")
    # a configuration may ask for half precision
    return network.float()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and reports off the terminal, and leave its settings as they were."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
