"""The two-way generator of ARS: a basic perturbation, and a robust one that is made from it.

Source:
    Adversarial Robust Safeguard for Evading Deep Facial Manipulation (Guan et al., 2024),
    https://ojs.aaai.org/index.php/AAAI/article/view/27762: Eqs. 2 to 6 and figure 2.

Differs:
    The paper names U-Nets and no sizes; `PAPER` has the widths of the U-Net it cites, `SMALL` fits
    into 6 MB in half precision.
    GroupNorm instead of batch norm, so that a photo's result does not depend on its neighbours.
    The budget is kept by epsilon * tanh; the paper's clip, whose gradient dies outside, is
    `bound="clip"`.
    With `budgets` the network is told its budget, as a fourth channel; the paper trains one each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.models.base import unit_range_to_signed
from shields.models.manipulation import resized
from shields.types import Image, Perturbation

__all__ = ["SCALES", "ArsGenerator", "NoiseEncoder", "UNet"]

Bound = Literal["tanh", "clip"]

#: name -> the settings of `ArsGenerator` that say how large it is
SCALES: Mapping[str, Mapping[str, Any]] = {
    "paper": {"widths": (64, 128, 256, 512, 1024), "encoder": (16, 32, 64, 128, 128)},
    "small": {"widths": (16, 32, 64, 96, 128), "encoder": (8, 16, 32, 64, 64)},
}


def _normalised(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Convolution, norm and ReLU; two channels a group at least, for maps of one pixel."""
    groups = max(1, math.gcd(8, outputs // 2))
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return [convolution, nn.GroupNorm(groups, outputs), nn.ReLU(inplace=True)]


class UNet(nn.Module):
    """(B, inputs, H, W) -> (B, outputs, H, W); sides are multiples of `multiple`.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out, of a plain convolution.
        widths: Channels at each resolution, the full one first, each next half as fine.
    """

    def __init__(self, inputs: int, outputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.multiple = 2 ** (len(widths) - 1)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            before = widths[index - 1] if index else inputs
            first = _normalised(before, width, stride=2 if index else 1)
            self.down.append(nn.Sequential(*first, *_normalised(width, width)))
        self.up = nn.ModuleList(
            nn.Sequential(*_normalised(coarse + fine, fine), *_normalised(fine, fine))
            for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.last = nn.Conv2d(widths[0], outputs, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Down, keeping each resolution, and up again."""
        kept = []
        for stage in self.down:
            image = stage(image)
            kept.append(image)
        features = kept.pop()
        for stage in self.up:
            finer = functional.interpolate(features, scale_factor=2.0, mode="bilinear")
            features = stage(torch.cat([finer, kept.pop()], dim=1))
        return self.last(features)


class NoiseEncoder(nn.Module):
    """g_n, a perturbation of any size -> one vector: (B, 3, H, W) -> (B, channels, 1, 1)."""

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += _normalised(before, width, stride=2)
        self.layers = nn.Sequential(*layers)
        # After the mean over all places nothing is normalised: one value has no variance.
        self.last = nn.Conv2d(widths[-1], channels, 1)

    def forward(self, perturbation: Tensor) -> Tensor:
        """Halve the sides as often as there are widths, then take the mean over all places."""
        return self.last(self.layers(perturbation).mean(dim=(2, 3), keepdim=True))


class ArsGenerator(nn.Module):
    """f, and where it goes both ways g_1, g_n and g_2 behind it.

    Args:
        widths: Channels of the U-Nets f, g_1 and g_2 at each resolution.
        encoder: Channels of g_n at each resolution.
        channels: C, the channels of z = g_1(x) and of the noise embedding n.
        two_way: Without it there is f alone, the paper's "Basic".
        levels: Budget that it is trained at.
        budgets: Budgets between which one chooses at inference, levels; the largest is `levels`.
            Empty for a network that is not told.
        bound: How |perturbation| is kept below the budget.
        side: Images with a longer side are seen at this side, and the perturbation is resized:
            a network knows faces of the size that it was trained on. 0 for any size, pixels.
    """

    def __init__(
        self,
        widths: Sequence[int],
        encoder: Sequence[int],
        channels: int = 128,
        *,
        two_way: bool = True,
        levels: float = 12.75,
        budgets: Sequence[float] = (),
        bound: Bound = "tanh",
        side: int = 0,
    ) -> None:
        super().__init__()
        self.side = side
        if bound not in ("tanh", "clip"):
            raise ValueError(f"`bound` must be tanh or clip, got {bound!r}")
        if budgets and max(budgets) != levels:
            raise ValueError(f"`levels` must be the largest of `budgets`, got {levels}, {budgets}")
        self.levels, self.budgets, self.bound = float(levels), tuple(budgets), bound
        self.multiple = 2 ** (len(widths) - 1)
        inputs = 4 if budgets else 3
        self.basic = UNet(inputs, 3, widths)
        self.stage1 = self.encoder = self.stage2 = None
        if two_way:
            self.stage1 = UNet(inputs, channels, widths)
            self.encoder = NoiseEncoder(channels, encoder)
            self.stage2 = _Fusion(channels, widths)

    def forward(self, image: Image, levels: float) -> tuple[Perturbation, Perturbation]:
        """Make the basic perturbation, and the robust one, which is the same where there is none.

        Args:
            image: (B, 3, H, W), [0, 1], sides multiples of `multiple`.
            levels: Budget of this batch.

        Returns:
            Twice (B, 3, H, W), image units, inside the budget. The robust one has a gradient
            through the basic one; `robust` takes it detached.
        """
        height, width = image.shape[2:]
        if self.side and max(height, width) > self.side:
            share, multiple = self.side / max(height, width), self.multiple
            seen = [max(1, round(side * share / multiple)) * multiple for side in (height, width)]
            made = self(resized(image, (seen[0], seen[1])), levels)
            return resized(made[0], (height, width)), resized(made[1], (height, width))
        basic = self.shape(image, levels)
        final = basic if self.stage2 is None else self.robust(image, basic, levels)
        return basic * (levels / 255), final * (levels / 255)

    def shape(self, image: Image, levels: float) -> Tensor:
        """f: the basic perturbation in units of the budget, (B, 3, H, W), [-1, 1]."""
        return self._bounded(self.basic(self._told(image, levels)))

    def robust(self, image: Image, basic: Tensor, levels: float) -> Tensor:
        """g: from `shape`, the robust perturbation in units of the budget."""
        if self.stage1 is None or self.encoder is None or self.stage2 is None:
            raise ValueError("a network without a second way has no robust perturbation")
        features = self.stage1(self._told(image, levels))
        return self._bounded(self.stage2(features, self.encoder(basic), basic))

    def _told(self, image: Image, levels: float) -> Tensor:
        native = unit_range_to_signed(image)
        if not self.budgets:
            return native
        # Outside of what it was trained on, it is told the nearest budget that it knows.
        known = min(max(levels, min(self.budgets)), self.levels)
        return torch.cat([native, torch.full_like(native[:, :1], known / self.levels)], dim=1)

    def _bounded(self, raw: Tensor) -> Tensor:
        raw = raw.float()
        return torch.tanh(raw) if self.bound == "tanh" else raw.clamp(-1, 1)


class _Fusion(nn.Module):
    """g_2 on the concatenation of z, n repeated at every place, and the basic perturbation.

    Its first layer is 1x1. Such a layer maps a repeated vector to a repeated vector, so the product
    is taken once and added everywhere: the repetition itself is never stored.
    """

    def __init__(self, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels + 3, widths[0], 1)
        self.vector = nn.Conv2d(channels, widths[0], 1, bias=False)
        self.unet = UNet(widths[0], 3, widths)

    def forward(self, features: Tensor, embedding: Tensor, basic: Tensor) -> Tensor:
        """(B, C, H, W), (B, C, 1, 1), (B, 3, H, W) -> (B, 3, H, W)."""
        joined = self.maps(torch.cat([features, basic.to(features)], dim=1))
        return self.unet(torch.relu(joined + self.vector(embedding)))
