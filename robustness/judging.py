"""Pairs of images to numbers, many at once; one that cannot be measured takes no other along."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robustness.images import Stored
from robustness.metrics import Measure, Scene, SetMeasure
from robustness.tools import Tools, explain
from shields.types import Image

__all__ = ["Context", "Look", "measured", "scene_of"]

#: pixels of one batch
_BATCH = 2**22


@dataclass(frozen=True, kw_only=True)
class Look:
    """A pair of images that a metric shall look at."""

    #: of the row that is filled
    place: int
    #: with its pair
    metric: str
    condition: str
    description: str
    image: Stored
    other: Stored


@dataclass(frozen=True, kw_only=True)
class Context:
    """The clean photo that all looks of a unit are about."""

    #: (1, 3, H, W)
    clean: Image
    #: (1, 5, 2), pixels of the clean photo; NaN where it shows no face
    landmarks: Tensor


def scene_of(context: Context, looks: Sequence[Look]) -> Scene:
    """What is known of a batch of looks of one condition and description."""
    count = len(looks)
    return Scene(
        clean=context.clean.expand(count, -1, -1, -1),
        keys=tuple(look.other.digest for look in looks),
        landmarks=context.landmarks.expand(count, -1, -1),
        prompt=looks[0].condition,
        description=looks[0].description,
    )


def measured(
    looks: Sequence[Look], clean: Stored, tools: Tools
) -> Iterator[tuple[int, float | None, str]]:
    """Give the place, the value and, where there is none, the reason of every look.

    A value is NaN where the metric says that it is not defined, None where it failed.

    Args:
        looks: Of one photo.
        clean: That photo.
        tools: What measures.
    """
    try:
        image = clean.image(tools.device)
        context = Context(clean=image, landmarks=tools.landmarks(image, clean.digest))
    except Exception as error:  # of the detector: no face is not the same as not knowing
        yield from ((look.place, None, explain(error)) for look in looks)
        return
    groups: dict[tuple[object, ...], list[Look]] = {}
    for look in looks:
        sizes = look.image.pixels.shape, look.other.pixels.shape
        groups.setdefault((look.metric, look.condition, look.description, *sizes), []).append(look)
    for group in groups.values():
        try:
            measure, _ = tools.measure(group[0].metric)
        except Exception as error:  # of a plug-in: anything
            yield from ((look.place, None, explain(error)) for look in group)
            continue
        assert not isinstance(measure, SetMeasure), "sets are measured when all photos are done"
        largest = max(context.clean.shape[2] * context.clean.shape[3], 1)
        batch = max(1, _BATCH // largest)
        for first in range(0, len(group), batch):
            yield from _values(measure, group[first : first + batch], context, tools.device)


def _values(
    measure: Measure, looks: Sequence[Look], context: Context, device: torch.device
) -> Iterator[tuple[int, float | None, str]]:
    image, other = (
        torch.cat([stored.image(device) for stored in batch])
        for batch in ([look.image for look in looks], [look.other for look in looks])
    )
    try:
        values = measure.measure(image, other, scene_of(context, looks)).tolist()
    except Exception as error:  # one of them may be to blame
        if len(looks) > 1:
            for look in looks:
                yield from _values(measure, [look], context, device)
        else:
            yield looks[0].place, None, explain(error)
        return
    for look, value in zip(looks, values, strict=True):
        yield look.place, value, measure.undefined if math.isnan(value) else ""
