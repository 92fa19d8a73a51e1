"""RelGAN behind the contract of a manipulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from shields.errors import ConfigError, WeightsError
from shields.models.base import signed_range_to_unit, unit_range_to_signed
from shields.models.manipulation import Condition, Manipulator
from shields.models.manipulators import CELEBA_FIVE
from shields.models.relgan_network import RelganGenerator
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["PRESETS", "RelGANModel", "sizes"]

#: length of the relative vector -> attributes of the authors' models, in the vector's order
PRESETS: Mapping[int, tuple[str, ...]] = {
    17: (
        "5_o_Clock_Shadow", "Bald", "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair",
        "Eyeglasses", "Goatee", "Gray_Hair", "Male", "Mustache", "Pale_Skin", "Smiling",
        "Straight_Hair", "Wavy_Hair", "Wearing_Hat", "Young",
    ),
    9: (
        "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Mustache", "Pale_Skin",
        "Smiling", "Young",
    ),
    5: CELEBA_FIVE,
}  # fmt: skip


class RelGANModel(Manipulator):
    """Told what changes as a vector of -1, 0, +1 or between: no need to know the photo's labels.

    `blond_hair` adds, `not_blond_hair` removes, `blond_hair:0.5` goes half the way, and strength 0
    leaves the photo alone. One attribute changes at a time, hair colours included.

    Args:
        network: The generator.
        attributes: Names of the vector's entries.
        sign: The value that adds an attribute: -1 where the vector was trained as source minus
            target (the authors' PyTorch code), +1 where as target minus source (their Keras code).
        native_size: Side of the square that the network sees; None for the image as it is.

    Source:
        RelGAN (Wu et al., 2019), https://arxiv.org/abs/1908.07269.
    """

    def __init__(
        self,
        network: RelganGenerator,
        attributes: Sequence[str],
        sign: int,
        native_size: int | None = None,
    ) -> None:
        super().__init__()
        if sign not in (-1, 1):
            raise ConfigError(f"`sign` must be 1 or -1, the value that adds an attribute: {sign!r}")
        self.network = network.to(memory_format=torch.channels_last)
        self.attributes, self.sign, self.native_size = tuple(attributes), sign, native_size
        names = [attribute.lower() for attribute in self.attributes]
        self.conditions = tuple(text for name in names for text in (name, f"not_{name}"))
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from the authors' kind of file (its `G`), or from a bare state dict.

        Sizes come from the tensors; the card's `[config]` names `sign`, `native_size`, and
        `attributes` where they are not those of the authors' models.
        """
        config = dict(card.config)
        sign = config.pop("sign", None)
        if sign not in (-1, 1) or isinstance(sign, bool):
            raise WeightsError(
                f"card {card.name!r} must say in its [config] which `sign` adds an attribute: -1 "
                "for weights of the authors' PyTorch code, 1 for those converted from Keras or "
                f"trained here; got {sign!r}"
            )
        state = read_state_dict(source, ("G",))
        found = sizes(state, card.name)
        count = found["attributes"]
        attributes = config.pop("attributes", PRESETS.get(count, ()))
        if len(attributes) != count:
            raise WeightsError(
                f"the weights of {card.name!r} take {count} attributes, {len(attributes)} are "
                f"named: {', '.join(attributes) or 'none'}; name them in its card"
            )
        native_size = config.pop("native_size", None)
        network = build(RelganGenerator, replace(card, config=found | config))
        load_strictly(network, state, card.name)
        return cls(network, attributes, sign, native_size)

    def condition(self, name: str = "", *, labels: Tensor | None = None) -> Condition:
        """Look up what to do by name.

        Args:
            name: One of `conditions`, with a strength in [0, 1] behind a colon where not 1; the
                first where left empty.
            labels: Not needed here, the vector is relative.

        Raises:
            UnknownName: There is no such condition.
            ConfigError: The strength is no number in [0, 1].
        """
        plain, colon, strength = name.partition(":")
        whole = super().condition(plain)
        if not colon:
            return whole
        try:
            share = float(strength)
        except ValueError:
            share = float("nan")
        if not 0 <= share <= 1:
            raise ConfigError(f"{name!r}: the strength must be a number in [0, 1]")
        return Condition(name=name, value=share * whole.value)

    def _condition(self, name: str, labels: Tensor | None) -> Condition:
        index = self.conditions.index(name)
        vector = torch.zeros(1, len(self.attributes))
        vector[:, index // 2] = -self.sign if index % 2 else self.sign
        return Condition(name=name, value=vector)

    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        vector = condition.value.to(image).expand(len(image), -1)
        forged, features = self.network(unit_range_to_signed(image), vector)
        return signed_range_to_unit(forged), features


def sizes(state: Mapping[str, Tensor], name: str) -> dict[str, int]:
    """The generator's arguments, read off the shapes of its state dict.

    Raises:
        WeightsError: It is not RelGAN's.
    """
    stem = state.get("conv_in.0.weight")
    if stem is None or stem.ndim != 4:
        raise WeightsError(f"the weights of {name!r} are not those of a RelGAN generator")
    blocks = {key.split(".")[1] for key in state if key.startswith("resb.")}
    return {"attributes": stem.shape[1] - 3, "width": stem.shape[0], "blocks": len(blocks)}
