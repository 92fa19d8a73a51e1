"""Train TAFIM: a network and a noise for all photos, both of which turn forgeries white.

Source:
    TAFIM: Targeted Adversarial Attacks against Facial Image Manipulations (Aneja, Markhasin,
    Niessner, 2022), https://arxiv.org/abs/2112.09151; code
    https://github.com/shivangi-aneja/TAFIM.

    Minimise D(G(x + f), white) + D(G(x + n), white) + 10 (D(x + f, x) + D(x + n, x)), D the mean
    square in [-1, 1], f the network's answer to the photo and to n, n the noise.

Differs:
    The noise itself is kept and ships; the code stores the last perturbation under its name.
    Several manipulators share one network and count alike. The paper trains one network each and
    fuses their perturbations by attention, which is left out.
    There is no budget but the penalty; what is measured is cut off at `levels`, as in the paper of
    ARS. `clipped` cuts off while training, too, and starts the noise inside.
    The network is the U-Net of our ARS, see `shields.models.learned_baselines`; batches are larger
    than the code's single photo; the learning rate falls linearly over the second half, and
    averaged weights are what is kept.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.learned_baselines import TafimNetwork
from shields.transforms import parse
from shields.types import Image, Perturbation
from trainers.ars_targets import distance, gradient_of
from trainers.disruption_measure import DisruptionTraining

__all__ = ["TafimTraining"]


class TafimTraining(DisruptionTraining):
    """The network and the noise against manipulators.

    Args:
        manipulators: Cards, or addresses of code, of what is disrupted; autoencoders count.
        conditions: Manipulator -> what it is asked for, by turns; all it can do where left out.
        targets: Manipulator -> "white", "black", "grey", "negative" (of the clean forgery) or
            "away" (from it); white where left out.
        widths: Channels of the U-Net at each resolution.
        penalty: Weight of the perturbation's mean square.
        handling: What happens to protected photos before both are judged, as
            `shields.transforms.parse` reads it; the JPEG variant is "jpeg:1..99".
        levels: Budget at which perturbations are cut off where they are measured.
        clipped: Cut them off while training, too.
        size: Side of a training crop, of the noise and of what is validated, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        rate: Adam's learning rate of network and noise.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops and draws.
    """

    METHOD = "TAFIM"
    ARCHITECTURE = "tafim"
    generator: TafimNetwork
    averaged: TafimNetwork

    def __init__(
        self,
        manipulators: tuple[str, ...] = ("stargan-smile",),
        conditions: dict[str, list[str]] | None = None,
        targets: dict[str, str] | None = None,
        widths: tuple[int, ...] = (16, 32, 64, 96, 128),
        penalty: float = 10.0,
        handling: str = "",
        levels: float = 12.75,
        clipped: bool = False,
        size: int = 96,
        region: tuple[float, float] = (0.85, 0.95),
        rate: float = 1e-4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__(
            manipulators, conditions, targets, levels=levels, size=size, region=region,
            average=average, seed=seed,
        )  # fmt: skip
        self.save_hyperparameters()
        self.generator = TafimNetwork(widths, size, levels).to(memory_format=torch.channels_last)
        if size % self.generator.multiple:
            raise ConfigError(f"`size` must be a multiple of {self.generator.multiple}, got {size}")
        if clipped:  # what starts beyond the cut has no gradient and would stay there for ever
            self.generator.noise.data.mul_(min(1.0, 2 * levels / 255))
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.penalty, self.clipped, self.rate = penalty, clipped, rate
        self.handling = parse(handling) if handling else None

    def views(self, face: Image, rng: torch.Generator) -> dict[str, Image]:
        """Photos with the network's answer, and with the noise; as they are handled."""
        noise = self.generator.everywhere((face.shape[2], face.shape[3]))
        views = {}
        for name, made in (("network", self.generator(face)), ("noise", noise)):
            reach = self.levels / 255
            kept = made.clamp(-reach, reach) if self.clipped else made
            view = (face + kept).clamp(0, 1)
            views[name] = view if self.handling is None else self.handling(view, rng)
        return views

    def terms(self, face: Image, rng: torch.Generator) -> dict[str, Tensor]:
        """The four terms: `forgery_` are distances from the targets, `size_` penalties."""
        objectives = self.shortfalls(self.turn(), face)
        found = {}
        for name, view in self.views(face, rng).items():
            found[f"forgery_{name}"] = gradient_of(view, objectives)
            found[f"size_{name}"] = self.penalty * distance(view, face).mean()
        return found

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step of network and noise."""
        face, rng = self.cut(batch)
        self.descend(self.terms(face, rng), self.optimizers())
        self.follow()

    def perturbation(self, face: Image) -> Perturbation:
        """The averaged network's answer."""
        return self.averaged(face)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam for both."""
        groups = [{"params": list(self.generator.parameters()), "peak": self.rate}]
        return torch.optim.Adam(groups, lr=self.rate)

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor's arguments of the network that is shipped."""
        widths = list(self.hparams["widths"])
        return self.averaged.state_dict(), {
            "widths": widths, "size": self.size, "levels": self.levels,
        }  # fmt: skip
