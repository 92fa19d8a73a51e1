"""Averaged weights: what is validated and shipped follows what is trained."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["follow"]


@torch.no_grad()
def follow(averaged: nn.Module, network: nn.Module, *, done: int, most: float) -> None:
    """Move averaged weights towards a network's; early on they follow faster. Buffers are copied.

    Args:
        averaged: Moved in place.
        network: Of the same layout.
        done: Steps taken so far.
        most: Decay that is reached in the end.
    """
    decay = min(most, (1 + done) / (10 + done))
    for mean, value in zip(averaged.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
    for kept, now in zip(averaged.buffers(), network.buffers(), strict=True):
        kept.copy_(now)
