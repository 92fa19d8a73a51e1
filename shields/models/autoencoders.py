"""Autoencoders behind the contract: the embedded one and the tiny FLUX.2 one.

Those of diffusers are in `shields.models.diffusion`, so that these two load without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from shields.errors import WeightsError
from shields.models.base import Autoencoder
from shields.models.networks import PortraitAutoencoder, Taef2
from shields.types import Image
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["PortraitAutoencoderModel", "Taef2Model", "stages"]


def stages(layers: nn.Sequential, image: Tensor) -> tuple[Tensor, ...]:
    """Run an encoder and keep what enters each halving and the last layer, shallow to deep."""
    maps = []
    features = image
    last = len(layers) - 1
    for index, layer in enumerate(layers):
        halving = isinstance(layer, nn.Conv2d) and layer.stride[0] > 1
        if halving or index == last:
            maps.append(features)
        features = layer(features)
    return tuple(maps)


class _PairAutoencoder(Autoencoder):
    """A network with `encoder` and `decoder` that takes and gives [0, 1] at an eighth."""

    def __init__(self, network: Taef2 | PortraitAutoencoder) -> None:
        super().__init__()
        # Channels last: a third faster on CPUs, and what tensor cores want.
        self.network = network.to(memory_format=torch.channels_last)
        self.freeze()

    def _encode(self, image: Image) -> Tensor:
        latent: Tensor = self.network.encoder(image)
        return latent

    def _decode(self, latent: Tensor) -> Image:
        image: Tensor = self.network.decoder(latent)
        return image

    def features(self, image: Image) -> tuple[Tensor, ...]:
        """Feature maps of the encoder, shallow to deep; sides must be multiples of 8."""
        return stages(self.network.encoder, image)


class PortraitAutoencoderModel(_PairAutoencoder):
    """The embedded default: small, fast on a CPU, latents like those of FLUX.2's autoencoder."""

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build the network from the card's `[config]` and fill it from a weights file."""
        network = build(PortraitAutoencoder, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network)


class Taef2Model(_PairAutoencoder):
    """The tiny autoencoder for FLUX.2's latents, distilled by others."""

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load one file with both halves, or the published pair of files.

        Args:
            source: A file with keys `encoder.*` and `decoder.*`, or with those of the file on
                Hugging Face; or a folder with one file of each half, `encoder` and `decoder` in
                their names; or one of these two.
            card: The card, for its name and settings.
        """
        network = build(Taef2, card)
        pair = _pair(source)
        if pair is None:
            load_strictly(network, _indexed(read_state_dict(source)), card.name)
        else:
            for half, path in zip((network.encoder, network.decoder), pair, strict=True):
                load_strictly(half, read_state_dict(path), f"{card.name} ({path.name})")
        return cls(network)


def _indexed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn `decoder.layers.0.weight` into `decoder.1.weight`: there the clamp is no layer."""
    if not all(key.startswith(("encoder.layers.", "decoder.layers.")) for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        half, _, index, rest = key.split(".", 3)
        renamed[f"{half}.{int(index) + (half == 'decoder')}.{rest}"] = value
    return renamed


def _pair(source: Path) -> tuple[Path, Path] | None:
    """Find the two halves; None where one file holds both."""
    if source.is_dir():
        found = [
            sorted(path for path in source.iterdir() if half in path.name and path.is_file())
            for half in ("encoder", "decoder")
        ]
        if any(len(paths) != 1 for paths in found):
            names = [path.name for paths in found for path in paths]
            raise WeightsError(
                f"{source} must hold one file named …encoder… and one named …decoder…, "
                f"found {', '.join(names) or 'neither'}"
            )
        return found[0][0], found[1][0]
    for here, other in (("encoder", "decoder"), ("decoder", "encoder")):
        if here in source.name and other not in source.name:
            sibling = source.with_name(source.name.replace(here, other))
            if not sibling.is_file():
                raise WeightsError(f"{source.name} is half an autoencoder and lacks {sibling}")
            return (source, sibling) if here == "encoder" else (sibling, source)
    return None
