"""Packed faces as batches: split by identity, cropped or aligned, augmented as whole batches."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from shields.errors import ImageError
from shields.faces import similarity
from shields.masks import CLASSES

__all__ = ["FacePack", "FacePacks", "augment", "batches_done", "held_out", "jittered_alignment",
           "middle", "random_crop", "whole_entries"]  # fmt: skip

_LOG = logging.getLogger(__name__)
#: what a face may have beside it, so that a trainer need not compute it: names of tensors in a pack
_PARTS, _HEAT = "parts", "heat:"


def held_out(identity: str, share: float) -> bool:
    """Say whether a person belongs to the validation split; a hash decides, so it never changes."""
    digest = hashlib.sha256(identity.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


class FacePack(Dataset[dict[str, Tensor]]):
    """One file made by `trainers.pack`, either its training or its validation people.

    An item is `face` (3, S, S) uint8, `landmarks` (5, 2) float32 in its pixels, `identity` (), and,
    where attributes are asked for, `labels` (N,) int64, 0 or 1; faces without all labels are left
    out. Where the pack holds them, it is also `parts` (S, S) uint8, indices into
    `shields.masks.CLASSES`, and `heat:METHOD:RECOGNIZER` (S, S) uint8, 255 = warmest.

    Damaged entries are left out, counted in `damaged`, and named in a warning of the log.
    """

    def __init__(
        self, path: Path, *, validation: bool, share: float = 0.1, attributes: Sequence[str] = ()
    ) -> None:
        if not path.is_file():
            raise ImageError(f"no face pack at {path}; make it with `shields train pack`")
        with _opened(path) as archive:
            names = json.loads(archive.metadata()["identities"])
            self.faces, self.landmarks, self.identity = _entries(archive, path)
            whole = whole_entries(self.landmarks, self.identity, len(names))
            self.damaged = int((~whole).sum())
            if self.damaged:
                _LOG.warning("%s", _complaint(archive, path, whole))
            wanted = torch.tensor([held_out(name, share) == validation for name in names])
            usable = whole & wanted[self.identity.clamp(0, len(names) - 1)]
            self.labels = None
            if attributes:
                self.labels = _labels(archive, path, attributes)
                usable = usable & (self.labels >= 0).all(dim=1)
            self.index = usable.nonzero().flatten()
            self.beside = _beside(archive, path, len(self.faces))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        row = int(self.index[item])
        sample = {
            "face": self.faces[row].permute(2, 0, 1),
            "landmarks": self.landmarks[row],
            "identity": self.identity[row],
        }
        if self.labels is not None:
            sample["labels"] = self.labels[row]
        return sample | {name: values[row] for name, values in self.beside.items()}


def whole_entries(landmarks: Tensor, identity: Tensor, people: int) -> Tensor:
    """Say which entries of a pack can be used: landmarks are numbers, eyes apart, people known.

    Args:
        landmarks: (N, 5, 2).
        identity: (N,).
        people: How many there are.

    Returns:
        (N,), bool.
    """
    finite = landmarks.isfinite().all(dim=2).all(dim=1)
    apart = (landmarks[:, 0] != landmarks[:, 1]).any(dim=1)
    return finite & apart & (identity >= 0) & (identity < people)


def _opened(path: Path) -> Any:  # noqa: ANN401  untyped
    try:
        archive: Any = safe_open(path, framework="pt")
        known = archive.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ImageError(f"{path} is no face pack: {error}") from error
    if "identities" not in known:
        raise ImageError(f"{path} is no face pack; make one with `shields train pack`")
    return archive


def _entries(archive: Any, path: Path) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401  untyped
    try:
        found = [archive.get_tensor(name) for name in ("faces", "landmarks", "identity")]
    except SafetensorError as error:
        raise ImageError(f"{path} is no face pack: {error}") from error
    faces, landmarks, identity = found
    alike = faces.ndim == 4 and faces.shape[1] == faces.shape[2] and faces.dtype == torch.uint8
    count = len(faces)
    if not alike or landmarks.shape != (count, 5, 2) or identity.shape != (count,) or not count:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in found)
        raise ImageError(f"{path} is no face pack: faces, landmarks and identity are {shapes}")
    return faces, landmarks, identity


def _complaint(archive: Any, path: Path, whole: Tensor) -> str:  # noqa: ANN401  untyped
    files = json.loads(archive.metadata().get("files", "[]"))
    bad = (~whole).nonzero().flatten().tolist()
    named = [files[row] if row < len(files) else f"entry {row}" for row in bad[:5]]
    more = f" and {len(bad) - len(named)} more" if len(bad) > len(named) else ""
    return f"{path}: left out {len(bad)} damaged faces: {', '.join(named)}{more}"


def _beside(archive: Any, path: Path, count: int) -> dict[str, Tensor]:  # noqa: ANN401  untyped
    names = [name for name in archive.keys()  # noqa: SIM118  no mapping
             if name == _PARTS or name.startswith(_HEAT)]  # fmt: skip
    found = {name: archive.get_tensor(name) for name in names}
    if any(len(values) != count for values in found.values()):
        raise ImageError(f"{path} is damaged: it has not one mask a face; pack it again")
    if _PARTS in found and json.loads(archive.metadata().get("classes", "[]")) != list(CLASSES):
        raise ImageError(f"{path} numbers the parts of a face in another way; pack it again")
    return found


def _labels(archive: Any, path: Path, attributes: Sequence[str]) -> Tensor:  # noqa: ANN401  untyped
    known = json.loads(archive.metadata().get("attributes", "[]"))
    absent = [name for name in attributes if name not in known]
    if absent:
        raise ImageError(
            f"{path} holds no labels for {', '.join(absent)} (it has: {', '.join(known) or 'none'})"
            "; make it with `shields train pack --labels FILE.csv --attribute NAME=COLUMN:YES|NO`"
        )
    labels: Tensor = archive.get_tensor("labels")
    return labels[:, [known.index(name) for name in attributes]].long()


class _Mixture(DistributedSampler[int]):
    """Batches from weighted packs, each batch from one; a batch depends on its number alone.

    Numbers go on from where training stands, so a resumed run sees the batches it would have seen;
    epochs are no help there, because Lightning may count one twice when it resumes. Of several
    processes each takes its share of one large batch: two of them with batches of 8 see what one
    sees with batches of 16. Lightning leaves a `DistributedSampler` as it is.
    """

    def __init__(
        self, packs: Dataset[dict[str, Tensor]], sizes: list[int], weights: list[float],
        batch: int, batches: int, seed: int, place: Callable[[], tuple[int, int, int]],
    ) -> None:  # fmt: skip
        _, rank, ranks = place()
        super().__init__(packs, num_replicas=ranks, rank=rank, shuffle=False)
        self.sizes, self.weights = sizes, torch.tensor(weights, dtype=torch.float32)
        self.batch, self.batches, self.seed, self.place = batch, batches, seed, place

    def __len__(self) -> int:
        return self.batches * self.batch

    def __iter__(self) -> Iterator[int]:
        starts = torch.tensor([0, *self.sizes]).cumsum(0)
        first, rank, ranks = self.place()
        for number in range(first, first + self.batches):
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            which = int(torch.multinomial(self.weights, 1, generator=rng))
            rows = torch.randint(self.sizes[which], (self.batch * ranks,), generator=rng)
            own = rows[rank * self.batch : (rank + 1) * self.batch]
            yield from (own + starts[which]).tolist()


class _Batches(DataLoader[dict[str, Tensor]]):
    """A loader that Lightning may stop in the middle of an epoch: the sampler knows the way on."""

    def state_dict(self) -> dict[str, object]:
        """Nothing: a batch depends on its number, which the trainer keeps."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Nothing to load."""


