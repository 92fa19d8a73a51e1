"""What is made to remove perturbations: the contract of purifiers, the table, and `load`.

A purifier sees the protected image and nothing else, least of all the clean photo. What it needs
to know is its config, a frozen dataclass whose fields can be written as text:
`load("median:5", …)`, `load("vae:taef2", …)`, `load("diffpure:steps=50", …)`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, final

import numpy as np
import torch

from robustness.settings import check_settings, read_settings
from shields.errors import ImageError
from shields.registry import Registry
from shields.types import Image, Photo, check_image

if TYPE_CHECKING:
    from shields.weights import WeightStore

__all__ = ["PURIFIERS", "Purifier", "PurifierConfig", "load"]


@dataclass(frozen=True, kw_only=True)
class PurifierConfig:
    """Settings of a purifier: numbers, truth values and words, each with a default.

    The field that stands first can be given without its name (`median:5`), so it is the strength,
    or the network where there is one.
    """

    #: field -> smallest and largest value that makes sense
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        check_settings(self, self.limits)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `type(config)(**config.to_dict()) == config`."""
        return dataclasses.asdict(self)


class Purifier(ABC):
    """Protected image in, purified image of the same size out; a subclass writes `_purify`."""

    #: the method's config class
    Config: ClassVar[type[PurifierConfig]] = PurifierConfig
    #: where the method is described
    paper: ClassVar[str] = ""

    def __init__(self, config: PurifierConfig | None = None) -> None:
        self.config = self.Config() if config is None else config

    # A subclass knows its own config's class; to mypy that narrows the parameter.
    @classmethod
    def load(cls, config: Any, *, store: WeightStore, device: torch.device) -> Self:  # noqa: ANN401
        """Build the purifier, with the networks that its config names where it runs any."""
        return cls(config)

    @abstractmethod
    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        """(B, 3, H, W), [0, 1] -> the same shape, about [0, 1].

        What is drawn, is drawn from `rng` (on the CPU) for one image and shared by the batch, so
        that a batch gives what its images give one by one.
        """

    @final
    def purify(self, image: Image, *, seed: int = 0) -> Image:
        """Purify (B, 3, H, W), [0, 1]: same shape, same range, same device.

        Args:
            image: Protected images; nothing else is known of them.
            seed: Of everything random; equal seeds give equal results.

        Raises:
            ImageError: The input has the wrong shape, type or range, or the result is not finite.
        """
        check_image(image)
        result = self._purify(image, torch.Generator().manual_seed(seed))
        assert result.shape == image.shape, f"{type(self).__name__} changed the size"
        if not result.isfinite().all():
            raise ImageError(
                f"{type(self).__name__} gave values that are not finite; run it in float32, or "
                "with fewer steps"
            )
        return result.clamp(0, 1)

    def apply(
        self, pixels: np.ndarray, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> np.ndarray:
        """Purify one photo as an attack does: (H, W, 3) uint8 -> the same size, rounded.

        Args:
            pixels: (H, W, 3) uint8; left as it is.
            seed: Of everything random.
            device: Where the purifier's networks are.
        """
        image = Photo(pixels=pixels).image(device)
        with torch.no_grad():
            levels = (self.purify(image, seed=seed)[0] * 255).round().to(torch.uint8)
        return levels.permute(1, 2, 0).cpu().numpy()


#: in the order in which they are listed
PURIFIERS: Registry[type[Purifier]] = Registry(
    "purifier",
    {
        "median": "robustness.purifiers.classical:Median",
        "bilateral": "robustness.purifiers.classical:Bilateral",
        "gaussian": "robustness.purifiers.classical:Gaussian",
        "adverse-cleaner": "robustness.purifiers.classical:AdverseCleaner",
        "tv": "robustness.purifiers.classical:TotalVariation",
        "noise-upscale": "robustness.purifiers.classical:NoiseUpscale",
        "vae": "robustness.purifiers.classical:RoundTrip",
        "diffpure": "robustness.purifiers.diffusion:DiffPure",
        "diffpure-fast": "robustness.purifiers.diffusion:DiffPureFast",
        "gridpure": "robustness.purifiers.diffusion:GridPure",
        "freqpure": "robustness.purifiers.diffusion:FreqPure",
        "impress": "robustness.purifiers.impress:Impress",
        "super-resolution": "robustness.purifiers.super_resolution:SuperResolution",
        "tip-rsr": "robustness.purifiers.tip_rsr:TipRsr",
        "adaptive": "robustness.purifiers.adaptive:Adaptive",
    },
)


def load(text: str, *, store: WeightStore, device: torch.device) -> Purifier:
    """Build a purifier from its name and settings, as in "median:5" or "vae:taef2".

    Args:
        text: `name`, `name:first` or `name:key=value,key=value`.
        store: Where weights are looked for.
        device: Where networks are put.

    Raises:
        UnknownName: There is no such purifier.
        ConfigError: It has no such setting, or the value makes no sense.
        WeightsError: A network's weights are absent.
    """
    name, _, settings = text.strip().partition(":")
    kind = PURIFIERS[name]
    return kind.load(read_settings(kind.Config, settings, name), store=store, device=device)
