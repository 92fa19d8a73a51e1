"""IMPRESS: look for a photo nearby that an autoencoder reconstructs well.

A clean photo survives an autoencoder's round trip nearly unchanged, one that was protected against
it does not. So the purified photo x minimises, with p the protected one,

    mean (D(E(x)) - x)^2  +  weight * max(distance(x, p) - radius, 0)

Source:
    IMPRESS: Evaluating the Resilience of Imperceptible Perturbations Against Unauthorized Data
    Usage in Diffusion-Based Generative AI (Cao, Li, Wang, Jia, Li, Chen, 2023),
    https://arxiv.org/abs/2310.19248; code https://github.com/AAAAAAsuka/Impress.

Differs:
    Everything is float32; the code runs Adam in float16.
    The start's noise is drawn once and shared by the photos of a batch.
    `keep="best"`, the default, returns for each photo the best of all iterates that lie within the
    perceptual radius, or the one nearest to it where none does; the code returns the last iterate,
    which the penalty alone may leave outside. The presets do as the code does.
    Steps and noise are given in levels; the code's are in [-1, 1], where the round trip's error is
    measured here as well, so that weights mean the same.
    The class default's autoencoder and distance ship with the package, and its 100 steps are ours.
    That distance has another scale than LPIPS: white noise of 8 levels measures 0.01 on a portrait,
    8 levels against that very autoencoder 0.2. The radius keeps its published number.
    No gradient reaches the protected photo: for a protector's loop this purifier is a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from robustness.purifiers import Purifier, PurifierConfig
from robustness.settings import check_settings
from shields.models import load as load_network
from shields.models.base import Autoencoder, Perceptual
from shields.types import Image
from shields.weights import WeightStore

__all__ = ["Impress", "ImpressConfig", "inconsistency"]

_MANY = 10**6
#: the step length at which the published schedules end: 1e-5 in [-1, 1], in levels
_LAST_STEP = 1e-5 * 255 / 2


@dataclass(frozen=True, kw_only=True)
class ImpressConfig(PurifierConfig):
    """IMPRESS; the class default runs on what ships with the package."""

    #: which round trip has to leave the photo alone: a card, folder or id
    autoencoder: str = "portrait-ae"
    #: what measures the distance to the protected photo: likewise, or "features:" and a network
    perceptual: str = "features:portrait-ae"
    #: number of updates
    steps: int = 100
    #: Adam's step at the start, in levels; falls along half a cosine to nearly 0
    step: float = 0.6375
    #: standard deviation of the noise that the start adds, in levels
    noise: float = 6.375
    #: distance that costs nothing
    radius: float = 0.1
    #: of the distance beyond it
    weight: float = 0.01
    #: "best" is the best iterate within the radius, "last" the last one, as published
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        limits = {name: (0.0, float(_MANY)) for name in ("steps", "noise", "radius", "weight")}
        check_settings(self, {**limits, "step": (_LAST_STEP, 255.0)})

    @classmethod
    def photoguard(cls) -> Self:
        """The authors' setting against PhotoGuard, and with it against editors."""
        return cls(
            autoencoder="sd-vae", perceptual="lpips-vgg", steps=1000, step=0.6375, noise=6.375,
            radius=0.1, weight=0.01, keep="last",
        )  # fmt: skip

    @classmethod
    def glaze(cls) -> Self:
        """The authors' setting against Glaze, whose autoencoder is Stable Diffusion 2.1's."""
        return cls(
            autoencoder="sd-vae", perceptual="lpips-vgg", steps=3000, step=1.275, noise=12.75,
            radius=0.1, weight=0.1, keep="last",
        )  # fmt: skip


def inconsistency(autoencoder: Autoencoder, image: Image) -> Tensor:
    """Mean squared error of the round trip, in [-1, 1]: (B, 3, H, W), [0, 1] -> (B,)."""
    height, width = image.shape[2:]
    # Not `reconstruct`, whose clamp would stop gradients.
    again = autoencoder.decode(autoencoder.encode(image))[..., :height, :width]
    return 4 * (again - image).square().mean((1, 2, 3))


class Impress(Purifier):
    """Optimise the photo until the autoencoder leaves it alone."""

    Config = ImpressConfig
    config: ImpressConfig
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.19248"

    def __init__(
        self,
        config: ImpressConfig | None = None,
        *,
        autoencoder: Autoencoder,
        perceptual: Perceptual,
    ) -> None:
        super().__init__(config)
        self.autoencoder, self.perceptual = autoencoder, perceptual

    @classmethod
    def load(cls, config: ImpressConfig, *, store: WeightStore, device: torch.device) -> Self:
        """Load the two networks that the config names."""
        autoencoder = load_network("autoencoder", config.autoencoder, store=store, device=device)
        perceptual = load_network("perceptual", config.perceptual, store=store, device=device)
        return cls(config, autoencoder=autoencoder, perceptual=perceptual)

    def _step(self, index: int) -> float:
        """Adam's step in image units."""
        share = (1 + math.cos(math.pi * index / self.config.steps)) / 2
        return (_LAST_STEP + (self.config.step - _LAST_STEP) * share) / 255

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        if self.config.steps == 0:
            return image
        protected = image.detach()
        with torch.no_grad():
            reference = self.perceptual.features(protected)
        drawn = torch.randn((1, *image.shape[1:]), generator=rng).to(image)
        start = (protected + self.config.noise / 255 * drawn).clamp(0, 1)
        with torch.enable_grad():
            return self._optimise(start.requires_grad_(True), reference)

    def _optimise(self, current: Tensor, reference: tuple[Tensor, ...]) -> Image:
        config = self.config
        optimiser = torch.optim.Adam([current], lr=config.step / 255)
        best = _Best(current)
        for index in range(config.steps + 1):
            error = inconsistency(self.autoencoder, current)
            distance = self.perceptual.distance(self.perceptual.features(current), reference)
            excess = (distance - config.radius).clamp(min=0)
            best.offer(current, error.detach(), excess.detach())
            if index == config.steps:
                break
            optimiser.param_groups[0]["lr"] = self._step(index)
            loss = (error + config.weight * excess).sum()
            (current.grad,) = torch.autograd.grad(loss, current)
            optimiser.step()
            with torch.no_grad():
                current.clamp_(0, 1)
        return best.image if config.keep == "best" else current.detach()


class _Best:
    """For each photo the iterate with the least excess, and among equals the least error."""

    def __init__(self, image: Image) -> None:
        self.image = image.detach().clone()
        self.error = torch.full((len(image),), math.inf, device=image.device)
        self.excess = self.error.clone()

    def offer(self, image: Image, error: Tensor, excess: Tensor) -> None:
        """Keep an iterate where it is better; error and excess are (B,)."""
        better = (excess < self.excess) | ((excess == self.excess) & (error < self.error))
        self.error = torch.where(better, error, self.error)
        self.excess = torch.where(better, excess, self.excess)
        self.image = torch.where(better[:, None, None, None], image.detach(), self.image)
