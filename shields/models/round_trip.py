"""An autoencoder, or nothing at all, as a manipulator, and one door for all of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shields.models import load
from shields.models.base import Autoencoder
from shields.models.manipulation import Condition, Manipulator
from shields.types import Image
from shields.weights import Card, WeightStore

__all__ = ["AsItIs", "RoundTrip", "load_manipulator"]


class RoundTrip(Manipulator):
    """An autoencoder as a manipulator: encode and decode, what every latent editor does first."""

    conditions = ("reconstruct",)

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder, self.multiple = autoencoder, autoencoder.multiple
        self.name = autoencoder.name
        self.freeze()

    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        return self.autoencoder.decode(self.autoencoder.encode(image)), None


class AsItIs(Manipulator):
    """Nothing happens to the photo: for whoever looks at it before any manipulation."""

    name, conditions, multiple = "none", ("look",), 1

    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        return image, None


def load_manipulator(name: str, store: WeightStore) -> Manipulator:
    """Load a manipulator, or an autoencoder as one, by the name or path of its card.

    "none" is the photo as it is.

    Raises:
        ConfigError: The card is of another role.
    """
    if name == "none":
        return AsItIs()
    beside = Path(name).with_suffix(".toml")
    role = "manipulator"
    if name in store.names():
        role = store.card(name).role
    elif beside.is_file():
        role = Card.read(beside).role
    cpu = torch.device("cpu")
    if role == "autoencoder":
        return RoundTrip(load("autoencoder", name, store=store, device=cpu))
    return load("manipulator", name, store=store, device=cpu)
