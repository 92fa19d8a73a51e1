"""HiSD behind the contract of a manipulator: one tag changed by a style, from noise or a photo."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shields.errors import ImageError, UnknownName, WeightsError
from shields.models.base import signed_range_to_unit, unit_range_to_signed
from shields.models.hisd_network import HisdGenerator, sizes
from shields.models.manipulation import Condition, Manipulator, resized
from shields.photo import read
from shields.registry import did_you_mean
from shields.types import Image, check_image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["CELEBA_HQ_TAGS", "HiSDModel"]

#: tags of the published networks and the values of each, in the order of their weights
CELEBA_HQ_TAGS: Mapping[str, tuple[str, ...]] = {
    "bangs": ("with", "without"),
    "eyeglasses": ("with", "without"),
    "hair_color": ("black", "blond", "brown"),
}
#: shorter sides leave the translators a single pixel, which has no deviation
_SHORTEST = 8


class HiSDModel(Manipulator):
    """Told a tag and a style; its result may leave [0, 1].

    A condition is `tag:value`, its style made from fixed noise, or `tag=FILE`, its style taken from
    that photo; `reference` does the latter for an image. The feature map is the encoder's, which
    does not depend on the condition.

    Source:
        HiSD (Li et al., 2021), https://arxiv.org/abs/2103.01456.

    Differs:
        The authors draw fresh noise for every photo; here it is always the same, so that clean and
        protected photos, and two runs, are comparable. A reference is brought to the native size,
        where the card names one.
    """

    def __init__(
        self,
        network: HisdGenerator,
        tags: Mapping[str, Sequence[str]] = CELEBA_HQ_TAGS,
        native_size: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.tags = {tag: tuple(values) for tag, values in tags.items()}
        self.conditions = tuple(f"{tag}:{value}" for tag in self.tags for value in self.tags[tag])
        self.native_size = native_size
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from an official file, or from one that this project trained.

        Sizes come from the tensors; the card's `[config]` may name `tags`, the `attributes` of each
        (the published ones where left out), and `native_size`.
        """
        state = _read(source)
        tags = _tags(card)
        found = sizes(state)
        named = tuple(len(values) for values in tags.values())
        if found["attributes"] != named:
            raise WeightsError(
                f"the weights of {card.name!r} have {_said(found['attributes'])}; its card names "
                f"{_said(named)} ({', '.join(tags)}); name `tags` and `attributes` in its [config]"
            )
        network = build(HisdGenerator, replace(card, config=found))
        load_strictly(network, state, card.name)
        return cls(network, tags, card.config.get("native_size"))

    def condition(self, name: str = "", *, labels: Tensor | None = None) -> Condition:
        """Look up what to do: a name of `conditions`, or `tag=FILE` for a style taken from a photo.

        Args:
            name: What to do; the first of `conditions` where left empty.
            labels: Not looked at: a style says what is wanted, whatever the photo shows.

        Raises:
            UnknownName: There is no such condition or tag.
            ImageError: The reference cannot be read, or is too small.
        """
        tag, is_reference, file = name.partition("=")
        if not is_reference:
            return super().condition(name, labels=labels)
        self._index(tag)  # a wrong tag shall not be told by way of its file
        photo = read(Path(file).expanduser())
        return replace(self.reference(tag, photo.image()), name=name)

    def reference(self, tag: str, image: Image) -> Condition:
        """Take the style of one tag from a face, once.

        Args:
            tag: One of `tags`.
            image: (1, 3, H, W) for a style that serves any batch, or (B, 3, H, W) for one each,
                [0, 1]; sides of 64 pixels or more for the published network, cropped like the
                photos to be forged.

        Raises:
            UnknownName: There is no such tag.
            ImageError: A side is shorter than the network can take.
        """
        part = self._index(tag)
        check_image(image, "reference")
        if self.native_size is not None:
            image = resized(image, (self.native_size, self.native_size))
        if min(image.shape[2:]) < self.network.least:
            raise ImageError(
                f"a reference for {self.name!r} needs sides of {self.network.least} pixels or more,"
                f" got {image.shape[2]}x{image.shape[3]}; give a larger photo"
            )
        with torch.no_grad():
            native = unit_range_to_signed(image).to(next(self.network.parameters()))
            style = self.network.extract(native, part)
        return Condition(name=f"{tag}:reference", value=style, part=part)

    def _index(self, tag: str) -> int:
        if tag not in self.tags:
            raise UnknownName(
                f"the manipulator {self.name!r} has no tag {tag!r}; {did_you_mean(tag, self.tags)}"
            )
        return list(self.tags).index(tag)

    def _condition(self, name: str, labels: Tensor | None) -> Condition:
        tag, _, value = name.partition(":")
        part = self._index(tag)
        with torch.no_grad():
            styles = self.network.imagine(self.network.fixed_noise(), part)
        return Condition(name=name, value=styles[:, self.tags[tag].index(value)], part=part)

    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        if min(image.shape[2:]) < _SHORTEST:
            raise ImageError(
                f"the manipulator {self.name!r} needs sides of {_SHORTEST} pixels or more, got "
                f"{image.shape[2]}x{image.shape[3]}"
            )
        style = condition.value.to(image)
        forged, code = self.network(unit_range_to_signed(image), style, condition.part)
        return signed_range_to_unit(forged), code


def _read(source: Path) -> dict[str, Tensor]:
    """The averaged weights of a training checkpoint, or those of a bare file."""
    try:
        return read_state_dict(source, ("gen_test",))
    except WeightsError:
        # Either not there, which may be mended, or damaged, which fails here once more.
        state = read_state_dict(source, ("gen_test", "gen"))
    warnings.warn(
        f"{source} holds no averaged weights (`gen_test`); the raw ones (`gen`) are used, and "
        "forge worse",
        stacklevel=3,
    )
    return state


def _tags(card: Card) -> dict[str, tuple[str, ...]]:
    """Names of tags and of their values, in lower case, from a card."""
    config: Mapping[str, Any] = card.config
    unknown = set(config) - {"tags", "attributes", "native_size"}
    if unknown:
        raise WeightsError(
            f"card {card.name!r}: HiSD has no setting {', '.join(sorted(unknown))}; its [config] "
            "takes tags, attributes and native_size"
        )
    if ("tags" in config) != ("attributes" in config):
        raise WeightsError(f"card {card.name!r}: `tags` and `attributes` belong together")
    if "tags" not in config:
        return dict(CELEBA_HQ_TAGS)
    tags, values = config["tags"], config["attributes"]
    if len(tags) != len(values):
        raise WeightsError(
            f"card {card.name!r}: {len(tags)} tags need as many lists of attributes, got "
            f"{len(values)}"
        )
    return {
        tag.lower(): tuple(value.lower() for value in own)
        for tag, own in zip(tags, values, strict=True)
    }


def _said(counts: Sequence[int]) -> str:
    return f"{len(counts)} tags of {', '.join(map(str, counts))} attributes"
