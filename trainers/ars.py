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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from shields.errors import ConfigError
from shields.models import load
from shields.models.ars_network import SCALES, ArsGenerator, Bound
from shields.models.base import Recognizer
from shields.models.round_trip import load_manipulator
from shields.registry import did_you_mean
from shields.transforms import CompressResize, parse
from shields.types import Image, Perturbation
from shields.weights import WeightStore
from trainers.ars_perturbation import PAPER, AdvNet, PerturbationModule
from trainers.ars_targets import (
    Likeness,
    Task,
    conditions_of,
    distance,
    goals_of,
    gradient_of,
)
from trainers.averaging import follow
from trainers.data import batches_done
from trainers.disruption_measure import (
    as_saved,
    disruption,
    share_done,
    show_tasks,
    whole_faces,
)
from trainers.idguard_faces import cut_faces, plain_name

__all__ = ["VARIANTS", "ArsTraining", "Plan"]

Objective = Callable[[Image], Tensor]
Variant = Literal["ars", "without-adv", "non-lossy", "basic-robust", "basic"]


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
        side: At which larger photos are seen, as for `ArsGenerator`; 0 for their own.
        extra: More that may happen to a photo while training, as `shields.transforms.parse` reads
            it: "jpeg:60..95" (the codec itself), "cr", "rotate:-10..10", "crop:0.8..1".
        joint: Let Eq. 10 reach f through its perturbation.
        penalty: lambda of Eq. 2 and lambda_2 of Eq. 10, on the perturbation's mean square.
        adversarial_weight: lambda_1 of Eq. 10.
        margin: For the target "away".
        recognizers: Cards of networks to which forgeries shall no longer show the person; beyond
            the paper.
        identity: Weight of that, on the cosine.
        judges: Cards of others, which validation asks as well.
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
        side: int = 0,
        extra: tuple[str, ...] = (),
        joint: bool = False,
        penalty: float = 10.0,
        adversarial_weight: float = 10.0,
        margin: float = 0.5,
        recognizers: tuple[str, ...] = (),
        identity: float = 0.1,
        judges: tuple[str, ...] = (),
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
            "budgets": list(budgets), "bound": bound, "side": side,
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
        asked = conditions_of(self._manipulators, conditions or {})
        goals = goals_of(self._manipulators, targets or {})
        self._judges: list[Recognizer] = [
            load("recognizer", name, store=store, device=torch.device("cpu"))
            for name in (*recognizers, *judges)
        ]
        learned = self._judges[: len(recognizers)]
        self._likeness = Likeness(recognizers=learned, weight=identity) if learned else None
        self._tasks = [
            [Task(manipulator=network, condition=name, goal=goals[network.name], margin=margin)
             for name in names]
            for network, names in zip(self._manipulators, asked, strict=True)
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
        face, points = cut_faces(batch, self.size, self.region, rng)
        face = face.contiguous(memory_format=torch.channels_last)
        levels = self.levels
        if self.budgets:
            levels = self.budgets[int(torch.randint(len(self.budgets), (), generator=rng))]
        tasks, epsilon = self.tasks(rng), levels / 255
        clean, alike = self._forgeries(tasks, face), self._person(face, points)
        optimizers: Any = self.optimizers()
        basic = self.generator.shape(face, levels)
        terms = {}
        if self.plan.two_way:
            terms = self.basic_terms(tasks, face, basic * epsilon, clean, alike)
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
                alike = self._person(reference, points)
            if self.plan.adversary:
                self._step("a", self.adversary_terms(tasks, protected, clean), optimizers[1])
            terms |= self.robust_terms(tasks, protected, final * epsilon, clean, alike)
        self._step("g", terms, optimizers[0])
        # Here and not in a hook: callbacks may save a checkpoint before the module's hook runs.
        follow(self.averaged, self.generator, done=self.batches_done + 1, most=self.average)

    def basic_terms(
        self, tasks: Sequence[Task], face: Image, basic: Perturbation,
        clean: Sequence[Image | None], alike: Objective | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Eq. 2, by its terms."""
        view = (face + basic).clamp(0, 1)
        return {
            "basic": gradient_of(view, _shortfalls(tasks, clean, alike)),
            "basic_size": self.penalty * distance(basic, torch.zeros_like(basic)).mean(),
        }

    def robust_terms(
        self, tasks: Sequence[Task], view: Image, final: Perturbation,
        clean: Sequence[Image | None], alike: Objective | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Eq. 10, by its terms; `view` is what p made of the protected photos."""
        objectives = _shortfalls(tasks, clean, alike)
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
        objectives = [
            partial(task.restored, clean=forged)
            for task, forged in zip(tasks, clean, strict=True)
            if forged is not None
        ]
        cleaned = self.adversary(view.detach())
        return {"restored": gradient_of(cleaned, objectives)}

    def _forgeries(self, tasks: Sequence[Task], face: Image) -> list[Image | None]:
        """What the manipulators make of clean photos, where anybody asks for it."""
        return [
            task.forge_clean(face) if self.plan.adversary or task.relative else None
            for task in tasks
        ]

    def _person(self, photo: Image, landmarks: Tensor) -> Objective | None:
        return None if self._likeness is None else self._likeness.to(photo, landmarks)

    def _step(self, player: str, terms: dict[str, Tensor], optimizer: Any) -> None:  # noqa: ANN401
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        share = share_done(self.trainer)
        for group in optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, max(0.02, 2 * (1 - share)))
        optimizer.step()
        self.log_dict({f"{player}_{name}": value.detach() for name, value in terms.items()})

    @torch.no_grad()
    def protect(self, face: Image, levels: float) -> Image:
        """Protect whole-level photos as they would be saved, by the averaged weights."""
        return as_saved(face, self.averaged(face, levels)[1], levels)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Whole held-out faces, in float32: `disruption`, and whom forgeries still show."""
        side = int(self.hparams["validation_size"]) or self.size
        levels = float(self.hparams["validation_levels"]) or self.levels
        face = whole_faces(batch["face"], side)
        with torch.autocast(self.device.type, enabled=False):
            protected = self.protect(face, levels)
            values = disruption(self._tasks, face, protected)
            if self._judges:
                points = (batch["landmarks"] + 0.5) * (side / batch["face"].shape[-1]) - 0.5
                handled = CompressResize().apply(protected, quality=75, scale=0.5)
                values |= self._shown(face, protected, points, "")
                values |= self._shown(face, handled, points, "_handled")
        self.log_dict(values, batch_size=len(face))
        if index == 0:
            show_tasks(self, self._tasks, (face, protected))

    def _shown(
        self, face: Image, protected: Image, landmarks: Tensor, ending: str
    ) -> dict[str, Tensor]:
        """Mean cosine of forgeries of protected photos with the clean photos, by recognizer."""
        values = {}
        for judge in self._judges:
            alike = Likeness(recognizers=[judge], weight=1.0).to(face, landmarks)
            tasks = [task for each in self._tasks for task in each]
            cosines = [alike(task.forge_clean(protected)) for task in tasks]
            values[f"val_identity{ending}_{plain_name(judge.name)}"] = torch.stack(cosines).mean()
        return values

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """Adam for the generator and for the Adv Net."""
        networks: tuple[nn.Module, ...] = (self.generator, self.adversary)
        return [torch.optim.Adam(network.parameters(), lr=self.rate) for network in networks], []

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        names = ", ".join(network.name for network in self._manipulators)
        side = int(self.hparams["validation_size"]) or self.size
        levels = float(self.hparams["validation_levels"]) or self.levels
        return {
            "role": "generator",
            "architecture": "ars",
            "summary": f"ARS ({self.hparams['variant']}), trained against {names}.",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "the packs that the recipe names; a tenth of the people, chosen by a hash of "
            f"the name, is held out; results on them at {side} pixels and {levels:g} levels",
            "teacher": "",
        }

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor's arguments of the network that is shipped."""
        return self.averaged.state_dict(), dict(self._settings)


def _shortfalls(
    tasks: Sequence[Task], clean: Sequence[Image | None], alike: Objective | None
) -> list[Objective]:
    return [
        partial(task.shortfall, clean=forged, likeness=alike)
        for task, forged in zip(tasks, clean, strict=True)
    ]


def _check_sides(multiple: int, *sides: int) -> None:
    for side in sides:
        if side % multiple:
            raise ConfigError(f"sides must be multiples of {multiple} pixels, got {side}")
