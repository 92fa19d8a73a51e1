"""Train ARS, a generator of perturbations that outlast what happens to a photo.

Source:
    Adversarial Robust Safeguard for Evading Deep Facial Manipulation (Guan et al., 2024),
    https://ojs.aaai.org/index.php/AAAI/article/view/27762: Eqs. 2, 8 and 10, lambda = 10.

Differs:
    The paper's norms are read as mean squares in [-1, 1]; with plain norms its weights of 10 would
    mean something else.
    p stands before the manipulator and before the Adv Net, as in the paper's figure; its equations
    leave it out.
    f learns from Eq. 2 and g from Eq. 10 with f's result detached, in the same step; `joint` lets
    Eq. 10 reach f as well.
    Several manipulators at once share a step, each with a target of its own.
    The learning rate falls linearly over the second half; averaged weights are what is kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from shields.budget import Budget
from shields.codec import uniform
from shields.errors import ConfigError
from shields.models.ars_network import SCALES, ArsGenerator, Bound
from shields.models.round_trip import load_manipulator
from shields.registry import did_you_mean
from shields.transforms import CompressResize, parse
from shields.types import Image, Perturbation
from shields.weights import WeightStore
from trainers.ars_perturbation import PAPER, AdvNet, PerturbationModule
from trainers.ars_targets import Task, distance, goals_of, gradient_of
from trainers.averaging import follow
from trainers.data import batches_done, random_crop
from trainers.scheme import resized

__all__ = ["VARIANTS", "ArsTraining", "Plan", "sample_sheet"]

Variant = Literal["ars", "without-adv", "non-lossy", "basic-robust", "basic"]

#: from here on a forgery counts as disrupted: mean square in [-1, 1]
SUCCESS = 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which of the paper's parts take part."""

    #: the robust way g behind the basic one f
    two_way: bool
    #: the perturbation module p
    lossy: bool
    #: the Adv Net q
    adversary: bool


#: the paper's table 5, by the names that it uses
VARIANTS: Mapping[str, Plan] = {
    "ars": Plan(two_way=True, lossy=True, adversary=True),
    "without-adv": Plan(two_way=True, lossy=True, adversary=False),
    "non-lossy": Plan(two_way=True, lossy=False, adversary=False),
    "basic-robust": Plan(two_way=False, lossy=True, adversary=True),
    "basic": Plan(two_way=False, lossy=False, adversary=False),
}


