"""Train the CMUA watermark: one perturbation for all photos, walked by the signs of gradients.

Source:
    CMUA-Watermark: A Cross-Model Universal Adversarial Watermark for Combating Deepfakes (Huang et
    al., 2022), https://arxiv.org/abs/2105.10872; code https://github.com/VDIGPKU/CMUA-Watermark.

    For every batch and manipulator in turn, some steps of: each photo x of the batch moves by
    a sign grad |G(x') - G(x)|^2 to x''; e is the mean over photos of k (x'' - x), cut off at the
    budget; the watermark becomes m w + (1 - m) e, and x' = x + w.

Differs:
    `variant="corrected"` starts each walk at the photo with the watermark. In the code all but
    HiSD's start at the photo with fresh noise, whose mean is next to nothing: the first step of a
    walk halves what was gathered before. `variant="faithful"` does the same.
    The factors k are given. The authors search for them, and ship 1 for all.
    One condition a batch by turns, not all; the watermark starts within a level of zero, where the
    gradient is not 0.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.hisd import HiSDModel
from shields.models.idguard import UNIVERSAL
from shields.registry import did_you_mean
from shields.types import Image, Perturbation
from trainers.ars_targets import Task, distance
from trainers.disruption_measure import DisruptionTraining
from trainers.parallel import mean_over_processes
from trainers.universal import UniversalPerturbation

__all__ = ["CmuaTraining"]


class CmuaTraining(DisruptionTraining):
    """One watermark against several manipulators.

    Args:
        manipulators: Cards, or addresses of code, of what is disrupted, in their order;
            autoencoders count.
        conditions: Manipulator -> what it is asked for, by turns; all it can do where left out.
        factors: Manipulator -> k, how far its steps carry; 1 where left out.
        variant: "corrected" or "faithful".
        steps: Of a walk, for each batch and manipulator.
        step: Of a photo in one of them, levels.
        momentum: m, what is left of the watermark in one of them.
        levels: Budget, levels.
        size: Side of the watermark and of the photos, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        seed: Fixes crops and draws.
    """

    METHOD = "CMUA watermark"
    ARCHITECTURE = "universal"

    def __init__(
        self,
        manipulators: tuple[str, ...] = ("stargan-smile",),
        conditions: dict[str, list[str]] | None = None,
        factors: dict[str, float] | None = None,
        variant: Literal["corrected", "faithful"] = "corrected",
        steps: int = 10,
        step: float = 1.275,
        momentum: float = 0.5,
        levels: float = 6.375,
        size: int = 96,
        region: tuple[float, float] = (0.85, 0.95),
        seed: int = 0,
    ) -> None:
        super().__init__(
            manipulators, conditions, levels=levels, size=size, region=region, seed=seed
        )
        self.save_hyperparameters()
        if variant not in ("corrected", "faithful"):
            hint = did_you_mean(variant, ["corrected", "faithful"])
            raise ConfigError(f"no variant is called {variant!r}; {hint}")
        if steps < 1 or not step > 0 or not 0 <= momentum < 1:
            raise ConfigError(
                "`steps` must be 1 or more, `step` above 0 and `momentum` in [0, 1), got "
                f"{steps}, {step}, {momentum}"
            )
        names = [network.name for network in self._manipulators]
        self.factors = {**dict.fromkeys(names, 1.0), **(factors or {})}
        if set(self.factors) != set(names):
            absent = ", ".join(sorted(set(self.factors) - set(names)))
            raise ConfigError(f"factors are given for {absent}; there are: {', '.join(names)}")
        self.variant, self.steps, self.step, self.momentum = variant, steps, step, momentum
        start = torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.universal = UniversalPerturbation(start / 255, levels)

    def walk(
        self, watermark: Tensor, face: Image, task: Task, rng: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Go some steps on one batch, for one manipulator.

        Args:
            watermark: (1, 3, S, S), image units, inside the budget.
            face: (B, 3, S, S), [0, 1].
            task: What is to be disrupted.
            rng: Draws where the faithful variant begins.

        Returns:
            The new watermark, inside the budget; and the distance of the last step, a number.
        """
        reach, factor = self.levels / 255, self.factors[task.manipulator.name]
        clean, start = task.forge_clean(face), watermark
        if self.variant == "faithful" and not isinstance(task.manipulator, HiSDModel):
            start = ((torch.rand(face.shape, generator=rng) * 2 - 1) * reach).to(face)
        view, far = (face + start).clamp(0, 1), face.new_zeros(())
        for _ in range(self.steps):
            view.requires_grad_()
            distances = distance(task.forge(view), clean)
            (slope,) = torch.autograd.grad(distances.sum(), view)
            moved = view.detach() + self.step / 255 * slope.sign()
            pull = (factor * (moved - face)).clamp(-reach, reach).mean(dim=0, keepdim=True)
            pull = mean_over_processes(pull)
            watermark = self.momentum * watermark + (1 - self.momentum) * pull
            view, far = (face + watermark).clamp(0, 1), distances.detach().mean()
        return watermark, far

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One walk a manipulator, one after the other."""
        face, rng = self.cut(batch)
        watermark, values = self.universal.value.detach(), {}
        for task in self.turn():
            watermark, far = self.walk(watermark, face, task, rng)
            values[f"distance_{task.manipulator.name}"] = far
        optimizer: Any = self.optimizers()
        # Plain descent of rate 1 goes where the walk ended; Lightning counts its steps.
        self.universal.value.grad = self.universal.value.detach() - watermark
        optimizer.step()
        self.universal.project()
        self.log_dict(values)

    def perturbation(self, face: Image) -> Perturbation:
        """The watermark."""
        return self.universal((face.shape[2], face.shape[3])).expand_as(face)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What puts the watermark where the walks ended."""
        return torch.optim.SGD(self.universal.parameters(), lr=1.0)

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """The watermark in units of [-1, 1], and its budget."""
        return {UNIVERSAL: 2 * self.universal.value.detach()[0]}, {"levels": self.levels}
