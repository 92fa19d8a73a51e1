"""One perturbation for all photos: where it starts, and the parameter that training moves.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, section III-D: the gradient prior
    perturbation, and P-Pert, which becomes of it when it is trained along with the generator.

Differs:
    The paper trains a network of its own that reconstructs faces and attacks that; any autoencoder
    of the registry takes its place.
    Kept inside the budget after every step; the authors' code lets the stored tensor grow and cuts
    it where it is used, and what lies outside has no gradient any more.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.budget import Budget
from shields.errors import ConfigError
from shields.models.base import Autoencoder
from shields.pgd import PgdConfig, pgd
from shields.types import Image, Perturbation, Step

__all__ = ["UniversalPerturbation", "gradient_prior", "random_prior"]


class UniversalPerturbation(nn.Module):
    """A trainable perturbation (1, 3, S, S), image units, inside its budget.

    Args:
        start: (3, S, S) or (1, 3, S, S), image units; what is outside the budget is cut.
        levels: Budget.
    """

    def __init__(self, start: Tensor, levels: float = 6.375) -> None:
        super().__init__()
        if start.ndim not in (3, 4) or start.shape[-3] != 3:
            raise ConfigError(f"`start` must be (3, S, S), got {tuple(start.shape)}")
        self.levels = levels
        self.value = nn.Parameter(start.detach().float().reshape(1, *start.shape[-3:]).clone())
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Bring it back into the budget; call after every step of the optimizer."""
        self.value.clamp_(-self.levels / 255, self.levels / 255)

    def forward(self, size: tuple[int, int]) -> Perturbation:
        """The perturbation at (height, width), bilinear: (1, 3, *size)."""
        if tuple(self.value.shape[2:]) == size:
            return self.value
        return functional.interpolate(self.value, size=size, mode="bilinear", align_corners=False)


def gradient_prior(
    surrogate: Autoencoder,
    batches: Iterable[Image],
    *,
    rng: torch.Generator,
    levels: float = 6.375,
    step: float = 1.275,
    steps: int = 10,
) -> Perturbation:
    """Attack a network that reconstructs faces, and average what that takes over photos.

    Args:
        surrogate: Any autoencoder.
        batches: (B, 3, S, S), [0, 1], of one size each; the paper takes 2000 photos.
        rng: A CPU generator.
        levels: Budget.
        step: Of one update, levels.
        steps: Updates.

    Returns:
        (3, S, S), image units, inside the budget.

    Raises:
        ConfigError: There is no photo.
    """
    walk, budget = PgdConfig(steps=steps, step=step), Budget(levels=levels)
    total, count = torch.zeros(()), 0
    for image in batches:
        with torch.no_grad():
            clean = surrogate.reconstruct(image)

        def distance(view: Image, _: Step, clean: Image = clean) -> Tensor:
            return (2 * (surrogate.reconstruct(view) - clean)).square().mean(dim=(1, 2, 3))

        mask = torch.ones_like(image[:, :1])
        found = pgd(image, distance, budget, walk, mask=mask, rng=rng)
        total, count = total.to(found) + found.sum(dim=0), count + len(found)
    if not count:
        raise ConfigError("a gradient prior needs at least one photo")
    return total / count


def random_prior(size: int, *, rng: torch.Generator, levels: float = 6.375) -> Perturbation:
    """Signs drawn at random, at full budget: (3, size, size), image units."""
    signs = torch.randint(2, (3, size, size), generator=rng) * 2 - 1
    return signs * (levels / 255)
