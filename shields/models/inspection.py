"""Check that a manipulator keeps its promises: for networks that somebody plugged in."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from shields.errors import ConfigError
from shields.models.manipulation import Condition, Manipulator
from shields.types import Image

__all__ = ["Check", "Inspection", "inspect"]

#: results that should be equal may differ by this, image units: a tenth of a level
_TOLERANCE = 0.1 / 255
#: share of the values that must lie in [0, 1], give or take a tenth: networks without a bound
#: overshoot here and there, a wrong range puts much of the picture outside
_INSIDE = 0.9


class Check(NamedTuple):
    """One promise."""

    name: str
    passed: bool
    #: what was seen
    detail: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found."""

    #: the manipulator's
    name: str
    checks: tuple[Check, ...]
    #: of one forward and backward pass of the batch, the second of two; 0 where it did not run
    seconds: float
    #: at most used by the GPU during that pass, or by this process in all its life on a CPU, bytes;
    #: 0 where it cannot be told
    memory: int

    @property
    def passed(self) -> bool:
        """Whether all promises are kept."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What came of the calls."""

    image: Image
    forged: Image
    again: Image
    singles: Image
    gradient: Tensor | None
    features: Tensor | None
    seconds: float
    memory: int


def inspect(
    manipulator: Manipulator,
    *,
    size: int = 256,
    batch: int = 2,
    rng: torch.Generator,
    condition: str = "",
) -> Inspection:
    """Run a manipulator on random smooth images, on the device it lies on.

    Args:
        manipulator: What is checked; nothing about it is changed.
        size: Side of the images, pixels.
        batch: How many; 2 or more, so that one could affect the other.
        rng: Draws the images.
        condition: What it is asked for; its first condition if left out.

    Returns:
        One row per promise. If it cannot be called at all, there is one row that says why.

    Raises:
        ConfigError: `size` or `batch` is too small.
        UnknownName: There is no such condition.
    """
    if batch < 2 or size < 8:
        raise ConfigError(f"inspect needs batch >= 2 and size >= 8, got {batch} and {size}")
    told = manipulator.condition(condition)
    device = _device(manipulator)
    image, weights = (_images(size, batch, rng).to(device) for _ in range(2))
    kept = image.clone()
    before = {name: buffer.clone() for name, buffer in manipulator.named_buffers()}
    try:
        seen = _look(manipulator, image, told, weights)
    except Exception as error:  # of a network that we know nothing about
        said = str(error).strip().partition("\n")[0]
        failed = Check("it runs", False, f"{type(error).__name__}: {said}")
        return Inspection(name=manipulator.name, checks=(failed,), seconds=0.0, memory=0)
    checks = (
        Check("it runs", True, f"batch {batch}, {size}x{size}, {device}, condition {told.name}"),
        *_about_result(seen),
        _about_gradient(seen.gradient),
        *_about_repetition(seen),
        Check("the input is not modified", torch.equal(kept, image), ""),
        *_about_state(manipulator, before),
        _about_features(seen),
    )
    return Inspection(
        name=manipulator.name, checks=checks, seconds=seen.seconds, memory=seen.memory
    )


def _device(manipulator: Manipulator) -> torch.device:
    tensors = [*manipulator.parameters(), *manipulator.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _images(size: int, batch: int, rng: torch.Generator) -> Image:
    """Blotches with a little noise, (B, 3, size, size), inside [0, 1]."""
    blotches = torch.rand(batch, 3, 8, 8, generator=rng)
    smooth = functional.interpolate(blotches, (size, size), mode="bilinear", align_corners=False)
    noise = torch.rand(batch, 3, size, size, generator=rng)
    return 0.95 * smooth + 0.05 * noise


def _look(manipulator: Manipulator, image: Image, condition: Condition, weights: Tensor) -> _Seen:
    def once() -> tuple[Image, Tensor | None, Tensor | None]:
        given = image.detach().requires_grad_(True)
        forged, features = manipulator.outputs(given, condition)
        gradient = None
        if forged.requires_grad and forged.shape == weights.shape:
            (gradient,) = torch.autograd.grad((forged * weights).sum(), given, allow_unused=True)
        return forged.detach(), features, gradient

    forged, features, _ = once()  # the first call may prepare things: it is not timed
    if image.is_cuda:
        torch.cuda.reset_peak_memory_stats(image.device)
        torch.cuda.synchronize(image.device)
    start = time.perf_counter()
    again, _, gradient = once()
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    seconds, memory = time.perf_counter() - start, _memory(image.device)
    with torch.no_grad():
        singles = torch.cat([manipulator(photo[None], condition) for photo in image])
    return _Seen(
        image=image, forged=forged, again=again, singles=singles, gradient=gradient,
        features=features, seconds=seconds, memory=memory,
    )  # fmt: skip


def _memory(device: torch.device) -> int:
    """Peak use, bytes: of the GPU since the last reset, or of this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _about_result(seen: _Seen) -> Iterator[Check]:
    forged, image = seen.forged, seen.image
    kept = forged.shape == image.shape and forged.dtype == image.dtype
    got = f"{tuple(forged.shape)} {str(forged.dtype).removeprefix('torch.')}"
    yield Check("shape and type are kept", kept, got)
    inside = float(((forged > -0.1) & (forged < 1.1)).float().mean())
    low, high = (float(value) for value in forged.aminmax())
    detail = f"[{low:.2f}, {high:.2f}], {inside:.0%} of it inside"
    yield Check("the result lies about in [0, 1]", inside >= _INSIDE, detail)


def _about_gradient(gradient: Tensor | None) -> Check:
    name = "a gradient reaches every image"
    if gradient is None:
        return Check(name, False, "none: something in the network cuts it, or draws on `no_grad`")
    if not bool(gradient.isfinite().all()):
        return Check(name, False, "it holds values that are not finite")
    shares = (gradient != 0).flatten(1).float().mean(dim=1)
    detail = f"at least {float(shares.min()):.0%} of the values are not 0"
    return Check(name, bool((shares > 0).all()), detail)


def _about_repetition(seen: _Seen) -> Iterator[Check]:
    for name, other in (
        ("two calls give the same", seen.again),
        ("a batch gives what its photos give one by one", seen.singles),
    ):
        if other.shape != seen.forged.shape:
            yield Check(name, False, f"{tuple(seen.forged.shape)}, then {tuple(other.shape)}")
            continue
        gap = float((other - seen.forged).abs().max())
        yield Check(name, gap <= _TOLERANCE, f"they differ by {gap * 255:.2g} levels")


def _about_state(manipulator: Manipulator, before: dict[str, Tensor]) -> Iterator[Check]:
    trained = [name for name, value in manipulator.named_parameters() if value.requires_grad]
    detail = f"{len(trained)} parameters do, such as {trained[0]}" if trained else ""
    yield Check("no parameter asks for a gradient", not trained, detail)
    now = dict(manipulator.named_buffers())
    changed = [name for name, value in before.items() if not torch.equal(value, now[name])]
    detail = f"changed: {', '.join(changed[:3])}; is a normalisation in training mode?"
    yield Check("the buffers stay as they were", not changed, detail if changed else "")


def _about_features(seen: _Seen) -> Check:
    name = "its feature map, if any, can be used"
    if seen.features is None:
        return Check(name, True, "it has none: methods that confuse features will refuse it")
    fits = seen.features.ndim == 4 and len(seen.features) == len(seen.image)
    used = fits and seen.features.requires_grad and bool(seen.features.isfinite().all())
    return Check(name, used, f"{tuple(seen.features.shape)}")
