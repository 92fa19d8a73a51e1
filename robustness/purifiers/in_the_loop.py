"""Purifiers in a protector's loop: what a defender reaches who knows the attacker's purifier.

A protector of `shields` averages its objective over transforms. Here a purifier becomes one:

    protector.handling = against(purifier)      # beside `config.hardened()`

and is then judged like any other, with the purifier and without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from robustness.purifiers import Purifier
from shields.codec import Seeded, carry
from shields.errors import ConfigError
from shields.transforms import ROBUST, OneOf, Transform
from shields.types import Image

__all__ = ["PurifierTransform", "against"]

Gradient = Literal["straight", "real"]


@dataclass(frozen=True, kw_only=True)
class PurifierTransform(Seeded):
    """A purifier as a transform; what it draws, it draws anew each time.

    Its value is the purifier's, always. The gradient is "real", through the purifier's networks,
    which run a second time in the backward pass in place of being kept; or "straight", passed on as
    if nothing had happened: far cheaper, and the only way through a purifier without a gradient.

    Source:
        Obfuscated Gradients Give a False Sense of Security (Athalye, Carlini, Wagner, 2018),
        https://arxiv.org/abs/1802.00420: "straight" is its backward pass by the identity.
    """

    purifier: Purifier
    gradient: Gradient = "real"

    choices: ClassVar = {"gradient": Gradient}

    def apply(self, image: Image, *, seed: float = 0) -> Image:
        """Purify (B, 3, H, W).

        Raises:
            ConfigError: The gradient should be real, and the purifier has none.
        """
        # Sums of a photo and its perturbation may leave the range by a rounding error.
        image = image.clamp(0, 1)
        wanted = image.requires_grad and torch.is_grad_enabled()
        if wanted and self.gradient == "straight":
            with torch.no_grad():
                value = self.purifier.purify(image.detach(), seed=int(seed))
            return carry(value, image)
        purified = self.purifier.purify(image, seed=int(seed))
        if wanted and not purified.requires_grad:
            name = type(self.purifier).__name__
            raise ConfigError(f'no gradient passes through {name}; take gradient="straight"')
        return purified


def against(*purifiers: Purifier, gradient: Gradient = "real", share: float = 0.5) -> Transform:
    """What a protector averages over to withstand purifiers and everyday handling.

    Args:
        purifiers: Each as often as any other.
        gradient: See `PurifierTransform`.
        share: How often a purifier comes instead of what `--robust` averages over, [0, 1].

    Raises:
        ConfigError: No purifier, or a share outside [0, 1].
    """
    if not purifiers or not 0 <= share <= 1:
        raise ConfigError(
            f"needed are purifiers and a `share` in [0, 1], got {len(purifiers)} and {share}"
        )
    # Flat, so that draws can be spread over all of it.
    rest = (1 - share) / sum(ROBUST.weights)
    return OneOf(
        *ROBUST.members,
        *(PurifierTransform(purifier=purifier, gradient=gradient) for purifier in purifiers),
        weights=(
            *(rest * weight for weight in ROBUST.weights),
            *(share / len(purifiers) for _ in purifiers),
        ),
    )