def batches_done(trainer: pl.Trainer) -> int:
    """Count the batches trained on, those before a resumption included.

    `global_step` counts the steps of every optimizer, and a GAN has two of them.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


class FacePacks(pl.LightningDataModule):
    """Batches from one or several packs.

    Args:
        packs: Files made by `shields train pack`.
        weights: How often a batch comes from each pack; equal if left out.
        batch: Faces in a batch of one process.
        batches: Batches in an epoch.
        validation_pack: The file whose held-out people are validated on; the first if left out.
        share: Share of the people that is held out.
        seed: Fixes which faces a batch holds.
        attributes: Labels that every face must have; they come with the batch in this order.
    """

    def __init__(
        self,
        packs: list[Path],
        weights: list[float] | None = None,
        batch: int = 16,
        batches: int = 500,
        validation_pack: Path | None = None,
        share: float = 0.1,
        seed: int = 0,
        attributes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.attributes = attributes
        self.packs, self.weights = packs, weights or [1.0] * len(packs)
        self.batch, self.batches, self.share, self.seed = batch, batches, share, seed
        self.validation_pack = validation_pack or packs[0]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of the training people."""
        sets = [self._pack(path, validation=False) for path in self.packs]
        joined: ConcatDataset[dict[str, Tensor]] = ConcatDataset(sets)
        sizes = [len(part) for part in sets]
        for path, size in zip(self.packs, sizes, strict=True):
            if not size:
                raise ImageError(f"{path} has no usable face of a person that is trained on")
        sampler = _Mixture(
            joined, sizes, self.weights, self.batch, self.batches, self.seed, self._place
        )
        return _Batches(joined, batch_size=self.batch, sampler=sampler)

    def _place(self) -> tuple[int, int, int]:
        """Batches done, which process this is, and how many there are."""
        trainer = self.trainer
        if trainer is None:
            return 0, 0, 1
        return batches_done(trainer), trainer.global_rank, trainer.world_size

    def _pack(self, path: Path, *, validation: bool) -> FacePack:
        return FacePack(path, validation=validation, share=self.share, attributes=self.attributes)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """All held-out people of the validation pack, in order."""
        held = self._pack(self.validation_pack, validation=True)
        return DataLoader(held, batch_size=self.batch)


