"""Packed faces as batches: split by identity, cropped or aligned, augmented as whole batches."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler

from shields.errors import ImageError
from shields.faces import similarity

__all__ = ["FacePack", "FacePacks", "augment", "batches_done", "held_out", "jittered_alignment",
           "middle", "random_crop"]  # fmt: skip


def held_out(identity: str, share: float) -> bool:
    """Say whether a person belongs to the validation split; a hash decides, so it never changes."""
    digest = hashlib.sha256(identity.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


class FacePack(Dataset[dict[str, Tensor]]):
    """One file made by `trainers.pack`, either its training or its validation people.

    An item is `face` (3, S, S) uint8, `landmarks` (5, 2) float32 in its pixels, `identity` (), and,
    where attributes are asked for, `labels` (N,) int64, 0 or 1; faces without all labels are left
    out.
    """

    def __init__(
        self, path: Path, *, validation: bool, share: float = 0.1, attributes: Sequence[str] = ()
    ) -> None:
        if not path.is_file():
            raise ImageError(f"no face pack at {path}; make it with `shields train pack`")
        with _opened(path) as archive:
            names = json.loads(archive.metadata()["identities"])
            identity = archive.get_tensor("identity")
            wanted = torch.tensor([held_out(name, share) == validation for name in names])
            usable = wanted[identity]
            self.labels = None
            if attributes:
                self.labels = _labels(archive, path, attributes)
                usable = usable & (self.labels >= 0).all(dim=1)
            self.index = usable.nonzero().flatten()
            self.faces = archive.get_tensor("faces")
            self.landmarks = archive.get_tensor("landmarks")
        self.identity = identity

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
        return sample


def _opened(path: Path) -> Any:  # noqa: ANN401  untyped
    try:
        archive: Any = safe_open(path, framework="pt")
        known = archive.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ImageError(f"{path} is no face pack: {error}") from error
    if "identities" not in known:
        raise ImageError(f"{path} is no face pack; make one with `shields train pack`")
    return archive


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


class _Mixture(Sampler[list[int]]):
    """Batches from weighted packs, each batch from one; a batch depends on its number alone.

    Numbers go on from where training stands, so a resumed run sees the batches it would have seen;
    epochs are no help there, because Lightning may count one twice when it resumes.
    """

    def __init__(
        self, sizes: list[int], weights: list[float], batch: int, batches: int, seed: int,
        position: Callable[[], int],
    ) -> None:  # fmt: skip
        self.sizes, self.weights = sizes, torch.tensor(weights, dtype=torch.float32)
        self.batch, self.batches, self.seed, self.position = batch, batches, seed, position

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        starts = torch.tensor([0, *self.sizes]).cumsum(0)
        first = self.position()
        for number in range(first, first + self.batches):
            rng = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            which = int(torch.multinomial(self.weights, 1, generator=rng))
            rows = torch.randint(self.sizes[which], (self.batch,), generator=rng)
            yield (rows + starts[which]).tolist()


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
        batch: Faces in a batch.
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
        sampler = _Mixture(
            sizes, self.weights, self.batch, self.batches, self.seed, self._batches_done
        )
        return DataLoader(joined, batch_sampler=sampler)

    def _batches_done(self) -> int:
        trainer = self.trainer
        if trainer is None:
            return 0
        return batches_done(trainer)

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
