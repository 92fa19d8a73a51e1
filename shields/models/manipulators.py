"""StarGAN, AttentionGAN and Fixed-Point GAN behind the contract of a manipulator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from shields.errors import ConfigError, WeightsError
from shields.models.base import signed_range_to_unit, unit_range_to_signed
from shields.models.manipulation import Condition, Manipulator
from shields.models.star_networks import (
    AttentionGenerator,
    FixedPointGenerator,
    PerImageNorm,
    StarGenerator,
)
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["CELEBA_FIVE", "AGGANModel", "FPGANModel", "StarGANModel", "condition_name"]

#: attributes of the published networks, in the order of their label vectors
CELEBA_FIVE = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young")
#: of these, at most one is set
_HAIR = {"black_hair", "blond_hair", "brown_hair", "gray_hair"}


def condition_name(attribute: str) -> str:
    """`Blond_Hair` -> `blond_hair`, as people type it."""
    return attribute.lower()


class StarGANModel(Manipulator):
    """Told the whole wanted state as a vector of zeros and ones.

    Source:
        StarGAN (Choi et al., 2018), https://arxiv.org/abs/1711.09020.
    """

    NETWORK: ClassVar[type[StarGenerator]] = StarGenerator

    def __init__(
        self, network: StarGenerator, attributes: Sequence[str], native_size: int | None = None
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.attributes, self.native_size = tuple(attributes), native_size
        self.conditions = tuple(_names(self.attributes))
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from an official file, or from one that this project trained.

        Sizes come from the tensors; the card's `[config]` names `attributes` and `native_size`.
        """
        state = read_state_dict(source)
        config = dict(card.config)
        attributes = config.pop("attributes", CELEBA_FIVE)
        native_size = config.pop("native_size", None)
        stem = state.get("main.0.weight")
        if stem is None or stem.ndim != 4:
            raise WeightsError(f"the weights of {card.name!r} are not those of a {cls.__name__}")
        found = {"attributes": stem.shape[1] - 3, "width": stem.shape[0], "blocks": _blocks(state)}
        if found["attributes"] != len(attributes):
            raise WeightsError(
                f"the weights of {card.name!r} take {found['attributes']} attributes, "
                f"{len(attributes)} are named: {', '.join(attributes)}; name them in its card"
            )
        network = build(cls.NETWORK, replace(card, config=found | config))
        load_strictly(network, _completed(network, state), card.name)
        return cls(network, attributes, native_size)

    def _condition(self, name: str, labels: Tensor | None) -> Condition:
        wanted = torch.zeros(1, len(self.attributes)) if labels is None else labels.float().clone()
        if wanted.ndim != 2 or wanted.shape[1] != len(self.attributes):
            raise ConfigError(
                f"labels must be (B, {len(self.attributes)}), got {tuple(wanted.shape)}"
            )
        remove = name.startswith("not_")
        known = [condition_name(attribute) for attribute in self.attributes]
        index = known.index(name.removeprefix("not_"))
        if known[index] in _HAIR:
            for other, attribute in enumerate(known):
                if attribute in _HAIR:
                    wanted[:, other] = 0
        wanted[:, index] = 0 if remove else 1
        return Condition(name=name, value=wanted)

    def targets(self, labels: Tensor) -> list[Condition]:
        """One edit per attribute of photos with these labels (B, N), as the authors test them.

        Hair colours are set, and exclude each other; anything else is turned into its opposite.
        """
        edits = []
        for index, attribute in enumerate(self.attributes):
            edit = self._condition(condition_name(attribute), labels)
            if condition_name(attribute) not in _HAIR:
                edit.value[:, index] = 1 - labels[:, index].float()
            edits.append(edit)
        return edits

    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        labels = condition.value.to(image).expand(len(image), -1)
        forged, features = self.network(unit_range_to_signed(image), labels)
        return signed_range_to_unit(forged), features


class AGGANModel(StarGANModel):
    """AttentionGAN v1 for several domains; its result may leave [0, 1].

    Source:
        AttentionGAN (Tang et al., 2019), https://arxiv.org/abs/1903.12296.
    """

    NETWORK = AttentionGenerator


class FPGANModel(StarGANModel):
    """Fixed-Point GAN; its files cannot be told from StarGAN's, the card must say which it is.

    Source:
        Fixed-Point GAN (Siddiquee et al., 2019), https://arxiv.org/abs/1908.06965.
    """

    NETWORK = FixedPointGenerator


def _names(attributes: Sequence[str]) -> Iterator[str]:
    for attribute in attributes:
        yield condition_name(attribute)
        if condition_name(attribute) not in _HAIR:
            yield f"not_{condition_name(attribute)}"


def _blocks(state: Mapping[str, Tensor]) -> int:
    return sum(key.endswith("main.0.weight") and key.count("main") == 2 for key in state)


def _completed(network: StarGenerator, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill in the dead statistics that files of some ages leave out; all else stays as it is."""
    own = network.state_dict()
    dead = {key: own[key] for key in own if key.rpartition(".")[2] in PerImageNorm.BUFFERS}
    return {**dead, **state}