class ArsTraining(pl.LightningModule):
    """The generator against manipulators, and the Adv Net against the generator.

    Args:
        manipulators: Cards, or addresses of code, of what is disrupted; autoencoders count.
        targets: Manipulator -> "white", "black", "grey", "negative" (of the clean forgery) or
            "away" (from it, as far as `margin`); white where left out.
        conditions: Manipulator -> what it is asked for, by turns; all it can do where left out.
        variant: An ablation: "ars", "without-adv", "non-lossy", "basic-robust" or "basic".
        scale: "paper" or "small".
        widths: Channels of the U-Nets at each resolution, instead of the scale's.
        channels: C, of the noise embedding and of the features that it joins.
        adversary_widths: Channels of the Adv Net.
        levels: Budget, levels.
        budgets: Budgets among which each batch draws one and is told it; the largest is `levels`.
        bound: "tanh" or "clip".
        extra: More that may happen to a photo while training, as `shields.transforms.parse` reads
            it: "jpeg:60..95" (the codec itself), "cr", "rotate:-10..10", "crop:0.8..1".
        joint: Let Eq. 10 reach f through its perturbation.
        penalty: lambda of Eq. 2 and lambda_2 of Eq. 10, on the perturbation's mean square.
        adversarial_weight: lambda_1 of Eq. 10.
        margin: For the target "away".
        per_step: How many of the manipulators a step meets, drawn; 0 for all.
        head_start: Batches in the beginning on which only f learns.
        size: Side of a training crop, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        validation_size: Side at which held-out people are measured; 0 for `size`.
        validation_levels: Budget at which they are; 0 for `levels`.
        rate: Adam's learning rate, of both networks.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops and draws.
    """

    def __init__(
        self,
        manipulators: tuple[str, ...] = ("portrait-ae",),
        targets: dict[str, str] | None = None,
        conditions: dict[str, list[str]] | None = None,
        variant: Variant = "ars",
        scale: Literal["paper", "small"] = "small",
        widths: tuple[int, ...] = (),
        channels: int = 128,
        adversary_widths: tuple[int, ...] = (16, 32, 64, 96),
        levels: float = 12.75,
        budgets: tuple[float, ...] = (),
        bound: Bound = "tanh",
        extra: tuple[str, ...] = (),
        joint: bool = False,
        penalty: float = 10.0,
        adversarial_weight: float = 10.0,
        margin: float = 0.5,
        per_step: int = 0,
        head_start: int = 0,
        size: int = 96,
        region: tuple[float, float] = (0.5, 1.0),
        validation_size: int = 0,
        validation_levels: float = 0.0,
        rate: float = 1e-4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        for name, value, known in (("variant", variant, VARIANTS), ("scale", scale, SCALES)):
            if value not in known:
                raise ConfigError(f"no {name} is called {value!r}; {did_you_mean(value, known)}")
        self.plan = VARIANTS[variant]
        self._settings: dict[str, Any] = {
            "widths": list(widths or SCALES[scale]["widths"]),
            "encoder": list(SCALES[scale]["encoder"]),
            "channels": channels, "two_way": self.plan.two_way, "levels": levels,
            "budgets": list(budgets), "bound": bound,
        }  # fmt: skip
        last = torch.channels_last
        self.generator = ArsGenerator(**self._settings).to(memory_format=last)
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.adversary = AdvNet(adversary_widths).to(memory_format=last)
        _check_sides(self.generator.multiple, size, validation_size)
        self.perturbation = PerturbationModule(parts=(*PAPER, *(parse(text) for text in extra)))
        self.levels, self.seed, self.rate, self.average = levels, seed, rate, average
        self.joint, self.penalty, self.adversarial_weight = joint, penalty, adversarial_weight
        self.per_step, self.head_start = per_step, head_start
        self.size, self.region, self.budgets = size, region, budgets
        # A list hides the manipulators from checkpoints and from the optimizers.
        store = WeightStore()
        self._manipulators = [load_manipulator(name, store) for name in manipulators]
        self._asked = {name: list(names) for name, names in (conditions or {}).items()}
        goals = goals_of(self._manipulators, targets or {})
        self._tasks = [
            [Task(manipulator=network, condition=name, goal=goals[network.name], margin=margin)
             for name in self._asked.get(network.name, network.conditions)]
            for network in self._manipulators
        ]  # fmt: skip

    @property
    def batches_done(self) -> int:
        """Batches trained on so far, those before a resumption included."""
        return batches_done(self.trainer)

    def tasks(self, rng: torch.Generator) -> list[Task]:
        """Draw what a step meets: some of the manipulators, each with one of its conditions."""
        order = torch.randperm(len(self._tasks), generator=rng).tolist()
        chosen = sorted(order[: self.per_step]) if self.per_step else range(len(self._tasks))
        drawn = []
        for index in chosen:
            place = int(torch.randint(len(self._tasks[index]), (), generator=rng))
            drawn.append(self._tasks[index][place])
            drawn[-1].manipulator.to(self.device)
        return drawn

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step of the Adv Net, then one of the generator."""
        rng = torch.Generator().manual_seed(self.seed + self.batches_done)
        face = self._cut(batch["face"], rng)
        levels = self.levels
        if self.budgets:
            levels = self.budgets[int(torch.randint(len(self.budgets), (), generator=rng))]
        tasks, epsilon = self.tasks(rng), levels / 255
        clean = self._forgeries(tasks, face)
        optimizers: Any = self.optimizers()
        basic = self.generator.shape(face, levels)
        terms = {}
        if self.plan.two_way:
            terms = self.basic_terms(tasks, face, basic * epsilon, clean)
        if not (self.plan.two_way and self.batches_done < self.head_start):
            final = basic
            if self.plan.two_way:
                given = basic if self.joint else basic.detach()
                final = self.generator.robust(face, given, levels)
            protected, reference = (face + final * epsilon).clamp(0, 1), face
            if self.plan.lossy:
                protected, reference = self.perturbation(protected, face, rng)
            if reference is not face:
                clean = self._forgeries(tasks, reference)
            if self.plan.adversary:
                self._step("a", self.adversary_terms(tasks, protected, clean), optimizers[1])
            terms |= self.robust_terms(tasks, protected, final * epsilon, clean)
        self._step("g", terms, optimizers[0])

    def basic_terms(
        self, tasks: Sequence[Task], face: Image, basic: Perturbation, clean: Sequence[Image | None]
    ) -> dict[str, Tensor]:
        """Eq. 2, by its terms."""
        view = (face + basic).clamp(0, 1)
        return {
            "basic": gradient_of(view, _shortfalls(tasks, clean)),
            "basic_size": self.penalty * distance(basic, torch.zeros_like(basic)).mean(),
        }

    def robust_terms(
        self, tasks: Sequence[Task], view: Image, final: Perturbation,
        clean: Sequence[Image | None],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Eq. 10, by its terms; `view` is what p made of the protected photos."""
        objectives = _shortfalls(tasks, clean)
        terms = {"direct": gradient_of(view, objectives)}
        if self.plan.adversary:
            self.adversary.requires_grad_(False)
            cleaned = self.adversary(view)
            terms["cleaned"] = self.adversarial_weight * gradient_of(cleaned, objectives)
            self.adversary.requires_grad_(True)
        terms["size"] = self.penalty * distance(final, torch.zeros_like(final)).mean()
        return terms

    def adversary_terms(
        self, tasks: Sequence[Task], view: Image, clean: Sequence[Image | None]
    ) -> dict[str, Tensor]:
        """Eq. 8: the Adv Net shall bring the clean forgeries back."""

        def restored(task: Task, forged: Image) -> Any:  # noqa: ANN401  a function of an image
            return lambda image: task.restored(image, forged)

        pairs = [(task, forged) for task, forged in zip(tasks, clean, strict=True)
                 if forged is not None]  # fmt: skip
        cleaned = self.adversary(view.detach())
        return {"restored": gradient_of(cleaned, [restored(*pair) for pair in pairs])}

    def _forgeries(self, tasks: Sequence[Task], face: Image) -> list[Image | None]:
        """What the manipulators make of clean photos, where anybody asks for it."""
        return [
            task.forge_clean(face) if self.plan.adversary or task.relative else None
            for task in tasks
        ]

    def _step(self, player: str, terms: dict[str, Tensor], optimizer: Any) -> None:  # noqa: ANN401
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        share = self.batches_done / max(1.0, float(self.trainer.estimated_stepping_batches))
        for group in optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, max(0.02, 2 * (1 - share)))
        optimizer.step()
        self.log_dict({f"{player}_{name}": value.detach() for name, value in terms.items()})

    def _cut(self, packed: Tensor, rng: torch.Generator) -> Image:
        side = round(packed.shape[-1] * uniform(self.region, rng))
        cut = random_crop(packed, min(side, packed.shape[-1]), rng).float() / 255
        face = resized(cut, self.size).clamp(0, 1)
        return face.contiguous(memory_format=torch.channels_last)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Move the averaged weights; early on they follow faster."""
        follow(self.averaged, self.generator, done=self.batches_done, most=self.average)

    @torch.no_grad()
    def protect(self, face: Image, levels: float) -> Image:
        """Protect whole-level photos as they would be saved, by the averaged weights."""
        perturbation = self.averaged(face, levels)[1]
        whole = Budget(levels=levels).whole_levels
        return (face + (perturbation * 255).round().clamp(-whole, whole) / 255).clamp(0, 1)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Whole held-out faces, in float32: how often forgeries are disrupted.

        Forgeries of protected photos are compared with those of clean ones; once as they are, and
        once after the same JPEG 75 and half size on both sides ("handled").
        """
        side = int(self.hparams["validation_size"]) or self.size
        levels = float(self.hparams["validation_levels"]) or self.levels
        face = (resized(batch["face"].float() / 255, side).clamp(0, 1) * 255).round() / 255
        with torch.autocast(self.device.type, enabled=False):
            protected = self.protect(face, levels)
            handling = CompressResize()
            handled = [handling.apply(image, quality=75, scale=0.5) for image in (face, protected)]
            values = self._measure(face, protected, "")
            values |= self._measure(handled[0], handled[1], "_handled")
            if index == 0:
                self._show(face, protected)
        error = distance(protected, face) / 4
        values["val_psnr"] = (-10 * error.clamp_min(1e-10).log10()).mean()
        # What the best checkpoint is chosen by.
        values["val_success_mean"] = (values["val_success"] + values["val_success_handled"]) / 2
        self.log_dict(values, batch_size=len(face))

    def _measure(self, face: Image, protected: Image, ending: str) -> dict[str, Tensor]:
        """Distances and successes over all conditions, of each manipulator and in the mean."""
        values = {}
        for tasks in self._tasks:
            tasks[0].manipulator.to(self.device)
            found = [
                distance(task.forge_clean(protected), task.forge_clean(face)) for task in tasks
            ]
            errors = torch.cat(found)
            # Names go into cards as they are, where dots and slashes mean something.
            name = ending + "_" + re.sub(r"[^A-Za-z0-9_-]", "-", tasks[0].manipulator.name)
            values["val_success" + name] = (errors > SUCCESS).float().mean()
            values["val_mse" + name] = errors.mean()
        for name in ("val_success" + ending, "val_mse" + ending):
            parts = [value for key, value in values.items() if key.startswith(name)]
            values[name] = torch.stack(parts).mean()
        return values

    def _show(self, face: Image, protected: Image) -> None:
        for tasks in self._tasks:
            before, after = (tasks[0].forge_clean(image[:4]) for image in (face, protected))
            sheet = sample_sheet(face[:4], protected[:4], before, after)
            for logger in self.loggers:
                board = getattr(logger, "experiment", None)
                if board is not None and hasattr(board, "add_image"):
                    tag = f"sheet/{tasks[0].manipulator.name}"
                    board.add_image(tag, sheet, self.batches_done)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Adam for the generator and for the Adv Net."""
        networks: tuple[nn.Module, ...] = (self.generator, self.adversary)
        return [torch.optim.Adam(network.parameters(), lr=self.rate) for network in networks], []

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        names = ", ".join(network.name for network in self._manipulators)
        side = int(self.hparams["validation_size"]) or self.size
        return {
            "role": "generator",
            "architecture": "ars",
            "summary": f"ARS ({self.hparams['variant']}), trained against {names}.",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "the packs that the recipe names; a tenth of the people, chosen by a hash of "
            f"the name, is held out; results on them at {side} pixels and {self.levels:g} levels",
            "teacher": "",
        }

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor's arguments of the network that is shipped."""
        return self.averaged.state_dict(), dict(self._settings)


def _shortfalls(tasks: Sequence[Task], clean: Sequence[Image | None]) -> list[Any]:
    def shortfall(task: Task, forged: Image | None) -> Any:  # noqa: ANN401  a function of an image
        return lambda image: task.shortfall(image, forged)

    return [shortfall(*pair) for pair in zip(tasks, clean, strict=True)]


def _check_sides(multiple: int, *sides: int) -> None:
    for side in sides:
        if side % multiple:
            raise ConfigError(f"sides must be multiples of {multiple} pixels, got {side}")


def sample_sheet(
    clean: Image, protected: Image, forged_clean: Image, forged_protected: Image
) -> Tensor:
    """Rows: clean, protected, perturbation x10 about grey, and both forgeries: (3, 5 S, n S)."""
    change = (0.5 + 10 * (protected - clean)).clamp(0, 1)
    rows = (clean, protected, change, forged_clean, forged_protected)
    drawn = [torch.cat(list(row.clamp(0, 1)), dim=2) for row in rows]
    return torch.cat(drawn, dim=1).cpu()
