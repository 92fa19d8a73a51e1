"""The purifier that knows its opponent: a network trained on what one protector adds.

Source:
    LightShed: Defeating Perturbation-based Image Copyright Protections (Foerster, Behrouzi, Rieger,
    Jadliwala, Sadeghi, 2025),
    https://www.usenix.org/conference/usenixsecurity25/presentation/foerster: a network that
    predicts what one protector adds, which is then subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self, cast

from robustness.purifiers import Purifier, PurifierConfig
from shields.errors import ConfigError
from shields.models import load
from shields.types import Image

if TYPE_CHECKING:
    import torch

    from shields.models.restoration import Restorer
    from shields.weights import WeightStore

__all__ = ["Adaptive", "AdaptiveConfig"]


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig(PurifierConfig):
    """Which network; there is no default, because each knows one protector."""

    #: a card of role "purifier", of a network that `shields train purifier` made
    network: str = ""


class Adaptive(Purifier):
    """Subtract what a network takes for one protector's perturbation: the aware attacker."""

    Config = AdaptiveConfig
    config: AdaptiveConfig
    paper: ClassVar[str] = (
        "https://www.usenix.org/conference/usenixsecurity25/presentation/foerster"
    )

    def __init__(self, restorer: Restorer, config: AdaptiveConfig | None = None) -> None:
        super().__init__(config)
        if restorer.scale != 1:
            raise ConfigError(
                f"{restorer.name!r} enlarges {restorer.scale} times and knows no protector; "
                "`super-resolution` runs it"
            )
        self.restorer = restorer

    @classmethod
    def load(cls, config: AdaptiveConfig, *, store: WeightStore, device: torch.device) -> Self:
        """Load the network that the config names.

        Raises:
            ConfigError: It names none, or one that enlarges.
        """
        if not config.network:
            raise ConfigError(
                "`network` of Adaptive must name what was trained against the protector, as in "
                "adaptive:purifier-ars-latent; `shields train purifier` makes one"
            )
        return cls(_restorer(config.network, store, device), config)

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        return self.restorer.restore(image)


def _restorer(name: str, store: WeightStore, device: torch.device) -> Restorer:
    return cast("Restorer", load("purifier", name, store=store, device=device))
