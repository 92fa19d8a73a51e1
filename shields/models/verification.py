"""How well a recognizer tells people apart: pairs of photos, a threshold, and what it costs.

Source:
    Labeled Faces in the Wild (Huang, Ramesh, Berg, Learned-Miller, 2007),
    https://vis-www.cs.umass.edu/lfw/: the protocol, and the format of `pairs.txt`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from shields.errors import FaceNotFound, ImageError, ShieldsError
from shields.models.base import Detector, Recognizer
from shields.models.pairs import Pair, PhotoSet, draw_pairs, read_pairs
from shields.types import Image

__all__ = ["Rate", "Verification", "check_lfw", "histogram_rows", "verify_pairs"]

_FOLDS = 10
#: shares of false accepts at which true accepts are told, where there are pairs enough
_FALSE_ACCEPTS = (1e-2, 1e-3)
#: bars of a histogram, from -1 to 1
_BARS = 40
#: aligned faces that a recognizer sees at once
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What is accepted at a threshold that keeps false accepts rare."""

    #: share of impostor pairs that are accepted, at most
    false_accepts: float
    #: share of genuine pairs that are accepted
    true_accepts: float
    #: cosine above which a pair is accepted
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was measured; a pair counts as one person where its cosine is above a threshold."""

    #: name of the recognizer
    recognizer: str
    #: pairs of one person, and of two
    genuine: int
    impostor: int
    #: mean over folds, each judged with the threshold that is best on the other folds
    accuracy: float
    #: standard deviation of the folds' accuracies
    accuracy_deviation: float
    folds: int
    #: best threshold on all pairs, and the accuracy there (an optimist's figure)
    threshold: float
    best_accuracy: float
    #: only those that this many impostor pairs can tell
    rates: tuple[Rate, ...]
    #: mean cosines
    genuine_mean: float
    impostor_mean: float
    #: bars of equal width from -1 to 1, left to right
    genuine_bars: tuple[int, ...]
    impostor_bars: tuple[int, ...]
    #: seed of drawn pairs, and of the folds where none are given
    seed: int
    #: where pairs come from, in words
    protocol: str = ""
    #: photos embedded
    photos: int = 0
    #: photo -> why it could not be used
    failed: Mapping[str, str] = field(default_factory=dict)
    #: pairs left out because of such photos
    lost: int = 0
    seconds: float = 0.0


def histogram_rows(verification: Verification) -> list[tuple[float, float, int, int]]:
    """List (from, to, genuine pairs, impostor pairs) per bar of cosines, empty ends left out."""
    bars = list(zip(verification.genuine_bars, verification.impostor_bars, strict=True))
    filled = [index for index, bar in enumerate(bars) if any(bar)]
    width = 2 / len(bars)
    return [
        (round(index * width - 1, 6), round((index + 1) * width - 1, 6), *bars[index])
        for index in range(filled[0], filled[-1] + 1)
    ]


def verify_pairs(
    embeddings: Tensor,
    rows: Tensor,
    same: Tensor,
    *,
    name: str = "",
    fold: Tensor | None = None,
    seed: int = 0,
) -> Verification:
    """Judge pairs by the cosines of their embeddings.

    Args:
        embeddings: (N, D), unit length.
        rows: (P, 2) into `embeddings`.
        same: (P,) bool, whether a pair is one person.
        name: The recognizer's.
        fold: (P,) which fold a pair belongs to; ten random ones, or fewer, if left out.
        seed: Of the random folds.

    Raises:
        ImageError: Fewer than two pairs of one person or of two, or a single fold.
    """
    same = same.bool().cpu()
    # no matrix product: it would round on some accelerators
    cosine = (embeddings[rows[:, 0]].double() * embeddings[rows[:, 1]].double()).sum(dim=1).cpu()
    genuine, impostor = cosine[same], cosine[~same]
    if min(len(genuine), len(impostor)) < 2:
        raise ImageError(
            f"two pairs of one person and two of different people are the least, got "
            f"{len(genuine)} and {len(impostor)}"
        )
    fold = _random_folds(same, seed) if fold is None else fold.cpu()
    accuracies = _fold_accuracies(cosine, same, fold)
    threshold, best = _best_threshold(genuine, impostor)
    return Verification(
        recognizer=name,
        genuine=len(genuine),
        impostor=len(impostor),
        accuracy=float(accuracies.mean()),
        accuracy_deviation=float(accuracies.std(correction=0)),
        folds=len(accuracies),
        threshold=threshold,
        best_accuracy=best,
        rates=_rates(genuine, impostor),
        genuine_mean=float(genuine.mean()),
        impostor_mean=float(impostor.mean()),
        genuine_bars=_bars(genuine),
        impostor_bars=_bars(impostor),
        seed=seed,
    )


def _random_folds(same: Tensor, seed: int) -> Tensor:
    """Deal pairs of each kind to folds in turn, so that all folds have as many of each."""
    rng = torch.Generator().manual_seed(seed)
    folds = min(_FOLDS, int(same.sum()), int((~same).sum()))
    fold = torch.empty(len(same), dtype=torch.long)
    for kind in (same, ~same):
        where = kind.nonzero().flatten()
        fold[where[torch.randperm(len(where), generator=rng)]] = torch.arange(len(where)) % folds
    return fold


def _fold_accuracies(cosine: Tensor, same: Tensor, fold: Tensor) -> Tensor:
    """Accuracy on each fold, with the threshold that is best on all others."""
    names = sorted(set(fold.tolist()))
    if len(names) < 2:
        raise ImageError("two folds are the least, got one; give more pairs")
    accuracies = []
    for name in names:
        held, rest = fold == name, fold != name
        threshold, _ = _best_threshold(cosine[rest & same], cosine[rest & ~same])
        accuracies.append(((cosine[held] > threshold) == same[held]).double().mean())
    return torch.stack(accuracies)


def _best_threshold(genuine: Tensor, impostor: Tensor) -> tuple[float, float]:
    """The threshold with the most hits, the middle one of equals, and the share of its hits."""
    values = torch.tensor(sorted({*genuine.tolist(), *impostor.tolist()}), dtype=torch.float64)
    middles = (values[1:] + values[:-1]) / 2
    candidates = torch.cat([values[:1] - 1e-3, middles, values[-1:] + 1e-3])
    accepted = len(genuine) - torch.searchsorted(genuine.sort().values, candidates, right=True)
    rejected = torch.searchsorted(impostor.sort().values, candidates, right=True)
    hits = accepted + rejected
    best = (hits == hits.max()).nonzero().flatten()
    share = float(hits.max()) / (len(genuine) + len(impostor))
    return float(candidates[best[len(best) // 2]]), share


def _rates(genuine: Tensor, impostor: Tensor) -> tuple[Rate, ...]:
    falling = impostor.sort(descending=True).values
    rates = []
    for share in _FALSE_ACCEPTS:
        allowed = int(share * len(falling) + 1e-9)
        if allowed:  # fewer pairs than one in a hundred cannot tell one in a hundred
            threshold = float(falling[allowed])
            accepted = float((genuine > threshold).double().mean())
            rates.append(Rate(false_accepts=share, true_accepts=accepted, threshold=threshold))
    return tuple(rates)


def _bars(cosine: Tensor) -> tuple[int, ...]:
    index = ((cosine + 1) / 2 * _BARS).floor().long().clamp(0, _BARS - 1)
    return tuple(torch.bincount(index, minlength=_BARS).tolist())


def check_lfw(
    recognizer: Recognizer,
    source: Path,
    *,
    pairs: int = 600,
    seed: int = 0,
    detector: Detector | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Find faces, align, embed and verify pairs of photos, as on Labeled Faces in the Wild.

    Pairs are those of `pairs.txt` where one lies in the folder or beside the tar; else they are
    drawn: half of one person, half of two.

    Args:
        recognizer: What is measured.
        source: A folder or a tar with a folder of photos for each person.
        pairs: How many at most; LFW has 6,000.
        seed: Of drawn pairs.
        detector: MTCNN if left out; of several faces, the one nearest to the middle counts.
        progress: Called after every photo with (done, in all).

    Returns:
        What was measured; `failed` names the photos that could not be used.

    Raises:
        ImageError: The source cannot be read, or too few pairs can be used.
    """
    start = time.monotonic()
    photos = PhotoSet.open(source)
    official = photos.pairs_file
    failed: dict[str, str] = {}
    if official is None:
        wanted = draw_pairs(photos, pairs, torch.Generator().manual_seed(seed))
        protocol = f"{len(wanted)} pairs drawn with seed {seed}, people and then photos evenly"
    else:
        wanted, failed = read_pairs(official, photos, pairs)
        protocol = f"{len(wanted)} pairs of {official.name}, by its folds"
    embedded, bad = _embed(recognizer, photos, wanted, detector or _mtcnn(recognizer), progress)
    usable = [pair for pair in wanted if not bad.keys() & {pair.first, pair.second}]
    return replace(
        _judged(recognizer, embedded, usable, seed),
        protocol=protocol,
        photos=len(embedded),
        failed=failed | bad,
        lost=len(wanted) - len(usable),
        seconds=time.monotonic() - start,
    )


