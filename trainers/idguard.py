"""Train ID-Guard: a generator and a universal perturbation against several manipulators at once.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349: Eq. 14 and algorithm 1.

Differs:
    Masks of the components come from landmarks, not from CelebAMask-HQ's labels.
    Recognizers see aligned faces. Success is judged by one that took no part in the training.
    The prior weights of strategy II are measured on the first batches, where none are given.
    A generator's gradient is collected at its images, so that one manipulator's graph is in memory
    at a time; MGDA goes back through the generator once more per manipulator.
    The learning rate falls linearly over the second half; averaged weights are what is kept.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models import load
from shields.models.base import Recognizer, unit_range_to_signed
from shields.models.idguard import Bound, bounded, joined
from shields.models.idguard_network import NETWORKS
from shields.models.round_trip import RoundTrip, load_manipulator
from shields.registry import did_you_mean
from shields.transforms import parse
from shields.types import Image, Perturbation
from shields.weights import WeightStore
from trainers.ars_targets import conditions_of
from trainers.averaging import follow
from trainers.data import batches_done
from trainers.disruption_measure import as_saved
from trainers.identity_destruction import DestructionConfig, compare, gain, look
from trainers.idguard_faces import Photos, cut_faces, photos_of, plain_name, success
from trainers.parallel import gathered, mean_over_processes
from trainers.scheme import resized
from trainers.sheets import show_sheets
from trainers.universal import UniversalPerturbation, gradient_prior, random_prior
from trainers.weighting import (
    STRATEGIES,
    DynamicPriority,
    IndicatorWeights,
    Prior,
    TaskReport,
    WeightStrategy,
    estimate_prior,
)

__all__ = ["IdGuardTraining"]


class IdGuardTraining(pl.LightningModule):
    """One generator, one universal perturbation, N manipulators and the weights between them.

    Args:
        manipulators: Cards, or addresses of code, of what is disrupted; autoencoders count.
        conditions: Manipulator -> what it is asked for, by turns; all it can do where left out.
        strategy: "equal", "prior", "hmm", "dtp", "mgda" (S-I) or "kpi" (S-II).
        alpha: Prior weight of each manipulator, for "prior" and "kpi"; measured where left out.
        indicator: What "hmm", "dtp" and "kpi" go by: the distance under the heat map (the paper's),
            or under the masks (the code's).
        preset: Terms and weights of the identity destruction: "paper" or "code".
        terms: Fields of `DestructionConfig` that differ from the preset.
        heat: Heat map of the recognizer: "grad-cam++", "grad-cam", or "none".
        recognizer: Card of the network whose view of a face is to change.
        judge: Card of another, which validation goes by.
        network: "resnet", "unet" or "transformer".
        settings: What its constructor takes, such as `width`.
        bound: "tanh" or "clamp".
        prior: Where the universal perturbation starts: "gradient" (an attack on the surrogate),
            "random" or "none", which leaves it out altogether.
        surrogate: Card of the autoencoder that is attacked.
        prior_batches: Batches of photos over which that, and alpha, are measured.
        handling: What happens to protected photos while training, as `shields.transforms.parse`
            reads it, such as "jpeg:60..95"; the paper's "w/ R".
        levels: Budget, levels.
        size: Side of a training crop, pixels.
        region: Smallest and largest share of the packed face's side that a crop shows.
        rate: Adam's learning rate of the generator.
        universal_rate: And of the universal perturbation, image units.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops and draws.
    """

    def __init__(
        self,
        manipulators: tuple[str, ...] = ("stargan-smile",),
        conditions: dict[str, list[str]] | None = None,
        strategy: Literal["equal", "prior", "hmm", "dtp", "mgda", "kpi"] = "kpi",
        alpha: tuple[float, ...] = (),
        indicator: Literal["heat", "mask"] = "heat",
        preset: Literal["paper", "code"] = "code",
        terms: dict[str, Any] | None = None,
        heat: Literal["grad-cam++", "grad-cam", "none"] = "grad-cam++",
        recognizer: str = "face-embedder",
        judge: str = "mobilefacenet",
        network: Literal["resnet", "unet", "transformer"] = "resnet",
        settings: dict[str, Any] | None = None,
        bound: Bound = "tanh",
        prior: Literal["gradient", "random", "none"] = "gradient",
        surrogate: str = "portrait-ae",
        prior_batches: int = 8,
        handling: str = "",
        levels: float = 6.375,
        size: int = 96,
        region: tuple[float, float] = (0.85, 0.95),
        rate: float = 1e-4,
        universal_rate: float = 1e-4,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.config = _destruction(preset, terms or {})
        self._settings = {**(settings or {}), "channels": 3 if prior == "none" else 6}
        self.generator = NETWORKS[network](**self._settings)
        if size % self.generator.multiple:
            raise ConfigError(f"`size` must be a multiple of {self.generator.multiple}, got {size}")
        self.averaged = copy.deepcopy(self.generator).requires_grad_(False)
        self.levels, self.size, self.region, self.seed = levels, size, region, seed
        self.rate, self.universal_rate, self.average = rate, universal_rate, average
        self.bound: Bound = bound
        start = torch.zeros(3, size, size)
        self.universal = None if prior == "none" else UniversalPerturbation(start, levels)
        self.handling = parse(handling) if handling else None
        # A list hides frozen networks from checkpoints and from the optimizer.
        store, cpu = WeightStore(), torch.device("cpu")
        self._manipulators = [load_manipulator(name, store) for name in manipulators]
        self._asked = conditions_of(self._manipulators, conditions or {})
        self._watching: list[Recognizer] = [
            load("recognizer", name, store=store, device=cpu) for name in (recognizer, judge)
        ]
        self.strategy = _strategy(strategy, len(self._manipulators), alpha)
        self.register_buffer("prepared", torch.tensor(False))

    prepared: Tensor

    @property
    def batches_done(self) -> int:
        """Batches trained on so far, those before a resumption included."""
        return batches_done(self.trainer)

    def on_train_start(self) -> None:
        """Measure what training starts from, once: a resumed run finds it in its checkpoint."""
        for network in (*self._manipulators, *self._watching):
            network.to(self.device)
        if not bool(self.prepared):
            self._prepare()
            self.prepared.fill_(True)

    def _prepare(self) -> None:
        rng = torch.Generator().manual_seed(self.seed)
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        few = itertools.islice(loader, int(self.hparams["prior_batches"]))
        cuts = [cut_faces(batch, self.size, self.region, rng)[0] for batch in few]
        faces = [gathered(cut.to(self.device)) for cut in cuts]
        with torch.autocast(self.device.type, enabled=False):
            if self.universal is not None:
                start = self._start(faces, rng)
                self.universal.value.data.copy_(start)
                self.universal.project()
            if isinstance(self.strategy, Prior | IndicatorWeights) and not self.hparams["alpha"]:
                found = estimate_prior(self._manipulators, faces[0], rng=rng, levels=self.levels)
                self.strategy.prior.copy_(found)

    def _start(self, faces: Sequence[Image], rng: torch.Generator) -> Perturbation:
        if self.hparams["prior"] == "random":
            return random_prior(self.size, rng=rng, levels=self.levels)
        name, store = str(self.hparams["surrogate"]), WeightStore()
        surrogate = load_manipulator(name, store).to(self.device)
        if not isinstance(surrogate, RoundTrip):
            raise ConfigError(f"`surrogate` must be an autoencoder, got {name!r}")
        return gradient_prior(surrogate.autoencoder, faces, rng=rng, levels=self.levels)

    def views(self, face: Image) -> list[Image]:
        """Photos protected by the generator and, where there is one, by the universal prior."""
        prior = None if self.universal is None else self.universal((self.size, self.size))
        made = self._made(self.generator, face, prior)
        perturbations = [made] if prior is None else [made, prior]
        return [(face + perturbation).clamp(0, 1) for perturbation in perturbations]

    def _made(
        self, network: torch.nn.Module, face: Image, prior: Perturbation | None
    ) -> Perturbation:
        features = unit_range_to_signed(face)
        if prior is not None:
            features = torch.cat([features, 2 * prior.expand_as(face)], dim=1)
        return bounded(network(features).float(), self.levels, self.bound)

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One step against all manipulators."""
        rng = torch.Generator().manual_seed(self.seed + self.batches_done)
        photos = photos_of(
            batch, self.size, self.region, self._watching[0], self.hparams["heat"], rng=rng
        )
        views = self.views(photos.face)
        if self.handling is not None:
            seeds = int(torch.randint(2**31, (), generator=rng))
            views = [self.handling(view, torch.Generator().manual_seed(seeds)) for view in views]
        pulls, indicators, gains = [], [], []
        for number in range(len(self._manipulators)):
            pull, indicator, gained = self._pull(number, photos, views)
            pulls.append(pull)
            indicators.append(indicator)
            gains.append(gained)
        flat = None
        if self.strategy.needs_gradients:
            flat = mean_over_processes(self._flat(views, pulls))
        judged = mean_over_processes(torch.stack(indicators))
        weights = self.strategy(TaskReport(indicators=judged, gradients=flat))
        total = _along(views, [
            sum(weight * pull[branch] for weight, pull in zip(weights, pulls, strict=True))
            for branch in range(len(views))
        ])  # fmt: skip
        self._step(total)
        # Here and not in a hook: callbacks may save a checkpoint before the module's hook runs.
        follow(self.averaged, self.generator, done=self.batches_done + 1, most=self.average)
        self._log(weights, indicators, gains)

    def _pull(
        self, number: int, photos: Photos, views: Sequence[Image]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """One manipulator's gradients at the views, its indicator and its gain."""
        manipulator = self._manipulators[number]
        name = self._asked[number][self.batches_done % len(self._asked[number])]
        watcher = self._watching[0]
        matrix = watcher.matrix(photos.landmarks, photos.face)
        see = partial(look, manipulator, condition=name, config=self.config, recognizer=watcher,
                      matrix=matrix)  # fmt: skip
        with torch.no_grad():
            clean = see(photos.face)
        pulls: list[Tensor] = []
        indicator, gained = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for view in views:
            leaf = view.detach().requires_grad_()
            found = see(leaf)
            terms = compare(clean, found, photos.binary, photos.heat, self.config)
            value = gain(terms, self.config).mean()
            (slope,) = torch.autograd.grad(value, leaf)
            pulls.append(slope)
            judged = terms.heat if self.hparams["indicator"] == "heat" else terms.mask
            indicator, gained = indicator + judged.mean().detach(), gained + value.detach()
        return pulls, indicator, gained

    def _flat(self, views: Sequence[Image], pulls: Sequence[Sequence[Tensor]]) -> Tensor:
        """Gradients (N, P) of the generator's parameters, as MGDA weighs them."""
        parameters = list(self.generator.parameters())
        rows = []
        for pull in pulls:
            gradients = torch.autograd.grad(
                _along(views[:1], pull[:1]), parameters, retain_graph=True
            )
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        return torch.stack(rows)

    def _step(self, total: Tensor) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-total)
        share = self.batches_done / max(1.0, float(self.trainer.estimated_stepping_batches))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, max(0.02, 2 * (1 - share)))
        optimizer.step()
        if self.universal is not None:
            self.universal.project()

    def _log(self, weights: Tensor, indicators: Sequence[Tensor], gains: Sequence[Tensor]) -> None:
        values = {}
        for place, manipulator in enumerate(self._manipulators):
            name = plain_name(manipulator.name)
            values[f"weight_{name}"] = weights[place]
            values[f"indicator_{name}"] = indicators[place]
            values[f"gain_{name}"] = gains[place]
        self.log_dict(values)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Held-out people, whole levels, in float32: success of generator and universal one."""
        whole, side = batch["face"].shape[-1], self.size
        face = (resized(batch["face"].float() / 255, side).clamp(0, 1) * 255).round() / 255
        points = (batch["landmarks"] + 0.5) * (side / whole) - 0.5
        prior = None if self.universal is None else self.universal((side, side))
        self.averaged.eval()
        judge = self._watching[1].to(self.device)
        values: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, enabled=False):
            ways = {"": self._made(self.averaged, face, prior)}
            if prior is not None:
                ways["universal_"] = prior.expand_as(face)
            for way, made in ways.items():
                protected = as_saved(face, made, self.levels)
                networks = [network.to(self.device) for network in self._manipulators]
                found = success(networks, self._asked, (face, protected), points, judge)
                values |= {f"val_{way}{name}": value for name, value in found.items()}
                if index == 0:
                    show_sheets(self, networks, self._asked, (face, protected), kind=way)
        self.log_dict(values, batch_size=len(face))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam for both, as the authors set it."""
        groups: list[dict[str, Any]] = [
            {"params": list(self.generator.parameters()), "lr": self.rate, "peak": self.rate}
        ]
        if self.universal is not None:
            rate = self.universal_rate
            groups.append({"params": [self.universal.value], "lr": rate, "peak": rate})
        return torch.optim.Adam(groups, betas=(0.5, 0.999))

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        names = ", ".join(manipulator.name for manipulator in self._manipulators)
        return {
            "role": "generator",
            "architecture": "idguard",
            "summary": f"ID-Guard ({self.hparams['strategy']}), trained against {names}.",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "the packs that the recipe names; a tenth of the people, chosen by a hash of "
            f"the name, is held out; results on them at {self.size} pixels and {self.levels:g} "
            f"levels, judged by {self._watching[1].name}",
            "teacher": self._watching[0].name,
        }

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and card's settings of network and universal perturbation."""
        state = dict(self.averaged.state_dict())
        if self.universal is not None:
            state = joined(state, 2 * self.universal.value)
        kind = {"network": self.hparams["network"], "levels": self.levels, "bound": self.bound}
        return state, {**kind, **self._settings}


def _along(views: Sequence[Image], slopes: Sequence[Tensor]) -> Tensor:
    """A number whose gradient at each view is its slope."""
    pairs = zip(views, slopes, strict=True)
    return torch.stack([(view * slope).sum() for view, slope in pairs]).sum()


def _destruction(preset: str, terms: dict[str, Any]) -> DestructionConfig:
    presets = {"paper": DestructionConfig.paper, "code": DestructionConfig.code}
    if preset not in presets:
        raise ConfigError(f"no preset is called {preset!r}; {did_you_mean(preset, presets)}")
    unknown = set(terms) - set(vars(DestructionConfig.code()))
    if unknown:
        raise ConfigError(f"no term is called {', '.join(sorted(unknown))}")
    return replace(presets[preset](), **terms)


def _strategy(name: str, tasks: int, alpha: Sequence[float]) -> WeightStrategy:
    if alpha and len(alpha) != tasks:
        raise ConfigError(f"`alpha` must be {tasks} numbers, one a manipulator, got {len(alpha)}")
    kind = STRATEGIES[name]
    if kind in (Prior, IndicatorWeights):
        return kind(alpha or [1.0] * tasks)
    return kind(tasks) if kind is DynamicPriority else kind()
