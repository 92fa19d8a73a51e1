"""Perceptual distances: LPIPS where its backbone is at hand, deep features of our own elsewhere.

Neither stands in for the other silently: each has its own name, and reports show it.

Source:
    The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018),
    https://arxiv.org/abs/1801.03924, version 0.1 of the heads as the `lpips` package ships them.

Differs:
    Features that are zero in all channels have gradient zero, not NaN as in the package.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import WeightsError
from shields.models.base import Frozen, Perceptual, unit_range_to_signed
from shields.types import Image
from shields.weights import Card, load_strictly, read_state_dict

__all__ = ["DeepFeatures", "LpipsModel", "unit_features"]

#: architecture of the card -> the package's name of the backbone
_BACKBONES = {"lpips-vgg": "vgg", "lpips-alex": "alex", "lpips-squeeze": "squeeze"}


@runtime_checkable
class _HasFeatures(Protocol):
    def features(self, image: Image) -> tuple[Tensor, ...]: ...


def unit_features(features: Tensor) -> Tensor:
    """Scale (B, C, H, W) to unit length over the channels."""
    return functional.normalize(features, dim=1, eps=1e-10)


class LpipsModel(Perceptual):
    """LPIPS with a VGG, AlexNet or SqueezeNet backbone."""

    def __init__(self, network: Any) -> None:  # noqa: ANN401  lpips has no types
        super().__init__()
        self.network = network
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the backbone from a file of torchvision's; the heads come with the package."""
        network = _untrained(_BACKBONES[card.architecture])
        load_strictly(network.net, _sliced(read_state_dict(source), network.net), card.name)
        return cls(network)

    @classmethod
    def untrained(cls, backbone: str) -> Self:
        """Build it with a random backbone, for tests: real heads, meaningless distances."""
        return cls(_untrained(backbone))

    def features(self, image: Image) -> tuple[Tensor, ...]:
        """Unit-length feature maps of the backbone's stages; sides of 32 pixels or more."""
        native = self.network.scaling_layer(unit_range_to_signed(image))
        return tuple(unit_features(features) for features in self.network.net(native))

    def distance(self, features: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
        """LPIPS distance (B,), summed over the stages as published."""
        heads = self.network.lins
        gaps = [
            head((ours - theirs).square()).mean((1, 2, 3))
            for head, ours, theirs in zip(heads, features, reference, strict=True)
        ]
        return torch.stack(gaps).sum(0)


def _untrained(backbone: str) -> Any:  # noqa: ANN401  lpips has no types
    from lpips import LPIPS

    # The package asks torchvision in a way that torchvision warns about; nothing is fetched.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)
        return LPIPS(net=backbone, pnet_rand=True, verbose=False)


def _sliced(state: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Rename torchvision's keys: `features.3.weight` is in `slice2.3.weight` or another slice."""
    renamed = {}
    for key in backbone.state_dict():
        source = f"features.{key.partition('.')[2]}"
        if source in state:
            renamed[key] = state[source]
    return renamed


class DeepFeatures(Perceptual):
    """Distance between an autoencoder's or a recognizer's feature maps: needs nothing further.

    Each map has unit length over its channels; the squared difference is averaged over positions
    and maps, so 0 is equal and 4 is opposite. Heads fitted to people's judgement, as LPIPS has, are
    absent: it is a distance of its own, named `features:NAME`.
    """

    def __init__(self, network: Frozen) -> None:
        super().__init__()
        if not isinstance(network, _HasFeatures):
            raise WeightsError(f"{network.name!r} offers no feature maps to measure distances by")
        self.network = network
        self.name = f"features:{network.name}"
        self.freeze()

    def features(self, image: Image) -> tuple[Tensor, ...]:
        """Unit-length feature maps, shallow to deep, of (B, 3, H, W), [0, 1]."""
        multiple = int(getattr(self.network, "multiple", 1))
        bottom, right = (-side % multiple for side in image.shape[2:])
        if bottom or right:
            image = functional.pad(image, (0, right, 0, bottom), mode="replicate")
        assert isinstance(self.network, _HasFeatures), "checked by the constructor"
        return tuple(unit_features(features) for features in self.network.features(image))

    def distance(self, features: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
        """Distance (B,): mean squared difference of unit features, 0 to 4."""
        gaps = [
            (ours - theirs).square().sum(1).mean((1, 2))
            for ours, theirs in zip(features, reference, strict=True)
        ]
        return torch.stack(gaps).mean(0)
