"""The engine that works the units of a suite off on Ray.

Units are those of the serial run, and the folder of images is all that they share: an image that
one worker has left there, none computes again. So the folder has to be one that all machines see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from robustness.runner import Engine
from robustness.unit import OnAttack, Outcome, Unit, work
from shields.spread import Workers, spread

__all__ = ["on_ray"]


def on_ray(workers: Workers) -> Engine:
    """An engine; a unit whose process dies again and again becomes rows that say so.

    Args:
        workers: The processes, and where they are.
    """

    def engine(units: Sequence[Unit], on_attack: OnAttack) -> Iterator[Outcome]:
        sent = [dataclasses.replace(unit, device=workers.device(unit.device)) for unit in units]
        return spread(
            work,
            sent,
            workers,
            lost=_lost,
            # What the unprotected photo leaves, the others compare with; once is enough.
            first=lambda unit: unit.protection.label == "none",
            # Units that are done before their turn move the bar as attacks of the present one do.
            on_waiting=lambda count: on_attack(count, 1),
        )

    return engine


def _lost(unit: Unit, reason: str) -> Outcome:
    # This process may have no GPU, and computes nothing here.
    return work(dataclasses.replace(unit, device="cpu", problem=reason))
