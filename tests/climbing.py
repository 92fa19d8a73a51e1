"""What the tests of the projected-gradient loop share: a short way to call it, and objectives."""

import torch

from shields.budget import Budget
from shields.pgd import PgdConfig, pgd
from tests import tiny

SIZE = 16


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(seed=1):
    """A linear objective and its slope; its optimum in a box or a ball is known in closed form."""
    slope = torch.randn(1, 3, SIZE, SIZE, generator=generator(seed))
    return slope, lambda view, step: (view * slope).flatten(1).sum(dim=1)


def climb(image, objective, mask, *, levels=8.0, norm="linf", seed=0, **settings):
    names = {"transform": "transform", "given": "start", "progress": "progress"}
    options = {names[name]: settings.pop(name) for name in names if name in settings}
    return pgd(
        image, objective, Budget(levels=levels, norm=norm), PgdConfig(**settings),
        mask=mask, rng=generator(seed), **options,
    )  # fmt: skip


def encoder_objective(image, seed=0):
    network = tiny.autoencoder(seed)
    clean = network.encode(image)
    return lambda view, step: (network.encode(view) - clean).float().square().flatten(1).mean(dim=1)
