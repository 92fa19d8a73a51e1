"""What a learned protector is trained against, and where it is told to push the forgeries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.jpeg import carry
from shields.models.base import Recognizer
from shields.models.manipulation import Manipulator
from shields.registry import did_you_mean
from shields.types import Image

__all__ = ["Goal", "Likeness", "Task", "conditions_of", "distance", "goals_of", "gradient_of"]

Goal = Literal["white", "black", "grey", "negative", "away"]

_FLAT: Mapping[str, float] = {"white": 1.0, "black": 0.0, "grey": 0.5}


def goals_of(manipulators: Sequence[Manipulator], wanted: Mapping[str, str]) -> dict[str, Goal]:
    """Say for each manipulator where its forgeries shall go; white where nothing is wanted."""
    names = [manipulator.name for manipulator in manipulators]
    for name, goal in wanted.items():
        if name not in names:
            raise ConfigError(f"a target is given for {name!r}; {did_you_mean(name, names)}")
        if goal not in get_args(Goal):
            raise ConfigError(
                f"the target of {name!r} must be one of {', '.join(get_args(Goal))}, got {goal!r}"
            )
    return {name: next((g for g in get_args(Goal) if g == wanted.get(name)), "white")
            for name in names}  # fmt: skip


def conditions_of(
    manipulators: Sequence[Manipulator], wanted: Mapping[str, Sequence[str]]
) -> list[list[str]]:
    """Say what each manipulator is asked for by turns: all that it can do where nothing is wanted.

    Raises:
        ConfigError: A name that none of them has, or an empty list.
        UnknownName: A condition that the manipulator does not have.
    """
    known = [manipulator.name for manipulator in manipulators]
    for name, asked in wanted.items():
        if name not in known:
            raise ConfigError(f"conditions are given for {name!r}; {did_you_mean(name, known)}")
        if not asked:
            raise ConfigError(f"the conditions of {name!r} are empty; name one, or leave it out")
    found = [list(wanted.get(each.name, each.conditions)) for each in manipulators]
    for manipulator, asked in zip(manipulators, found, strict=True):
        for condition in asked:
            manipulator.condition(condition)
    return found


def distance(image: Image, reference: Image) -> Tensor:
    """Mean square (B,) of the difference in [-1, 1], the papers' L2."""
    return (2 * (image.float() - reference.float())).square().mean(dim=(1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One manipulator, what it is asked for, and what shall come of it."""

    manipulator: Manipulator
    condition: str
    goal: Goal = "white"
    #: with "away": the distance at which a forgery counts as far enough
    margin: float = 0.5

    @property
    def relative(self) -> bool:
        """Whether the goal depends on the clean forgery."""
        return self.goal not in _FLAT

    def forge(self, image: Image) -> Image:
        """Forge (B, 3, H, W), about [0, 1], not clamped."""
        return self.manipulator(image, self.condition)

    @torch.no_grad()
    def forge_clean(self, image: Image) -> Image:
        """Forge what others are compared with: float32, without a graph."""
        return self.forge(image).float().clamp(0, 1)

    def shortfall(
        self, image: Image, clean: Image | None, likeness: Callable[[Image], Tensor] | None = None
    ) -> Tensor:
        """How far the forgeries of a batch are from their goal: a number, smaller is better.

        Args:
            image: (B, 3, H, W), [0, 1].
            clean: What `forge_clean` made of the clean photos, for goals that are `relative`.
            likeness: Adds what a forgery still shows of the person.
        """
        forged = self.forge(image)
        short = self._missed(forged, clean)
        return short if likeness is None else short + likeness(forged)

    def _missed(self, forged: Image, clean: Image | None) -> Tensor:
        if self.goal in _FLAT:
            return distance(forged, torch.full_like(forged, _FLAT[self.goal])).mean()
        assert clean is not None, "a relative goal needs the clean forgery"
        if self.goal == "negative":
            return distance(forged, 1 - clean).mean()
        # Photos that are far enough no longer pull: the others get the whole effort.
        return (self.margin - distance(forged.clamp(0, 1), clean)).clamp_min(0).mean()

    def restored(self, image: Image, clean: Image) -> Tensor:
        """How far the forgeries are from the clean ones, in the mean: the Adv Net's Eq. 8."""
        return distance(self.forge(image), clean).mean()


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """What forgeries still show of a person, in the eyes of recognizers."""

    recognizers: Sequence[Recognizer]
    weight: float

    def to(self, photo: Image, landmarks: Tensor) -> Callable[[Image], Tensor]:
        """Function of forgeries: the mean cosine with the photos, no less than zero, weighed.

        Args:
            photo: (B, 3, H, W), [0, 1]; both may have been moved about, as long as it is alike.
            landmarks: (B, 5, 2), pixels of the photos before.
        """
        seen = [
            (network.to(photo.device), network.matrix(landmarks, photo))
            for network in self.recognizers
        ]
        with torch.no_grad():
            people = [network(photo, matrix) for network, matrix in seen]

        def alike(forged: Image) -> Tensor:
            image = forged.float().clamp(0, 1)
            cosines = [
                (network(image, matrix) * person).sum(dim=1)
                for (network, matrix), person in zip(seen, people, strict=True)
            ]
            # Nobody is less than a stranger: below zero nothing is gained.
            return self.weight * torch.stack(cosines).clamp_min(0).mean()

        return alike


def gradient_of(view: Image, objectives: Sequence[Callable[[Image], Tensor]]) -> Tensor:
    """Mean of objectives at a view, one network's graph in memory at a time.

    Args:
        view: (B, 3, H, W), with a graph behind it.
        objectives: Each maps an image to one number.

    Returns:
        A number with the mean's value, whose gradient leads through `view` as the mean's would; the
        objectives' own graphs are gone.
    """
    gradient, total = torch.zeros_like(view), view.new_zeros(())
    for objective in objectives:
        leaf = view.detach().requires_grad_()
        value = objective(leaf)
        (part,) = torch.autograd.grad(value, leaf)
        gradient += part / len(objectives)
        total += value.detach() / len(objectives)
    return carry(total, (view * gradient).sum())
