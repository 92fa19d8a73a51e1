"""What happens to a photo after it was saved: attacks and purifiers, one after another, as text.

`jpeg:75+tip-rsr` is JPEG first, then a purifier. A link is an attack of `robustness.attacks` or,
where none has that name, a purifier of `robustness.purifiers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from robustness.attacks import ATTACKS, Attack
from robustness.purifiers import PURIFIERS, Purifier
from robustness.purifiers import load as load_purifier
from robustness.settings import read_settings, write_settings
from shields.errors import ConfigError, UnknownName
from shields.registry import did_you_mean

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = ["Handling", "check", "load"]


@dataclass(frozen=True)
class Handling:
    """Attacks and purifiers in the order in which a photo meets them; it never sees a clean photo.

    Example:
        >>> from shields.weights import WeightStore
        >>> handling = load("jpeg+resize", store=WeightStore(), device=torch.device("cpu"))
        >>> handling.apply(np.zeros((64, 48, 3), np.uint8)).shape
        (32, 24, 3)
        >>> str(handling)
        'jpeg:75+resize:0.5'
    """

    links: tuple[Attack | Purifier, ...]
    #: as it is written in full
    text: str
    #: where the purifiers' networks are
    device: torch.device

    def __str__(self) -> str:
        return self.text

    def apply(self, pixels: np.ndarray, *, seed: int = 0) -> np.ndarray:
        """Handle a photo, (H, W, 3) uint8 -> (H', W', 3) uint8.

        Args:
            pixels: As saved; left as it is.
            seed: Of all draws. A single link takes it as it is, several get one each made of it.
        """
        rng = np.random.default_rng(seed)
        for link in self.links:
            own = seed if len(self.links) == 1 else int(rng.integers(2**31))
            if isinstance(link, Purifier):
                pixels = link.apply(pixels, seed=own, device=self.device)
            else:
                pixels = link.apply(pixels, seed=own)
        return pixels


def _split(text: str) -> list[tuple[str, str]]:
    """Name and settings of every link; the names are known."""
    links = []
    for part in text.split("+"):
        name, _, settings = part.strip().partition(":")
        if not name:
            raise ConfigError(
                f"an attack is missing in {text!r}; write one after another as jpeg:75+resize:0.5"
            )
        if name not in ATTACKS and name not in PURIFIERS:
            hint = did_you_mean(name, [*ATTACKS, *PURIFIERS])
            raise UnknownName(f"no attack or purifier is called {name!r}; {hint}")
        links.append((name, settings))
    return links


def check(text: str) -> None:
    """Find out whether a text can be read, without loading a network.

    Raises:
        UnknownName: No attack and no purifier has that name.
        ConfigError: A setting that it does not have, or a value that makes no sense.
        MissingPackage: A purifier's package is not installed.
    """
    for name, settings in _split(text):
        kind = ATTACKS[name] if name in ATTACKS else PURIFIERS[name].Config
        read_settings(kind, settings, name)


def load(
    text: str,
    *,
    store: WeightStore,
    device: torch.device,
    purifier: Callable[[str], Purifier] | None = None,
) -> Handling:
    """Build a handling from its text, with the networks of its purifiers.

    Args:
        text: Links joined by `+`, the first first: `name`, `name:first`, `name:key=value,…`.
        store: Where weights are looked for.
        device: Where networks are put.
        purifier: Makes a purifier from its text; for callers that share one between chains.

    Raises:
        UnknownName: No attack and no purifier has that name.
        ConfigError: A setting that it does not have, or a value that makes no sense.
        WeightsError: A purifier's weights are absent.
    """
    links: list[Attack | Purifier] = []
    texts: list[str] = []
    make = purifier or (lambda link: load_purifier(link, store=store, device=device))
    for name, settings in _split(text):
        if name in ATTACKS:
            attack = read_settings(ATTACKS[name], settings, name)
            links.append(attack)
            texts.append(str(attack))
        else:
            link = make(f"{name}:{settings}" if settings else name)
            own = write_settings(link.config)
            links.append(link)
            texts.append(f"{name}:{own}" if own else name)
    return Handling(tuple(links), "+".join(texts), device)
