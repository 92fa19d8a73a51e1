"""Recognizers behind the contract: the embedded one, MobileFaceNet, and facenet-pytorch's."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from shields.models.base import Recognizer
from shields.models.networks import FaceEmbedder, MobileFaceNet
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["FaceEmbedderModel", "FaceNetModel", "MobileFaceNetModel"]

Points = tuple[tuple[float, float], ...]

#: the five points that ArcFace's followers align to, in a crop 96 wide and 112 high
_TIGHT: Points = (
    (30.2946, 51.6963), (65.5318, 51.5014), (48.0252, 71.7366), (33.5493, 92.3655),
    (62.7299, 92.2041),
)  # fmt: skip

#: where the five points fall in the crops FaceNet was trained on: MTCNN's box, 44 pixels wider and
#: higher, squeezed to 182 x 182, the middle 160 x 160 of it. Mean over 50 LFW photos, mirrored.
_LOOSE: Points = (
    (52.4, 65.2), (107.6, 65.2), (80.0, 92.7), (54.9, 113.9), (105.1, 113.9),
)  # fmt: skip


class _Model(Recognizer):
    """A network that takes (levels - 127.5) / 128, and the landmarks of its crop."""

    POINTS: ClassVar[Points]

    def __init__(self, network: nn.Module, threshold: float | None) -> None:
        super().__init__()
        # Channels last: a third faster on CPUs, and what tensor cores want.
        self.network = network.to(memory_format=torch.channels_last)
        self.threshold = threshold
        self.register_buffer("template", torch.tensor(self.POINTS), persistent=False)
        self.freeze()

    @staticmethod
    def _native(face: Image) -> Tensor:
        return (face * 255 - 127.5) / 128

    def _embed(self, face: Image) -> Tensor:
        embedding: Tensor = self.network(self._native(face))
        return embedding


def _threshold(card: Card) -> float | None:
    """The cosine threshold as measured, or as a trainer of ours logged it."""
    value = card.results.get("threshold", card.results.get("val_threshold"))
    return None if value is None else float(value)


def _through(layers: list[nn.Module], keep: set[int], features: Tensor) -> tuple[Tensor, ...]:
    """Run layers up to the last one wanted, and keep what comes out of some."""
    maps = []
    for index, layer in enumerate(layers[: max(keep) + 1]):
        features = layer(features)
        if index in keep:
            maps.append(features)
    return tuple(maps)


class MobileFaceNetModel(_Model):
    """MobileFaceNet, 128 numbers; its feature maps come from four resolutions."""

    crop_size = (112, 96)
    POINTS = _TIGHT
    network: MobileFaceNet

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from a weights file."""
        network = build(MobileFaceNet, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network, _threshold(card))

    def features(self, face: Image) -> tuple[Tensor, ...]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16; any size above 16 pixels."""
        layers = [self.network.conv1, self.network.dw_conv1, *self.network.blocks]
        last = 1
        ends = set()
        for _, _, repeats, stride in MobileFaceNet.STAGES:
            if stride > 1:  # the layer before is the last one of its resolution
                ends.add(last)
            last += repeats
        return _through(layers, {*ends, last}, self._native(face))


class FaceEmbedderModel(_Model):
    """The embedded default, 128 numbers, distilled from MobileFaceNet."""

    crop_size = (112, 96)
    POINTS = _TIGHT
    network: FaceEmbedder

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build the network from the card's `[config]` and fill it from a weights file."""
        network = build(FaceEmbedder, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network, _threshold(card))

    def features(self, face: Image) -> tuple[Tensor, ...]:
        """Feature maps of the stages, each at half the resolution of the one before; any size."""
        layers = list(self.network.stages)
        return _through(layers, set(range(len(layers))), self._native(face))


class FaceNetModel(_Model):
    """facenet-pytorch's InceptionResnetV1, 512 numbers.

    Source:
        FaceNet (Schroff, Kalenichenko, Philbin, 2015), https://arxiv.org/abs/1503.03832;
        weights of David Sandberg, converted by Tim Esler, https://github.com/timesler/facenet-pytorch.

    Differs:
        The face is turned and scaled onto five points, where training squeezed a detector's box
        into a square; the points are the mean ones of such squeezed boxes.
    """

    crop_size = (160, 160)
    POINTS = _LOOSE

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Fill the network from a published weights file; its classifier is left out."""
        from facenet_pytorch import InceptionResnetV1

        network = build(InceptionResnetV1, card)
        state = read_state_dict(source)
        kept = {key: value for key, value in state.items() if not key.startswith("logits.")}
        load_strictly(network, kept, card.name)
        return cls(network, _threshold(card))

    def features(self, face: Image) -> tuple[Tensor, ...]:
        """Feature maps after the stem and its three stages; sides of 75 pixels or more."""
        names = (
            "conv2d_1a", "conv2d_2a", "conv2d_2b", "maxpool_3a", "conv2d_3b", "conv2d_4a",
            "conv2d_4b", "repeat_1", "mixed_6a", "repeat_2", "mixed_7a", "repeat_3",
        )  # fmt: skip
        layers = [getattr(self.network, name) for name in names]
        return _through(layers, {2, 7, 9, 11}, self._native(face))