def middle(face: Tensor, share: float) -> tuple[Tensor, int]:
    """Cut the middle square of a share of the side: (B, 3, side, side), and where it starts."""
    side = round(face.shape[-1] * share)
    start = (face.shape[-1] - side) // 2
    return face[..., start : start + side, start : start + side], start


def random_crop(face: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Cut one random square for the whole batch and mirror a random half: (B, 3, size, size)."""
    height, width = face.shape[2:]
    top = int(torch.randint(height - size + 1, (), generator=rng))
    left = int(torch.randint(width - size + 1, (), generator=rng))
    cut = face[..., top : top + size, left : left + size]
    mirror = (torch.rand(len(face), 1, 1, 1, generator=rng) < 0.5).to(face.device)
    return torch.where(mirror, cut.flip(-1), cut)


def jittered_alignment(
    landmarks: Tensor, template: Tensor, rng: torch.Generator, *, strength: float = 1.0
) -> Tensor:
    """Crop-from-image matrices (B, 2, 3) with a random turn, scale, shift and mirror each."""
    count = len(landmarks)
    angle = torch.randn(count, generator=rng) * math.radians(6) * strength
    scale = 1 + torch.randn(count, generator=rng) * 0.05 * strength
    shift = torch.randn(count, 2, generator=rng) * 2.5 * strength
    mirror = torch.where(torch.rand(count, generator=rng) < 0.5 * strength, -1.0, 1.0)
    center = template.mean(0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    turn = torch.stack(
        [torch.stack([cos * mirror, -sin], -1), torch.stack([sin * mirror, cos], -1)], 1
    )
    matrix = similarity(landmarks, template)
    # About the template's middle: move it to the origin, turn, move it back.
    linear = turn @ matrix[:, :, :2]
    offset = (turn @ (matrix[:, :, 2] - center)[..., None])[..., 0] + center + shift
    return torch.cat([linear, offset[..., None]], dim=2)


def augment(face: Tensor, rng: torch.Generator) -> Tensor:
    """Colour, softness, noise and mixtures of two faces: (B, 3, H, W), [0, 1] -> the same.

    A teacher labels the result, so it may be harsher than what keeps a label by hand.
    """

    def draw(low: float, high: float, width: int = 1) -> Tensor:
        values = torch.rand(len(face), width, 1, 1, generator=rng)
        return (low + (high - low) * values).to(face)

    def choose(share: float) -> Tensor:
        return draw(0, 1) < share

    mean = face.mean(dim=(1, 2, 3), keepdim=True)
    face = (face - mean) * draw(0.6, 1.4) + mean + draw(-0.12, 0.12)
    grey = face.mean(dim=1, keepdim=True)
    face = grey + (face - grey) * draw(0.0, 1.6)
    face = face * draw(0.9, 1.1, 3)
    height, width = face.shape[2:]
    factor = float(torch.rand((), generator=rng)) * 0.6 + 0.35
    small = functional.interpolate(
        face, scale_factor=factor, mode="bilinear", antialias=True, recompute_scale_factor=True
    )
    soft = functional.interpolate(small, size=(height, width), mode="bilinear")
    face = torch.where(choose(0.4), soft, face)
    noise = torch.randn(face.shape, generator=rng).to(face)
    face = face + torch.where(choose(0.5), noise * draw(0, 0.06), 0.0)
    share = torch.where(choose(0.3), draw(0.0, 0.5), 0.0)
    face = (1 - share) * face + share * face.roll(1, dims=0)
    return face.clamp(0, 1)
