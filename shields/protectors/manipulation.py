"""What protectors against manipulators share: which conditions count, and the clean forgeries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shields.errors import ConfigError, UnknownName
from shields.models.manipulation import Condition, Manipulator
from shields.protectors.base import IterativeConfig
from shields.types import Image

__all__ = ["ManipulatorConfig", "chosen_conditions", "forgeries"]


@dataclass(frozen=True, kw_only=True)
class ManipulatorConfig(IterativeConfig):
    """Loop and budget of a method that climbs against a manipulator."""

    #: what the manipulator is asked for, by name, separated by commas; empty = all that it lists.
    #: Names that it does not list count too: `smiling:0.5` (RelGAN), `hair_color=FILE` (HiSD)
    conditions: str = ""


def chosen_conditions(manipulator: Manipulator, names: str) -> list[Condition]:
    """Look up the conditions named in `names`, in that order, each once.

    Args:
        manipulator: Whose conditions they are.
        names: Names separated by commas, such as "blond_hair,smiling"; empty for all of them.

    Raises:
        UnknownName: The manipulator has no condition of one of the names.
        ConfigError: It is a talking head, or a condition makes no sense to it.
    """
    if not isinstance(manipulator, Manipulator):
        raise ConfigError(
            f"a {type(manipulator).__name__} gives no gradient to protect against; needed is a "
            "manipulator of images, see `shields.models.manipulation.wrap`"
        )
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    try:
        chosen = dict.fromkeys(wanted or manipulator.conditions)
        return [manipulator.condition(name) for name in chosen]
    except UnknownName as error:
        raise UnknownName(f"the setting `conditions`: {error}") from error


@torch.no_grad()
def forgeries(
    manipulator: Manipulator, image: Image, conditions: Sequence[Condition]
) -> list[Tensor]:
    """Forge the clean photo once per condition, before a loop that compares with the results.

    Args:
        manipulator: The network.
        image: (B, 3, H, W), [0, 1].
        conditions: What to forge.

    Returns:
        One (B, 3, H, W) float32 of about [0, 1] per condition, without a graph.
    """
    return [manipulator(image, condition).float() for condition in conditions]