def _judged(
    recognizer: Recognizer,
    embedded: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    seed: int,
) -> Verification:
    if not pairs:
        raise ImageError("in none of the pairs could both photos be used; are there faces in them?")
    row = {name: index for index, name in enumerate(embedded)}
    fold = torch.tensor([pair.fold for pair in pairs])
    return verify_pairs(
        torch.stack(list(embedded.values())),
        torch.tensor([[row[pair.first], row[pair.second]] for pair in pairs]),
        torch.tensor([pair.same for pair in pairs]),
        name=recognizer.name,
        fold=fold if len(set(fold.tolist())) > 1 else None,
        seed=seed,
    )


def _mtcnn(recognizer: Recognizer) -> Detector:
    from shields.models import load
    from shields.weights import WeightStore

    return load("detector", "mtcnn", store=WeightStore(), device=recognizer.template.device)


@torch.no_grad()
def _embed(
    recognizer: Recognizer,
    photos: PhotoSet,
    pairs: Sequence[Pair],
    detector: Detector,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Embed every photo of the pairs once; also say which could not be used, and why."""
    names = {name for pair in pairs for name in (pair.first, pair.second)}
    embedded: dict[str, Tensor] = {}
    bad: dict[str, str] = {}
    waiting: dict[str, Image] = {}
    for done, (name, path) in enumerate(photos.files(names), start=1):
        try:
            waiting[name] = _aligned(recognizer, detector, path)
        except ShieldsError as error:
            bad[name] = str(error).replace(str(path), name)
        if len(waiting) == _BATCH or (waiting and done == len(names)):
            vectors = recognizer.embed(torch.cat(list(waiting.values()))).cpu()
            embedded |= dict(zip(waiting, vectors, strict=True))
            waiting.clear()
        if progress is not None:
            progress(done, len(names))
    return embedded, bad


def _aligned(recognizer: Recognizer, detector: Detector, path: Path) -> Image:
    """Cut the aligned face nearest to the middle: (1, 3, *crop_size), [0, 1]."""
    from shields.photo import read

    image = read(path).image(recognizer.template.device)
    faces = detector(image)
    if not faces:
        raise FaceNotFound("no face was found")
    # The subject stands in the middle; bystanders may be as large.
    middle = torch.tensor([image.shape[3] / 2, image.shape[2] / 2])
    points = [torch.as_tensor(face.landmarks).float() for face in faces]
    nearest = min(points, key=lambda five: float((five.mean(dim=0) - middle).norm()))
    return recognizer.align(image, recognizer.matrix(nearest[None].to(image), image))
