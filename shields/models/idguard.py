"""ID-Guard's generator and its universal perturbation behind the contract of a generator.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349.

Differs:
    A perturbation is bounded by epsilon * tanh, which has a gradient everywhere; the authors' is
    cut off at epsilon, where most pixels have none. A card of weights trained so says
    `bound = "clamp"`.
    Beyond the trained budget, and below it, a perturbation is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError, WeightsError
from shields.models.base import unit_range_to_signed
from shields.models.generators import Generator
from shields.models.idguard_network import NETWORKS, GeneratorNetwork
from shields.types import Image, Perturbation
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["UNIVERSAL", "Bound", "IdGuardModel", "bounded", "joined"]

Bound = Literal["tanh", "clamp"]
#: key of the universal perturbation in a weights file, beside the network's own keys
UNIVERSAL = "universal"
#: the paper's 0.05 in [-1, 1]
_LEVELS = 6.375


def bounded(raw: Tensor, levels: float, bound: Bound = "tanh") -> Perturbation:
    """Bring a network's output in [-1, 1] into a budget, image units.

    Args:
        raw: (B, 3, H, W), in [-1, 1].
        levels: Budget.
        bound: Scale it, or take it as a perturbation of [-1, 1] and cut it off.
    """
    if bound == "tanh":
        return raw * (levels / 255)
    return (raw / 2).clamp(-levels / 255, levels / 255)


def joined(generator: Mapping[str, Tensor], universal: Tensor) -> dict[str, Tensor]:
    """Put a generator and its universal perturbation into one state dict, as `load` wants it.

    Args:
        generator: The network's state dict.
        universal: (3, S, S) or (1, 3, S, S) in units of [-1, 1], as the authors store theirs.
    """
    return {**generator, UNIVERSAL: universal.detach().reshape(universal.shape[-3:])}


class IdGuardModel(Generator):
    """Image and universal perturbation in, perturbation out; draws nothing.

    Args:
        network: ResNet, U-Net or transformer.
        universal: (3, S, S), units of [-1, 1]; None for a network that takes the image alone.
        levels: Budget that both were trained at.
        bound: How the network's output was bounded in training.
    """

    universal: Tensor | None

    def __init__(
        self,
        network: GeneratorNetwork,
        universal: Tensor | None,
        levels: float = _LEVELS,
        bound: Bound = "tanh",
    ) -> None:
        super().__init__()
        if bound not in get_args(Bound):
            raise ConfigError(f"`bound` must be one of {', '.join(get_args(Bound))}, got {bound!r}")
        if not levels > 0:
            raise ConfigError(f"`levels` must be above 0, got {levels}")
        if universal is None and network.channels == 6:
            raise ConfigError("a network of 6 channels takes a universal perturbation; pass one")
        self.network = network.to(memory_format=torch.channels_last)
        self.levels, self.bound, self.multiple = levels, bound, network.multiple
        self.register_buffer(UNIVERSAL, universal)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from a file of ours, or from the authors' with P-Pert `joined` to it.

        The card's `[config]` may set `network` ("resnet", "unet", "transformer"), `levels`,
        `bound`, and what the network's constructor takes; a ResNet's sizes are read from the file.

        Raises:
            WeightsError: The file is damaged or of another network, or lacks its perturbation.
        """
        state = read_state_dict(source)
        universal = state.pop(UNIVERSAL, None)
        config = dict(card.config)
        kind = config.pop("network", "resnet")
        levels, bound = config.pop("levels", _LEVELS), config.pop("bound", "tanh")
        if kind not in NETWORKS:
            raise WeightsError(
                f"card {card.name!r}: `network` must be one of {', '.join(NETWORKS)}, got {kind!r}"
            )
        if kind == "resnet":
            state = {_renamed(key): value for key, value in state.items()}
            config = _sizes(state, card.name) | config
        network = build(NETWORKS[kind], replace(card, config=config))
        load_strictly(network, state, card.name)
        try:
            return cls(network, universal, levels, bound)
        except (ConfigError, TypeError) as error:
            raise WeightsError(
                f"the weights of {card.name!r} cannot be used: {error}; the authors' generator and "
                "P-Pert are two files, which `shields.models.idguard.joined` makes one"
            ) from error

    def universal_perturbation(self, size: tuple[int, int], *, levels: float) -> Perturbation:
        """The perturbation that fits all photos: (1, 3, *size), image units, inside `levels`.

        Raises:
            ConfigError: There is none in these weights.
        """
        if self.universal is None:
            raise ConfigError(f"the generator {self.name!r} has no universal perturbation")
        reach = self.levels / 255
        native = (self.universal[None].float() / 2).clamp(-reach, reach)
        resized = functional.interpolate(native, size=size, mode="bilinear", align_corners=False)
        return resized * (levels / self.levels)

    def _generate(self, image: Image, levels: float, rng: torch.Generator) -> Perturbation:
        features = unit_range_to_signed(image)
        if self.network.channels == 6:
            size = (image.shape[2], image.shape[3])
            # As in training, whatever the budget asked for.
            prior = 2 * self.universal_perturbation(size, levels=self.levels)
            features = torch.cat([features, prior.expand_as(image)], dim=1)
        made = bounded(self.network(features), self.levels, self.bound)
        return made * (levels / self.levels)


def _renamed(key: str) -> str:
    """Name a ResNet's tensor as ours: its places in the trunk and in its block are what counts."""
    *path, leaf = key.split(".")
    places = [part for part in path if part.isdigit()]
    return ".".join([*(f"main.{place}" for place in places), leaf])


def _sizes(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """Constructor arguments of a ResNet, from its tensors."""
    stem = state.get("main.1.weight")
    if stem is None or stem.ndim != 4:
        raise WeightsError(f"the weights of {name!r} are not those of ID-Guard's ResNet")
    blocks = sum(key.endswith(".main.1.weight") for key in state)
    return {"width": stem.shape[0], "channels": stem.shape[1], "blocks": blocks}
