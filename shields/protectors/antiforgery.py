"""Anti-Forgery: disrupt a manipulator by colour alone, in the a and b channels of CIE Lab.

Source:
    Anti-Forgery: Towards a Stealthy and Robust DeepFake Disruption Attack via Adversarial
    Perceptual-aware Perturbations (Wang, Huang, Chen, Liu, Chen, Wang, 2022),
    https://arxiv.org/abs/2206.00477; code https://github.com/AbstractTeen/AntiForgery.

    Maximise mean (G(x', c) - G(x, c))^2, the conditions c by turns, by Adam over offsets of a and b
    of at most 0.05 x 110 units; the lightness L stays as it is.

Differs:
    Ours keeps to a budget in levels of RGB, which paper and code have not: the change of a pixel is
    shortened, all three channels alike, to fit it, in every step, and clamped to the valid range.
    Ours starts at random offsets, as the objective has gradient zero at the photo itself and Adam
    would follow the rounding errors of the way to Lab and back, as the code's does.
    Ours takes steps that can reach the bound; the code's 100 steps of 0.0001 get to a fifth of it.
    `paper` takes as many of the code's steps as it needs.
    `faithful` is the code: no RGB bound, from the photo on, colours clipped from below only while
    it climbs. What it returns is clamped to the valid range all the same.
    Steps are in levels of the a and b axes: 255 of them span 220 units, -110 to 110.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from shields.budget import Budget
from shields.errors import ConfigError
from shields.pgd import Update, pgd
from shields.protectors.disrupting import Disrupting, DisruptingConfig
from shields.types import Image, Mask, Perturbation, Progress, Step

__all__ = ["AntiForgery", "AntiForgeryConfig", "from_lab", "to_lab"]

#: linear sRGB -> CIE XYZ under D65 (IEC 61966-2-1); the sums of its rows are the white point
_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
#: where Lab's cube root turns into a line, and the line: slope and intercept
_EDGE, _SLOPE, _INTERCEPT = (6 / 29) ** 3, (29 / 6) ** 2 / 3, 4 / 29
#: half the length of an axis of a or b, in units
_REACH = 110.0


def _matrix(rows: Tensor, image: Tensor) -> Tensor:
    # Not a matrix product, which would run in half precision inside the loop's autocast.
    return (rows.to(image)[:, :, None, None] * image[:, None]).sum(dim=2)


def _white(image: Tensor) -> Tensor:
    return image.new_tensor(_TO_XYZ).sum(dim=1).view(3, 1, 1)


def to_lab(image: Image) -> Tensor:
    """Convert (B, 3, H, W), sRGB, [0, 1] to CIE Lab under D65: L in [0, 100], a and b in units.

    Example:
        >>> to_lab(torch.ones(1, 3, 1, 1)).flatten()[0].item()
        100.0
    """
    steep = ((image.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4
    linear = torch.where(image > 0.04045, steep, image / 12.92)
    share = _matrix(torch.tensor(_TO_XYZ), linear) / _white(image)
    root = share.clamp_min(_EDGE) ** (1 / 3)
    x, y, z = torch.where(share > _EDGE, root, _SLOPE * share + _INTERCEPT).unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def from_lab(lab: Tensor) -> Tensor:
    """Convert (B, 3, H, W), CIE Lab under D65, to sRGB; not clamped where the colour is none."""
    y = (lab[:, 0] + 16) / 116
    root = torch.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], dim=1)
    share = torch.where(root > 6 / 29, root**3, (root - _INTERCEPT) / _SLOPE)
    inverse = torch.tensor(_TO_XYZ, dtype=torch.float64).inverse()
    linear = _matrix(inverse, share * _white(lab))
    steep = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, steep, 12.92 * linear)


def _to_axes(lab: Tensor) -> Tensor:
    """L, a, b -> the same on axes of [0, 1], on which the loop can walk."""
    return torch.cat([lab[:, :1] / 100, (lab[:, 1:] / _REACH + 1) / 2], dim=1)


def _from_axes(axes: Tensor) -> Tensor:
    return torch.cat([axes[:, :1] * 100, (axes[:, 1:] * 2 - 1) * _REACH], dim=1)


@dataclass(frozen=True, kw_only=True)
class AntiForgeryConfig(DisruptingConfig):
    """Anti-Forgery; `levels` bounds the change in RGB, `chroma` that in Lab."""

    #: Adam's learning rate, in levels of the a and b axes (0.863 units)
    step: float = 1.0
    #: Adam, as the code has it
    update: Update = "adam"
    #: largest change of a and of b, in units of Lab
    chroma: float = 5.5
    #: do as the official code does: no bound in RGB, colours clipped from below only
    as_coded: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.chroma <= _REACH:
            raise ConfigError(f"`chroma` must lie in (0, {_REACH:g}] units, got {self.chroma}")
        if self.space != "pixel":
            raise ConfigError('Anti-Forgery walks in Lab; it needs `space="pixel"`')

    @classmethod
    def paper(cls) -> Self:
        """Offsets of 0.05 x 110 units, no bound in RGB, enough steps of 0.0001 to get there."""
        return cls(norm="none", step=0.01275, steps=500)

    @classmethod
    def faithful(cls) -> Self:
        """What the official code computes: 100 such steps from the photo on."""
        return cls(norm="none", step=0.01275, steps=100, start="zero", as_coded=True)


class AntiForgery(Disrupting):
    """Disrupt a manipulator by a change of colour that leaves the lightness alone."""

    Config = AntiForgeryConfig
    paper = "https://arxiv.org/abs/2206.00477"
    config: AntiForgeryConfig

    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        """Walk on the a and b axes with the shared loop."""
        if not self.config.levels:
            return torch.zeros_like(image)
        objective = self.objective(image, mask, landmarks=landmarks, rng=rng)
        handle = self.transform()
        axes = _to_axes(to_lab(image))

        def value(view: Tensor, step: Step) -> Tensor:
            shown = self._painted(view, image, mask)
            if self.config.rounding:
                shown = shown + ((shown * 255).round() / 255 - shown).detach()
            return objective(shown if handle is None else handle(shown, step.rng), step)

        offset = pgd(
            axes,
            value,
            Budget(levels=self.config.chroma / (2 * _REACH) * 255),
            # Rounding belongs to RGB, see above; on the axes there is nothing to round.
            dataclasses.replace(self.config, rounding=False),
            mask=torch.cat([torch.zeros_like(mask), mask, mask], dim=1),
            rng=rng,
            progress=progress,
        )
        return self._painted(axes + offset, image, mask) - image

    def _painted(self, axes: Tensor, image: Image, mask: Mask) -> Image:
        """Back to RGB, (B, 3, H, W), inside the budget unless the code's way is asked for."""
        if self.config.as_coded:
            return from_lab(_from_axes(axes)).clamp_min(0)
        change = from_lab(_from_axes(axes)) - image
        budget = self.config.budget
        if budget.norm != "linf":
            return image + budget.project(change, *budget.bounds(image, mask))
        # Shortened, not clipped: a clipped channel would bend the colour and move the lightness.
        excess = change.abs() / (budget.epsilon * mask).clamp_min(1e-9)
        change = change / excess.amax(dim=1, keepdim=True).clamp_min(1)
        return (image + change).clamp(0, 1)
