"""The networks of the learned baselines, where no other generator's will do: TAFIM and CMUA.

Source:
    TAFIM: Targeted Adversarial Attacks against Facial Image Manipulations (Aneja, Markhasin,
    Niessner, 2022), https://arxiv.org/abs/2112.09151.
    CMUA-Watermark: A Cross-Model Universal Adversarial Watermark for Combating Deepfakes (Huang et
    al., 2022), https://arxiv.org/abs/2105.10872.

Differs:
    TAFIM's network is the U-Net that ARS uses here, so that the two are compared by what they were
    trained for: GroupNorm instead of instance norm, no dropout, a plain layer and tanh at the end.
    TAFIM has no budget; what it makes is cut off at the one that is asked for.
    A watermark is resized bilinearly to the photo, and scaled where the budget is not the trained
    one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import WeightsError
from shields.models.ars_network import UNet
from shields.models.base import unit_range_to_signed
from shields.models.generators import Generator
from shields.models.idguard import UNIVERSAL
from shields.types import Image, Perturbation
from shields.weights import Card, build, load_strictly, read_state_dict

__all__ = ["TafimModel", "TafimNetwork", "UniversalModel"]


class TafimNetwork(nn.Module):
    """f on the photo and a noise that is one for all photos, and that noise.

    Args:
        widths: Channels of the U-Net at each resolution.
        size: Side of the noise, pixels.
        levels: Budget at which it is measured and shipped; it bounds nothing here.
    """

    def __init__(
        self, widths: Sequence[int] = (16, 32, 64, 96, 128), size: int = 96, levels: float = 12.75
    ) -> None:
        super().__init__()
        if not levels > 0:
            raise ValueError(f"`levels` must be above 0, got {levels}")
        self.unet = UNet(6, 3, widths)
        # In units of [-1, 1], from where the authors start it.
        self.noise = nn.Parameter(torch.rand(3, size, size))
        self.multiple, self.levels = self.unet.multiple, float(levels)

    def everywhere(self, size: tuple[int, int]) -> Perturbation:
        """The noise at (height, width), bilinear: (1, 3, *size), image units, not bounded."""
        native = self.noise[None] / 2
        if tuple(native.shape[2:]) == size:
            return native
        return functional.interpolate(native, size=size, mode="bilinear", align_corners=False)

    def forward(self, image: Image) -> Perturbation:
        """Make f's perturbation.

        Args:
            image: (B, 3, H, W), [0, 1], sides multiples of `multiple`.

        Returns:
            (B, 3, H, W), image units, nowhere beyond half the range, inside no budget.
        """
        noise = self.everywhere((image.shape[2], image.shape[3])).expand_as(image)
        features = torch.cat([unit_range_to_signed(image), 2 * noise], dim=1)
        return self.unet(features).float().tanh() / 2


class TafimModel(Generator):
    """TAFIM's generator; draws nothing, and is cut off at a budget, not scaled to it."""

    def __init__(self, network: TafimNetwork) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)
        self.levels = network.levels
        self.multiple = max(Generator.multiple, network.multiple)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Build the network from the card's `[config]` and fill it from a weights file."""
        network = build(TafimNetwork, card)
        load_strictly(network, read_state_dict(source), card.name)
        return cls(network)

    def _generate(self, image: Image, levels: float, rng: torch.Generator) -> Perturbation:
        return self.network(image)


class UniversalModel(Generator):
    """One perturbation for every photo, such as the CMUA watermark; no network runs.

    Args:
        universal: (3, S, S), units of [-1, 1].
        levels: Budget that it was trained at.
    """

    multiple = 1
    universal: Tensor

    def __init__(self, universal: Tensor, levels: float) -> None:
        super().__init__()
        self.levels = float(levels)
        self.register_buffer(UNIVERSAL, universal)
        self.freeze()

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Read the perturbation from a file that holds nothing else; the card says its budget.

        Raises:
            WeightsError: The file is damaged or holds something else, or there is no budget.
        """
        state = read_state_dict(source)
        shape = tuple(state[UNIVERSAL].shape) if set(state) == {UNIVERSAL} else ()
        if len(shape) != 3 or shape[0] != 3:
            raise WeightsError(
                f"the weights of {card.name!r} must be one tensor {UNIVERSAL!r} of (3, S, S), got "
                f"{', '.join(f'{key} {tuple(value.shape)}' for key, value in state.items())}"
            )
        levels = card.config.get("levels")
        if isinstance(levels, bool) or not isinstance(levels, int | float) or not levels > 0:
            raise WeightsError(
                f"card {card.name!r}: `levels` in [config] must be a number above 0, got {levels!r}"
            )
        return cls(state[UNIVERSAL], levels)

    def _generate(self, image: Image, levels: float, rng: torch.Generator) -> Perturbation:
        made = functional.interpolate(
            self.universal[None] / 2, size=image.shape[2:], mode="bilinear", align_corners=False
        )
        return (made * (levels / self.levels)).expand_as(image)
