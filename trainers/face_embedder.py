"""Train `face-embedder`, the embedded recognizer, on the embeddings of a published one.

The teacher labels every augmented face anew, mixtures of two faces included, so there is no limit
to the training set, and the student learns the teacher as a function, slopes included; that is what
lets a perturbation made on one carry over to the other.

Source:
    MobileFaceNets (Chen et al., 2018), https://arxiv.org/abs/1804.07573, as the teacher.
    Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean, 2015),
    https://arxiv.org/abs/1503.02531.
    Relational Knowledge Distillation (Park et al., 2019), https://arxiv.org/abs/1904.05068: the
    batch's similarity matrix is matched beside the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from shields.faces import warp
from shields.models import load
from shields.models.base import Recognizer
from shields.models.networks import FaceEmbedder
from shields.weights import WeightStore
from trainers.data import augment, jittered_alignment
from trainers.portrait_ae import with_cosine

__all__ = ["FaceEmbedderTraining", "attacked", "verification_accuracy", "verification_pairs"]


def verification_pairs(identity: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` pairs of the same and `count` of different people.

    Returns:
        Rows (2 * count, 2) into `identity`, and whether a pair is one person, (2 * count,) bool.
    """
    same = torch.combinations(torch.arange(len(identity)), 2)
    equal = identity[same[:, 0]] == identity[same[:, 1]]
    pairs = []
    for candidates in (same[equal], same[~equal]):
        order = torch.randperm(len(candidates), generator=rng)[:count]
        pairs.append(candidates[order])
    labels = torch.cat([torch.ones(len(pairs[0])), torch.zeros(len(pairs[1]))]).bool()
    return torch.cat(pairs), labels


