"""Train an IAP-like generator: forgeries lose the deep features that they had in common.

Source:
    Information-containing Adversarial Perturbation for Combating Facial Manipulation Systems (Zhu
    et al., 2023), https://arxiv.org/abs/2303.11625: the correlation of features in place of a mean
    square. The generator is that of ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349,
    which compares with IAP.

Differs:
    No code of IAP is known, hence the name. Its message and the way that it is spread over
    frequencies are left out: only the half that disrupts is here, as in ID-Guard's tables.
    Features are those of a network that the recipe names; the paper's are not known. Their
    correlation is Pearson's over all places and channels of a map, in the mean over maps.
    Manipulators count alike, whatever they are like.
    The learning rate falls linearly over the second half; averaged weights are what is kept.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError
from shields.models import load
from shields.models.base import unit_range_to_signed
from shields.models.idguard import Bound, bounded
from shields.models.idguard_network import NETWORKS
from shields.registry import did_you_mean
from shields.types import Image, Perturbation
from shields.weights import WeightStore
from trainers.ars_targets import Task, gradient_of
from trainers.disruption_measure import DisruptionTraining

__all__ = ["IapTraining", "correlation"]


def correlation(maps: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
    """Pearson's correlation (B,) of feature maps, the mean over maps; 1 for equal ones."""
    found = []
    for ours, theirs in zip(maps, reference, strict=True):
        flat = [side.float().flatten(1) for side in (ours, theirs)]
        centred = [side - side.mean(dim=1, keepdim=True) for side in flat]
        found.append(functional.cosine_similarity(centred[0], centred[1], dim=1))
    return torch.stack(found).mean(dim=0)


class IapTraining(DisruptionTraining):
    """One generator against manipulators of equal weight.

    Args:
        manipulators: Cards, or addresses of code, of what is disrupted; autoencoders count.
        conditions: Manipulator -> what it is asked for, by turns; all it can do where left out.
        features: Network whose feature maps of forgeries are compared: a perceptual one, or
            "features:" and the name of an autoencoder or a recognizer.
        network: "resnet", "unet" or "transformer".
        settings: What its constructor takes, such as `width`.
        bound: "tanh" or "clamp".
        levels: Budget, levels.
        size: Side of a training crop and of what is validated, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        rate: Adam's learning rate.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops.
    """

    METHOD = "IAP-like (without a message)"
    ARCHITECTURE = "idguard"

    def __init__(
        self,
        manipulators: tuple[str, ...] = ("stargan-smile",),
        conditions: dict[str, list[str]] | None = None,
        features: str = "features:face-embedder",
        network: Literal["resnet", "unet", "transformer"] = "resnet",
        settings: dict[str, Any] | None = None,
        bound: Bound = "tanh",
        levels: float = 6.375,
        size: int = 96,
        region: tuple[float, float] = (0.85, 0.95),
        rate: float = 1e-4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__(
            manipulators, conditions, levels=levels, size=size, region=region, average=average,
            seed=seed,
        )  # fmt: skip
        self.save_hyperparameters()
        if network not in NETWORKS:
            raise ConfigError(
                f"no network is called {network!r}; {did_you_mean(network, NETWORKS)}"
            )
        self._settings = {**(settings or {}), "channels": 3}
        built = NETWORKS[network](**self._settings)
        if size % built.multiple:
            raise ConfigError(f"`size` must be a multiple of {built.multiple}, got {size}")
        self.generator = built.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.rate = rate
        self.bound: Bound = bound
        cpu = torch.device("cpu")
        # A list hides it from checkpoints and from the optimizer.
        self._watching = [load("perceptual", features, store=WeightStore(), device=cpu)]

    def _made(self, network: torch.nn.Module, face: Image) -> Perturbation:
        raw = network(unit_range_to_signed(face)).float()
        return bounded(raw, self.levels, self.bound)

    def likeness(self, view: Image, task: Task, clean: tuple[Tensor, ...]) -> Tensor:
        """How alike the forgeries of a batch are to the clean ones: a number, -1 to 1."""
        return correlation(self._watching[0].features(task.forge(view)), clean).mean()

    def terms(self, face: Image) -> dict[str, Tensor]:
        """The one term, which is minimised."""
        tasks, watcher = self.turn(), self._watching[0].to(self.device)
        with torch.no_grad():
            clean = [watcher.features(task.forge_clean(face)) for task in tasks]
        view = (face + self._made(self.generator, face)).clamp(0, 1)
        pairs = zip(tasks, clean, strict=True)
        objectives = [partial(self.likeness, task=task, clean=maps) for task, maps in pairs]
        return {"correlation": gradient_of(view, objectives)}

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step of the generator."""
        self.descend(self.terms(self.cut(batch)[0]), self.optimizers())
        self.follow()

    def perturbation(self, face: Image) -> Perturbation:
        """The averaged network's answer."""
        return self._made(self.averaged.eval(), face)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as ID-Guard's authors set it."""
        groups = [{"params": list(self.generator.parameters()), "peak": self.rate}]
        return torch.optim.Adam(groups, lr=self.rate, betas=(0.5, 0.999))

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and card's settings of the network."""
        kind = {"network": self.hparams["network"], "levels": self.levels, "bound": self.bound}
        return self.averaged.state_dict(), {**kind, **self._settings}
