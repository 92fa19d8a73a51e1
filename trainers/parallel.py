"""Training by several processes: what they must have in common beside the gradients.

Every process draws the same crops, targets and handling, because the generators are seeded by the
number of the batch, and gets its own share of the photos; so their mean gradient is that of one
process with all the photos. What is computed from photos outside of the backward pass must be
joined by hand, which the functions below do; with one process they return what they were given.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, distributed

__all__ = ["PlayersInTurn", "gathered", "mean_over_processes"]


def _processes() -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """Join tensors (B, ...) of all processes, alike in shape, in their order: (N B, ...)."""
    count = _processes()
    if count == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(count)]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def mean_over_processes(tensor: Tensor) -> Tensor:
    """Average a tensor over all processes; it carries no gradient."""
    count = _processes()
    if count == 1:
        return tensor
    total = tensor.detach().clone()
    distributed.all_reduce(total)
    return total / count


class PlayersInTurn(pl.Callback):
    """Let DDP accept backward passes that reach some of the parameters only.

    A step of one player, or of one of several networks, leaves the others without gradients; DDP
    then waits for ever unless it is told to look for them.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell it, where nothing else was asked for; the processes are not joined yet."""
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # There is no public way: the strategy's own arguments are all that it looks at.
            strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
