"""What may happen to a protected photo while ARS trains: the perturbation module and the Adv Net.

Source:
    Adversarial Robust Safeguard for Evading Deep Facial Manipulation (Guan et al., 2024),
    https://ojs.aaai.org/index.php/AAAI/article/view/27762: Eq. 7 and the text around it.
    HiDDeN: Hiding Data With Deep Networks (Zhu et al., 2018), https://arxiv.org/abs/1807.09937:
    JPEG as a mask over the coefficients of the cosine transform.

Differs:
    The paper gives no strengths; here a share of 0.5 to 1 of the pixels is kept, sides shrink to
    0.5 to 1, blurs have windows of 3 to 9 pixels and deviations of 0.5 to 2, and 10 to 64 of the
    64 coefficients are kept for luma, 5 to 64 for chroma, from the lowest on.
    The Adv Net, of which the paper says nothing, is a U-Net whose result is added to the photo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.codec import TO_YCC, Range, uniform
from shields.models.ars_network import UNet
from shields.models.base import unit_range_to_signed
from shields.transforms import GaussianBlur, OneOf, Resize, Transform
from shields.types import Image

__all__ = ["PAPER", "AdvNet", "CleanDrop", "MaskedDct", "PerturbationModule"]


@dataclass(frozen=True, kw_only=True)
class CleanDrop:
    """Eq. 7: give single pixels back what they were before the protection."""

    #: share of the pixels that stay protected
    keep: Range = (0.5, 1.0)

    def __call__(self, protected: Image, clean: Image, rng: torch.Generator) -> Image:
        """Mix (B, 3, H, W) with the clean ones, every pixel of every photo for itself."""
        shape = (len(protected), 1, *protected.shape[2:])
        kept = torch.rand(shape, generator=rng) < uniform(self.keep, rng)
        return torch.where(kept.to(protected.device), protected, clean)


@dataclass(frozen=True, kw_only=True)
class MaskedDct(Transform):
    """JPEG without its rounding: of every block of 8x8, only the lowest frequencies are kept."""

    #: coefficients of a luma block that are kept, in the order of the zigzag
    luma: Range = (10.0, 64.0)
    #: those of a chroma block
    chroma: Range = (5.0, 64.0)

    limits: ClassVar = {"luma": (1, 64), "chroma": (1, 64)}

    def apply(self, image: Image, *, luma: float, chroma: float) -> Image:
        """Mask the coefficients of (B, 3, H, W); numbers are rounded."""
        batch, _, height, width = image.shape
        padded = functional.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
        to_ycc, basis = image.new_tensor(TO_YCC), _cosines().to(image)
        planes = torch.einsum("kc,bcyx->bkyx", to_ycc, padded)
        blocks = planes.reshape(batch, 3, padded.shape[2] // 8, 8, padded.shape[3] // 8, 8)
        counts = torch.tensor([round(luma), round(chroma), round(chroma)])
        kept = (_zigzag() < counts[:, None, None]).to(image).view(3, 1, 8, 1, 8)
        coefficients = torch.einsum("ua,bkyaxd,vd->bkyuxv", basis, blocks, basis) * kept
        blocks = torch.einsum("ua,bkyuxv,vd->bkyaxd", basis, coefficients, basis)
        colours = torch.einsum("ck,bkyx->bcyx", to_ycc.inverse(), blocks.reshape(planes.shape))
        return colours[..., :height, :width].clamp(0, 1)


@lru_cache(maxsize=1)
def _cosines() -> Tensor:
    """The orthonormal 8-point cosine transform, (frequency, place)."""
    angles = torch.outer(torch.arange(8.0), torch.arange(8.0) + 0.5) * (math.pi / 8)
    scale = torch.tensor([math.sqrt(1 / 8)] + [0.5] * 7)
    return angles.cos() * scale[:, None]


@lru_cache(maxsize=1)
def _zigzag() -> Tensor:
    """When the zigzag reaches each coefficient: (8, 8), 0 to 63."""
    places = [(row, column) for row in range(8) for column in range(8)]
    # Along each diagonal, up where the sum is even and down where it is odd.
    places.sort(key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))
    order = torch.empty(8, 8, dtype=torch.long)
    for turn, at in enumerate(places):
        order[at] = turn
    return order


#: what the paper draws from behind the drop, in its order
PAPER: tuple[Transform, ...] = (
    Resize(scale=(0.5, 1.0), kernel="bilinear"),
    OneOf(*(GaussianBlur(sigma=(0.5, 2.0), window=window) for window in (3, 5, 7, 9))),
    MaskedDct(),
)


@dataclass(frozen=True, kw_only=True)
class PerturbationModule:
    """p: each of its parts with some probability, one after the other."""

    #: the mix with the clean photo; None for none
    drop: CleanDrop | None = CleanDrop()
    parts: Sequence[Transform] = PAPER
    #: how likely each part is
    probability: float = 0.5

    def __call__(self, protected: Image, clean: Image, rng: torch.Generator) -> tuple[Image, Image]:
        """Treat protected photos as the world might.

        Args:
            protected: (B, 3, H, W), [0, 1].
            clean: The same photos before their protection.
            rng: A CPU generator.

        Returns:
            What has become of the protected photos; and the clean ones as they were, but moved to
            the same places where a part moves (rotations, crops). They are `clean` itself where
            none did.
        """
        if self.drop is not None and self._chosen(rng):
            protected = self.drop(protected, clean, rng)
        for part in self.parts:
            if self._chosen(rng):
                strengths = part.draw(rng)
                protected = part.apply(protected, **strengths)
                # Leaves alone what does not move; what it is called for is a mask, but any will do.
                clean = part.apply_mask(clean, **strengths)
        return protected, clean

    def _chosen(self, rng: torch.Generator) -> bool:
        return uniform((0, 1), rng) < self.probability


class AdvNet(nn.Module):
    """q: learns to take the protection out again; leaves a photo alone at first.

    Args:
        widths: Channels of its U-Net at each resolution.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.unet = UNet(3, 3, widths)
        # Not zero: then no layer before the last would hear anything in the first step.
        nn.init.normal_(self.unet.last.weight, std=1e-3)
        assert self.unet.last.bias is not None, "the last layer has one"
        nn.init.zeros_(self.unet.last.bias)

    def forward(self, image: Image) -> Image:
        """(B, 3, H, W), [0, 1], sides multiples of the U-Net's -> the same."""
        return (image + self.unet(unit_range_to_signed(image)).float()).clamp(0, 1)