def verification_accuracy(
    similarity: Tensor, same: Tensor, rng: torch.Generator, *, folds: int = 10
) -> tuple[float, float]:
    """Accuracy over folds, each with the threshold that is best on the others, and the mean one.

    Args:
        similarity: (N,) cosines of pairs.
        same: (N,) bool, whether a pair is one person.
        rng: Shuffles the pairs into folds.
        folds: Number of folds; fewer where there are few pairs, and NaN where there is but one.
    """
    folds = min(folds, len(same) // 2)
    if folds < 2:
        return math.nan, math.nan
    order = torch.randperm(len(same), generator=rng)
    right, thresholds = 0, []
    for fold in order.chunk(folds):
        rest = torch.ones(len(same), dtype=torch.bool)
        rest[fold] = False
        values = similarity[rest].sort().values
        candidates = (values[1:] + values[:-1]) / 2
        hits = ((similarity[rest][None] > candidates[:, None]) == same[rest][None]).sum(dim=1)
        threshold = float(candidates[hits.argmax()])
        thresholds.append(threshold)
        right += int(((similarity[fold] > threshold) == same[fold]).sum())
    return right / len(same), sum(thresholds) / len(thresholds)


def attacked(
    face: Tensor, embed: Callable[[Tensor], Tensor], reach: float, rng: torch.Generator
) -> Tensor:
    """Move faces away from themselves, as one network sees it, by two softened sign steps.

    Args:
        face: (B, 3, H, W), [0, 1].
        embed: The network, (B, 3, H, W) -> (B, D), unit length.
        reach: Largest perturbation, levels; a random share of it is used.
        rng: Draws the share, the start and how far gradients are softened, for the whole batch.
    """
    epsilon = float(torch.rand((), generator=rng)) * reach / 255
    width = int(torch.randint(0, 4, (), generator=rng)) * 2 + 1
    with torch.no_grad():
        wanted = embed(face)
    moved = (torch.rand(face.shape, generator=rng).to(face) * 2 - 1) * epsilon
    for _ in range(2):
        moved.requires_grad_(True)
        cosine = (embed((face + moved).clamp(0, 1)) * wanted).sum()
        (gradient,) = torch.autograd.grad(cosine, moved)
        soft = functional.avg_pool2d(gradient, width, stride=1, padding=width // 2)
        moved = (moved.detach() - 0.7 * epsilon * soft.sign()).clamp(-epsilon, epsilon)
    return (face + moved).clamp(0, 1)


class FaceEmbedderTraining(pl.LightningModule):
    """Distil embeddings and their similarities.

    Args:
        widths: Channels of the four stages.
        blocks: Residual blocks of the four stages.
        teacher: Name of the recognizer that is distilled.
        relation_weight: Weight of the squared error of the batch's similarity matrix.
        rate: AdamW's peak learning rate.
        warmup: Steps until the peak.
        decay: Weight decay.
        pairs: Same and different pairs, each, that validation verifies.
        adversarial: Share of each batch that is perturbed, [0, 1], half of it against the student
            and half against the teacher. The teacher says what it sees in them, so the student
            loses the directions in which it alone can be fooled and learns those of the teacher;
            what fools the one then carries over to the other.
        reach: Largest perturbation, levels.
        start: Checkpoint whose weights training begins with.
        seed: Fixes the augmentation.
    """

    #: what the card says beside what is measured
    CARD: ClassVar[dict[str, str]] = {
        "role": "recognizer",
        "architecture": "face-embedder",
        "summary": "Embedded face recognizer, 128-d, distilled from mobilefacenet.",
        "licence": "Apache-2.0 for our weights; distilled from a network published without a "
        "stated licence and trained on LFW (research use)",
        "data": "11,684 LFW faces of 5,151 people; a tenth of the people, chosen by a hash of the "
        "name, is held out; results on pairs of held-out people",
        "teacher": "mobilefacenet (Xiaoccer/MobileFaceNet_Pytorch, CASIA-WebFace)",
    }

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 256),
        blocks: tuple[int, ...] = (1, 2, 2, 1),
        teacher: str = "mobilefacenet",
        relation_weight: float = 2.0,
        rate: float = 3e-3,
        warmup: int = 300,
        decay: float = 0.02,
        pairs: int = 600,
        adversarial: float = 0.0,
        reach: float = 12.0,
        start: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["start"])
        self.network = FaceEmbedder(widths=widths, blocks=blocks)
        self.network = self.network.to(memory_format=torch.channels_last)
        self.relation_weight, self.rate, self.warmup = relation_weight, rate, warmup
        self.decay, self.pairs, self.seed = decay, pairs, seed
        self.adversarial, self.reach = adversarial, reach
        self.start = start
        cpu = torch.device("cpu")
        # A list hides the teacher from checkpoints and from the optimizer.
        self._teacher = [load("recognizer", teacher, store=WeightStore(), device=cpu)]
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []

    def setup(self, stage: str) -> None:
        """Take over the weights of `start`; a checkpoint that is resumed comes after this."""
        if stage == "fit" and self.start is not None:
            state = torch.load(self.start, map_location="cpu", weights_only=True)["state_dict"]
            self.load_state_dict(state)

    @property
    def teacher(self) -> Recognizer:
        """The frozen teacher, on this module's device."""
        return self._teacher[0].to(self.device)

    def embed(self, face: Tensor) -> Tensor:
        """Student's unit embeddings of aligned faces in [0, 1]."""
        face = face.contiguous(memory_format=torch.channels_last)
        signed = (face * 255 - 127.5) / 128
        return functional.normalize(self.network(signed).float(), dim=1)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Match the teacher on freshly augmented faces."""
        rng = torch.Generator().manual_seed(self.seed + self.global_step)
        matrix = jittered_alignment(batch["landmarks"].cpu(), self.teacher.template.cpu(), rng)
        face = warp(batch["face"].float() / 255, matrix.to(self.device), self.teacher.crop_size)
        face = self._attacked(augment(face, rng), rng)
        with torch.no_grad():
            wanted = self.teacher.embed(face).float()
        given = self.embed(face)
        cosine = (given * wanted).sum(dim=1).mean()
        relation = (given @ given.T - wanted @ wanted.T).square().mean()
        loss: Tensor = 1 - cosine + self.relation_weight * relation
        self.log("cosine", cosine, prog_bar=True)
        self.log("relation", relation)
        return loss

    def _attacked(self, face: Tensor, rng: torch.Generator) -> Tensor:
        """Perturb the first faces of a batch, half against the student, half the teacher."""
        count = round(self.adversarial * len(face) / 2)
        if not count:
            return face
        modes = [module for module in self.network.modules() if module.training]
        self.network.eval()  # the attack must not move the running statistics
        parts = [
            attacked(face[:count], self.embed, self.reach, rng),
            attacked(face[count : 2 * count], self.teacher.embed, self.reach, rng),
            face[2 * count :],
        ]
        for module in modes:
            module.training = True
        return torch.cat(parts)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Embed held-out people with both networks, without augmentation."""
        image = batch["face"].float() / 255
        matrix = self.teacher.matrix(batch["landmarks"], image)
        face = self.teacher.align(image, matrix)
        with torch.autocast(self.device.type, enabled=False):
            self._held.append((self.embed(face), self.teacher.embed(face), batch["identity"]))

    def on_validation_epoch_end(self) -> None:
        """Verification accuracy of student and teacher on the same pairs of held-out people."""
        parts = zip(*self._held, strict=True)
        student, teacher, identity = (torch.cat(part).cpu() for part in parts)
        self._held.clear()
        rng = torch.Generator().manual_seed(0)
        rows, same = verification_pairs(identity, self.pairs, rng)
        values = {"val_cosine": float((student * teacher).sum(dim=1).mean())}
        for name, embedding in (("", student), ("_teacher", teacher)):
            similarity = (embedding[rows[:, 0]] * embedding[rows[:, 1]]).sum(dim=1)
            accuracy, threshold = verification_accuracy(similarity, same, rng)
            values |= {f"val_accuracy{name}": accuracy, f"val_threshold{name}": threshold}
        self.log_dict(values, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, linear warm-up, cosine to zero over the trainer's steps."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.rate, weight_decay=self.decay
        )
        return with_cosine(optimizer, self.warmup, self.trainer.estimated_stepping_batches)

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor arguments of the network that is shipped."""
        settings: dict[str, object] = {
            name: list(self.hparams[name]) for name in ("widths", "blocks")
        }
        return self.network.state_dict(), settings
