"""What the cells of a suite are computed with: every network loaded once, failures remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from robustness import handling, metrics, purifiers
from robustness.handling import Handling
from robustness.images import code_of, networks_of, state_of, weights_of
from robustness.metrics import Facts, Measure, SetMeasure
from robustness.purifiers import Purifier
from robustness.purifiers.in_the_loop import against
from robustness.suite import Forging, Protection
from shields import models, protectors
from shields.cli_protect import configure
from shields.errors import ConfigError, ShieldsError
from shields.models.base import Detector
from shields.models.manipulation import Editor, Manipulator, resized
from shields.models.round_trip import load_manipulator
from shields.protectors.base import IterativeProtector
from shields.shield import Shield
from shields.types import Image
from shields.weights import Card, WeightStore

__all__ = ["CellError", "Tools", "explain", "tools_for"]

#: metrics about sets, which are so even where they cannot be loaded
_SETS = ("fid", "kid", "fd")
#: no side is shorter where faces are looked for, pixels
_DETECTED = 160
#: photos whose landmarks are remembered
_PHOTOS = 10_000

Made = TypeVar("Made")


class CellError(ShieldsError):
    """A cell cannot be computed; the others can."""


def explain(error: BaseException) -> str:
    """One line that says why a cell has no value."""
    said = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory: {said or 'smaller photos or another device would help'}"
    known = isinstance(error, ShieldsError | OSError)
    return said if known and said else f"unexpected {type(error).__name__}: {said}"


class Tools:
    """Loads protectors, handlings, manipulators and metrics by their names in a suite.

    Args:
        store: Where weights are looked for.
        device: Where networks are put.
    """

    def __init__(self, store: WeightStore, device: torch.device) -> None:
        self.store, self.device = store, device
        self._made: dict[tuple[object, ...], Any] = {}
        self._landmarks: dict[str, Tensor] = {}

    def _once(self, *key: object, build: Callable[[], Made]) -> Made:
        """Build, or give what was built; what failed once fails again without another try."""
        if key not in self._made:
            try:
                self._made[key] = build()
            except Exception as error:  # of a network or a plug-in: anything
                self._made[key] = CellError(explain(error))
        made = self._made[key]
        if isinstance(made, CellError):
            raise CellError(str(made))
        return cast(Made, made)

    @property
    def detector(self) -> Detector:
        """MTCNN."""
        return self._once(
            "detector",
            build=lambda: models.load("detector", "mtcnn", store=self.store, device=self.device),
        )

    def landmarks(self, image: Image, digest: str) -> Tensor:
        """Of the largest face in (1, 3, H, W): (1, 5, 2), NaN where there is none.

        Args:
            image: A clean photo.
            digest: Of its content; the last few photos are remembered.
        """
        if digest not in self._landmarks:
            # The detector overlooks faces of a few dozen pixels.
            factor = max(1, min(math.ceil(_DETECTED / min(image.shape[2:])), _DETECTED // 32))
            size = (image.shape[2] * factor, image.shape[3] * factor)
            faces = self.detector(resized(image, size))
            points = torch.full((1, 5, 2), math.nan)
            if faces:
                points = torch.from_numpy(faces[0].landmarks)[None].float()
                points = (points + 0.5) / factor - 0.5
            self._landmarks[digest] = points.to(self.device)
            while len(self._landmarks) > _PHOTOS:
                del self._landmarks[next(iter(self._landmarks))]
        return self._landmarks[digest]

    def shield(self, protection: Protection, seed: int) -> Shield:
        """What protects photos as a protection says; faces, or the photo where there is none."""
        return self._once("shield", protection, seed, build=lambda: self._shield(protection, seed))

    def _shield(self, protection: Protection, seed: int) -> Shield:
        texts = [f"{name}={value}" for name, value in protection.settings]
        config = configure(
            protection.method,
            preset=protection.preset,
            settings=texts,
            robust=protection.robust or bool(protection.aware),
        )
        protector = protectors.load(
            protection.method,
            config,
            networks=dict(protection.networks),
            store=self.store,
            device=self.device,
        )
        if protection.aware:
            assert isinstance(protector, IterativeProtector), "or it could not be hardened"
            protector.handling = against(*map(self._purifier, protection.aware))
        return Shield(
            protector,
            detector=self.detector,
            region=protection.region,
            size=protection.size,
            seed=seed,
            device=self.device,
            method=protection.method,
        )

    def handling(self, text: str) -> Handling:
        """Attacks and purifiers; chains share the purifiers that they have in common."""
        return self._once(
            "handling",
            text,
            build=lambda: handling.load(
                text, store=self.store, device=self.device, purifier=self._purifier
            ),
        )

    def _purifier(self, text: str) -> Purifier:
        return self._once(
            "purifier",
            text,
            build=lambda: purifiers.load(text, store=self.store, device=self.device),
        )

    def forger(self, forging: Forging) -> Manipulator | Editor:
        """A manipulator, an autoencoder as one, or an editor."""
        return self._once("forger", forging.name, forging.role, build=lambda: self._forger(forging))

    def _forger(self, forging: Forging) -> Manipulator | Editor:
        name, store = forging.name, self.store
        if (forging.role or self._role(name)) == "editor":
            return models.load("editor", name, store=store, device=self.device)
        forger = load_manipulator(name, store)
        if not isinstance(forger, Manipulator):
            raise ConfigError(f"{name!r} is a {type(forger).__name__}, which forges no photos")
        return forger.to(self.device)

    def _role(self, name: str) -> str:
        beside = Path(name).with_suffix(".toml")
        if name in self.store.names():
            return self.store.card(name).role
        if beside.is_file():
            return Card.read(beside).role
        return "editor" if name in models.plugins("editor") else ""

    def conditions(self, forging: Forging) -> tuple[str, ...]:
        """What a manipulator is asked for: what the suite says, or all that it lists."""
        if forging.conditions:
            return forging.conditions
        try:
            forger = self.forger(forging)
        except CellError:
            return ("",)
        return forger.conditions if isinstance(forger, Manipulator) else ("",)

    def settings_of(self, forging: Forging) -> dict[str, Any]:
        """What decides a forgery besides weights and condition."""
        name, beside = forging.name, Path(forging.name).with_suffix(".toml")
        card = None
        if name in self.store.names():
            card = self.store.card(name)
        elif beside.is_file():
            card = Card.read(beside)
        address = (
            card.architecture
            if card is not None
            else models.plugins("editor").get(name)
            or (models.plugins("manipulator").get(name, name))
        )
        config = {} if card is None else dict(card.config)
        return {"name": name, "config": config, "code": code_of(address)}

    def marks_of(self, *holders: object) -> tuple[str, ...]:
        """What tells the networks that some objects hold: their weights, and what cards add.

        A card's settings and a recognizer's threshold change numbers and stand in no weights.
        """
        marks = [*weights_of(*holders)]
        for network in networks_of(*holders):
            for name in sorted({str(getattr(part, "name", "")) for part in network.modules()}):
                if name in self._names:
                    card = self.store.card(name)
                    limits = [card.results.get(key) for key in ("threshold", "val_threshold")]
                    facts = card.architecture, dict(card.config), limits
                    marks.append(f"{name} {facts} {code_of(card.architecture)}")
        return tuple(sorted(set(marks)))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.store.names())

    def measure(self, text: str) -> tuple[Measure | SetMeasure, str]:
        """A metric and its pair."""
        return self._once(
            "measure",
            text,
            build=lambda: self._measure(text),
        )

    def _measure(self, text: str) -> tuple[Measure | SetMeasure, str]:
        measure, pair = metrics.load(text, store=self.store, device=self.device)
        facts = measure.facts(pair)
        if not isinstance(facts, Facts):  # of a plug-in
            raise ConfigError(f"`facts` of {text!r} gave a {type(facts).__name__}, not `Facts`")
        return measure, pair

    def about_sets(self, text: str) -> bool:
        """Whether a metric gives one number for all photos."""
        try:
            return isinstance(self.measure(text)[0], SetMeasure)
        except CellError:
            return text.partition("@")[0].partition(":")[0] in _SETS

    def weights(self) -> dict[str, str]:
        """Name -> SHA-256 of all networks that were loaded: of the file, where a card says it."""
        known = set(self.store.names())
        found: dict[str, str] = {}
        for network in self._networks():
            name = str(getattr(network, "name", "") or "")
            if name:
                digest = self.store.card(name).sha256 if name in known else ""
                found[name] = digest or state_of(network)
        return dict(sorted(found.items()))

    def _networks(self) -> Iterator[torch.nn.Module]:
        for made in list(self._made.values()):
            if not isinstance(made, CellError):
                yield from networks_of(made)


@lru_cache(maxsize=1)
def tools_for(weights_dir: Path | None, device: str) -> Tools:
    """The tools of this process."""
    return Tools(WeightStore(weights_dir), torch.device(device))
