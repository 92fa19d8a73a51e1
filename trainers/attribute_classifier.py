"""Train classifiers of facial attributes: the judge of our manipulators, and their teacher.

The judge sees the same labels as manipulators do and none of their networks, so an edit that fools
only its teacher does not fool it. The teacher sees little and through much noise: what convinces
such a network is what people see, too.

Source:
    Are Perceptually-Aligned Gradients a General Property of Robust Classifiers? (Kaur, Cohen,
    Lipton, 2019), https://arxiv.org/abs/1910.08640: training under noise, and its gradients.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from shields.models.classifiers import AttributeClassifier
from trainers.data import augment, middle, random_crop
from trainers.portrait_ae import with_cosine
from trainers.scheme import classification, resized

__all__ = ["AttributeClassifierTraining"]


class AttributeClassifierTraining(pl.LightningModule):
    """Binary cross-entropy on augmented faces.

    Args:
        attributes: Names of the labels in the pack.
        size: Side of the square that the network sees, pixels.
        widths: Channels of the stages.
        region: Share of the packed face's side that is cut out.
        rate: AdamW's peak learning rate.
        warmup: Steps until the peak.
        noise: Standard deviation of the noise under which it learns, range 2.
        seed: Fixes initial weights, crops, mirrors, augmentation and noise.
    """

    def __init__(
        self,
        attributes: tuple[str, ...] = ("Smiling",),
        size: int = 80,
        widths: tuple[int, ...] = (24, 48, 96, 128),
        region: float = 0.89,
        rate: float = 2e-3,
        warmup: int = 100,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.noise = noise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = AttributeClassifier(attributes, size, widths)
        self.network = self.network.to(memory_format=torch.channels_last)
        self.size, self.region = size, region
        self.rate, self.warmup, self.seed = rate, warmup, seed

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Cut, mirror, distort, classify."""
        rng = torch.Generator().manual_seed(self.seed + self.global_step)
        packed = batch["face"]
        side = round(packed.shape[-1] * self.region)
        face = augment(random_crop(packed, side, rng).float() / 255, rng)
        face = resized(face * 2 - 1, self.size)
        if self.noise:
            face = face + self.noise * torch.randn(face.shape, generator=rng).to(face)
        logits = self.network(face)
        loss = classification(logits, batch["labels"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Accuracy on held-out people, in float32."""
        face = middle(batch["face"], self.region)[0].float() / 127.5 - 1
        with torch.autocast(self.device.type, enabled=False):
            logits = self.network(resized(face, self.size))
        right = ((logits > 0) == (batch["labels"] > 0)).float().mean()
        self.log("val_accuracy", right, prog_bar=True, batch_size=len(face))

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        use = "The judge of edits, trained apart from manipulators."
        if self.noise:
            use = "Teacher of manipulators, trained under noise; never their judge."
        return {
            "role": "classifier",
            "architecture": "attribute-classifier",
            "summary": f"Is the face smiling? {use}",
            "licence": "Apache-2.0; trained on LFW (research use)",
            "data": "LFW faces with expression labels (happiness or neutral); a tenth of the "
            "people, chosen by a hash of the name, is held out; results on them",
            "teacher": "",
        }

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, linear warm-up, cosine to zero over the trainer's steps."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.rate, weight_decay=0.05)
        return with_cosine(optimizer, self.warmup, self.trainer.estimated_stepping_batches)

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor arguments of the network that is shipped."""
        names = ("attributes", "size", "widths")
        settings: dict[str, object] = {name: self.hparams[name] for name in names}
        return self.network.state_dict(), settings
