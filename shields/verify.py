"""Re-open a protected photo and judge it in whole levels.

Nothing here trusts what was in memory when the photo was made: both files are read from disk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# The front door exports the function `verify` under the name of this module and so has to load it
# at once; everything that needs torch is therefore imported on use.
if TYPE_CHECKING:
    import torch

    from shields.budget import Budget
    from shields.models.base import Perceptual
    from shields.protectors.base import Protector
    from shields.shield import Region
    from shields.types import Photo

__all__ = ["RegionReport", "Report", "verify"]

#: rows compared at a time
_BAND = 128
#: sides below which the measures are not defined, pixels
_SSIM_WINDOW, _LPIPS_LEAST = 11, 32


@dataclass(frozen=True, kw_only=True)
class RegionReport:
    """One protected rectangle; fidelity is measured inside it, at full size."""

    left: int
    top: int
    width: int
    height: int
    largest_change: int
    psnr: float | None
    ssim: float | None
    lpips: float | None
    objective_before: float | None
    objective_after: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is left of a photo, and of its protection, in the saved file."""

    original: str
    protected: str
    #: file format of the protected photo as Pillow names it: "PNG", "WEBP", "JPEG"
    format: str
    #: the format rewrites pixels by itself, so the budget cannot hold
    lossy: bool
    width: int
    height: int
    same_size: bool
    #: largest change the budget allows, whole levels
    allowed_change: int
    #: largest change found, whole levels; None where sizes differ
    largest_change: int | None = None
    #: largest change outside the protected regions; None where they are not known
    outside_change: int | None = None
    #: share of pixels that changed at all
    changed_share: float | None = None
    #: decibels over the whole photo; None where the photos are equal or differ in size
    psnr: float | None = None
    #: mean structural similarity over the whole photo; None for sides under 11 pixels
    ssim: float | None = None
    #: mean over the regions, at working size
    lpips: float | None = None
    lpips_missing: str | None = None
    #: the method's own objective, mean over the regions; larger is more protected
    objective_before: float | None = None
    objective_after: float | None = None
    objective_missing: str | None = None
    regions: tuple[RegionReport, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def within_budget(self) -> bool:
        """Whether every value moved by no more than the budget allows."""
        return self.largest_change is not None and self.largest_change <= self.allowed_change

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the verdict first."""
        facts = dataclasses.asdict(self)
        lists = {"regions": list(facts["regions"]), "problems": list(facts["problems"])}
        return {"ok": self.ok, "within_budget": self.within_budget, **facts, **lists}


def verify(
    original: str | Path,
    protected: str | Path,
    budget: Budget,
    *,
    regions: Sequence[Region] | None = None,
    protector: Protector | None = None,
    perceptual: Perceptual | None = None,
    device: torch.device | str = "cpu",
    max_pixels: int | None = None,
) -> Report:
    """Compare a protected photo with its original, both read back from disk.

    Args:
        original: The photo as it was.
        protected: The file that was written.
        budget: What was allowed.
        regions: The rectangles that may differ; without them nothing is said about the rest.
        protector: Measures its objective before and after, given `regions`.
        perceptual: An LPIPS network, measured inside `regions`.
        device: Where the networks are.
        max_pixels: Limit for reading; the reader's own where left out.

    Raises:
        ImageError: One of the files cannot be read.
    """
    from shields.photo import read

    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    before, after = read(Path(original), **limit), read(Path(protected), **limit)
    name, lossy = _format(Path(protected))
    facts: dict[str, Any] = {
        "original": str(original),
        "protected": str(protected),
        "format": name,
        "lossy": lossy,
        "width": after.width,
        "height": after.height,
        "allowed_change": budget.whole_levels,
    }
    if before.pixels.shape != after.pixels.shape:
        problem = (
            f"sizes differ: the original is {before.width}x{before.height}, "
            f"the protected photo {after.width}x{after.height}"
        )
        return Report(**facts, same_size=False, problems=(problem,))
    facts |= _changes(before, after, regions)
    fidelity = _fidelity(before.pixels, after.pixels)
    facts |= fidelity
    measured = [
        _region(before, after, region, fidelity, protector, perceptual, device)
        for region in regions or ()
    ]
    facts |= {
        "lpips": _mean([region.lpips for region in measured]),
        "objective_before": _mean([region.objective_before for region in measured]),
        "objective_after": _mean([region.objective_after for region in measured]),
        "lpips_missing": None if perceptual is not None else "no LPIPS network was given",
        "objective_missing": _why_no_objective(regions, protector, measured),
    }
    problems = _problems(facts, before, after)
    return Report(**facts, same_size=True, regions=tuple(measured), problems=problems)


def _problems(facts: dict[str, Any], before: Photo, after: Photo) -> tuple[str, ...]:
    problems = []
    hint = f" ({facts['format']} rewrites pixels by itself; PNG keeps them)"
    hint = hint if facts["lossy"] else ""
    if facts["largest_change"] > facts["allowed_change"]:
        problems.append(
            f"a value moved by {facts['largest_change']} levels, "
            f"allowed are {facts['allowed_change']}{hint}"
        )
    if facts["outside_change"]:
        problems.append(
            f"pixels outside the protected regions moved by up to "
            f"{facts['outside_change']} levels{hint}"
        )
    if before.alpha is not None and not _same_alpha(before.alpha, after.alpha):
        problems.append(f"the transparency of the original was not kept{hint}")
    return tuple(problems)


def _same_alpha(before: np.ndarray, after: np.ndarray | None) -> bool:
    """Whether transparency is as it was; a fully opaque channel may be left out."""
    return bool((before == 255).all()) if after is None else np.array_equal(before, after)


def _why_no_objective(
    regions: Sequence[Region] | None, protector: Protector | None, measured: list[RegionReport]
) -> str | None:
    if regions is None:
        return "the protected regions are not known; pass the report of `shields protect`"
    if protector is None:
        return "no protector was given"
    if all(region.objective_after is None for region in measured):
        return f"{type(protector).__name__} states no objective"
    return None


def _bands(height: int, step: int = _BAND) -> Iterator[slice]:
    for first in range(0, height, step):
        yield slice(first, min(first + step, height))


def _changes(
    before: Photo, after: Photo, regions: Sequence[Region] | None
) -> dict[str, int | float | None]:
    outside = None if regions is None else np.ones((before.height, before.width), dtype=bool)
    if outside is not None:
        for region in regions or ():
            outside[region.placement.region] = False
    largest, largest_outside, changed = 0, 0, 0
    for rows in _bands(before.height):
        gap = np.abs(before.pixels[rows].astype(np.int16) - after.pixels[rows]).max(axis=2)
        largest = max(largest, int(gap.max()))
        changed += int(np.count_nonzero(gap))
        if outside is not None:
            largest_outside = max(largest_outside, int((gap * outside[rows]).max()))
    return {
        "largest_change": largest,
        "outside_change": None if outside is None else largest_outside,
        "changed_share": changed / (before.height * before.width),
    }


def _fidelity(before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """PSNR in decibels, None for equal photos, and SSIM, None for sides under 11 pixels."""
    from shields.metrics import photo_psnr

    psnr = photo_psnr(before, after)
    small = min(before.shape[:2]) < _SSIM_WINDOW
    return {
        "psnr": psnr if math.isfinite(psnr) else None,
        "ssim": None if small else _ssim(before, after),
    }


def _ssim(before: np.ndarray, after: np.ndarray) -> float:
    """SSIM of whole photos, computed only around what changed: it is 1 everywhere else."""
    from shields.metrics import photo_ssim

    down, across = np.zeros(before.shape[0], dtype=bool), np.zeros(before.shape[1], dtype=bool)
    for rows in _bands(len(before)):
        changed = (before[rows] != after[rows]).any(axis=2)
        down[rows] = changed.any(axis=1)
        across |= changed.any(axis=0)
    if not down.any():
        return 1.0
    box = _around(down), _around(across)
    share = before[box].size / before.size
    return 1 - share * (1 - photo_ssim(before[box], after[box]))


def _around(changed: np.ndarray) -> slice:
    """From the first to the last change, with all windows that touch one and what they look at."""
    found = np.flatnonzero(changed)
    return slice(max(0, int(found[0]) - _SSIM_WINDOW), int(found[-1]) + _SSIM_WINDOW + 1)


def _region(
    before: Photo,
    after: Photo,
    region: Region,
    whole: dict[str, float | None],
    protector: Protector | None,
    perceptual: Perceptual | None,
    device: torch.device | str,
) -> RegionReport:
    from shields.faces import crop

    box = region.placement
    ours, theirs = before.pixels[box.region], after.pixels[box.region]
    objective: tuple[float | None, float | None] = (None, None)
    distance = None
    if protector is not None or perceptual is not None:
        clean, mask = crop(before, box, device)
        protected, _ = crop(after, box, device)
        if protector is not None:
            objective = _objective(protector, region, clean, protected, mask)
        if perceptual is not None and min(box.size) >= _LPIPS_LEAST:
            distance = float(perceptual(clean, protected))
    changes = [
        int(np.abs(ours[part].astype(np.int16) - theirs[part]).max()) for part in _bands(box.height)
    ]
    return RegionReport(
        left=box.left,
        top=box.top,
        width=box.width,
        height=box.height,
        largest_change=max(changes),
        lpips=distance,
        objective_before=objective[0],
        objective_after=objective[1],
        **(whole if ours.shape == before.pixels.shape else _fidelity(ours, theirs)),
    )


def _objective(
    protector: Protector,
    region: Region,
    clean: torch.Tensor,
    protected: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[float | None, float | None]:
    landmarks = region.landmarks(clean.device)
    values = [
        protector.evaluate(clean, image, mask, landmarks=landmarks) for image in (clean, protected)
    ]
    before, after = (_finite(value) for value in values)
    return before, after


def _finite(value: torch.Tensor | None) -> float | None:
    """One number that JSON can hold, or None."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _format(path: Path) -> tuple[str, bool]:
    """Name a file's format and say whether it loses information."""
    from PIL import Image

    with Image.open(path) as file:
        name = file.format or path.suffix.lstrip(".").upper()
    if name == "WEBP":
        return name, _webp_is_lossy(path)
    return name, name in {"JPEG", "MPO", "AVIF", "HEIF", "GIF"}


def _webp_is_lossy(path: Path) -> bool:
    """Walk a WebP's chunks to the first picture: "VP8 " is the lossy codec, "VP8L" the other."""
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            if head[:4] in {b"VP8 ", b"VP8L"}:
                return head[:4] == b"VP8 "
            size = int.from_bytes(head[4:], "little")
            file.seek(size + size % 2, 1)
    return True
