"""Train `portrait-ae`, the embedded autoencoder, against the latents of a published one.

What fools an autoencoder fools others that map pictures to nearly the same latents, so the student
is pulled towards the teacher's latents as well as towards the picture, and its decoder is trained
on both the student's and the teacher's.

Source:
    taef2 (Bohan, 2025), https://github.com/madebyollin/taesd, as the teacher.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from shields.models import load
from shields.models.base import Autoencoder
from shields.models.networks import PortraitAutoencoder
from shields.weights import WeightStore
from trainers.averaging import follow
from trainers.data import random_crop

__all__ = ["PortraitAutoencoderTraining"]


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB, range 1."""
    return -10 * (image - reference).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


class PortraitAutoencoderTraining(pl.LightningModule):
    """Reconstruction and latent distillation.

    Args:
        fine: Width at a quarter of the resolution.
        coarse: Width at an eighth.
        blocks: Residual blocks of each stage.
        teacher: Name of the autoencoder whose latents are matched.
        crop: Side of a training crop, pixels.
        latent_weight: Weight of the squared latent error, in units of the teacher's variance.
        teacher_weight: Weight of decoding the teacher's latents.
        rate: Adam's peak learning rate.
        warmup: Steps until the peak.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops and mirrors.
    """

    #: what the card says beside what is measured
    CARD: ClassVar[dict[str, str]] = {
        "role": "autoencoder",
        "architecture": "portrait-ae",
        "summary": "Embedded autoencoder for portraits; latents distilled from taef2 (FLUX.2).",
        "licence": "Apache-2.0; trained on LFW (research use) and public-domain portraits",
        "data": "436 portraits of members of the US Congress and 11,684 LFW faces; a tenth of the "
        "people, chosen by a hash of the name, is held out; results on held-out portraits at 256",
        "teacher": "taef2 (madebyollin/taesd, MIT)",
    }

    def __init__(
        self,
        fine: int = 64,
        coarse: int = 160,
        blocks: int = 2,
        teacher: str = "taef2",
        crop: int = 128,
        latent_weight: float = 0.05,
        teacher_weight: float = 0.5,
        rate: float = 1e-3,
        warmup: int = 200,
        average: float = 0.995,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = PortraitAutoencoder(fine=fine, coarse=coarse, blocks=blocks)
        self.network = self.network.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.crop, self.rate, self.warmup = crop, rate, warmup
        self.latent_weight, self.teacher_weight = latent_weight, teacher_weight
        self.average, self.seed = average, seed
        cpu = torch.device("cpu")
        # A list hides the teacher from checkpoints and from the optimizer.
        self._teacher = [load("autoencoder", teacher, store=WeightStore(), device=cpu)]

    @property
    def teacher(self) -> Autoencoder:
        """The frozen teacher, on this module's device."""
        return self._teacher[0].to(self.device)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Match the picture from both latents, and the teacher's latent."""
        rng = torch.Generator().manual_seed(self.seed + self.global_step)
        face = random_crop(batch["face"], self.crop, rng).float() / 255
        face = face.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = self.teacher.encode(face).float()
        latent = self.network.encoder(face).float()
        decoded = self.network.decoder(torch.cat([latent, wanted])).float()
        own, theirs = decoded.chunk(2)
        scale = wanted.var(dim=(0, 2, 3), keepdim=True).clamp_min(1e-4)
        latent_error = ((latent - wanted).square() / scale).mean()
        loss: Tensor = (
            functional.l1_loss(own, face)
            + self.teacher_weight * functional.l1_loss(theirs, face)
            + self.latent_weight * latent_error
        )
        self.log("latent_error", latent_error, prog_bar=True)
        self.log("psnr", psnr(own.detach(), face).mean(), prog_bar=True)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Move the averaged weights; early on they follow faster."""
        follow(self.averaged, self.network, done=self.global_step, most=self.average)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Reconstruct held-out portraits at their packed size, in float32."""
        face = batch["face"].float() / 255
        with torch.autocast(self.device.type, enabled=False):
            latent = self.averaged.encoder(face)
            wanted = self.teacher.encode(face)
            error = psnr(self.averaged.decoder(latent).clamp(0, 1), face).mean()
            cross = psnr(self.teacher.decode(latent).clamp(0, 1), face).mean()
        explained = 1 - (latent - wanted).square().mean() / wanted.var(dim=(0, 2, 3)).mean()
        values = {"val_psnr": error, "val_psnr_teacher_decoder": cross, "val_latent_r2": explained}
        self.log_dict(values, prog_bar=True, batch_size=len(face))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, linear warm-up, cosine to zero over the trainer's steps."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.rate)
        return with_cosine(optimizer, self.warmup, self.trainer.estimated_stepping_batches)

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor arguments of the network that is shipped."""
        settings = {name: self.hparams[name] for name in ("fine", "coarse", "blocks")}
        return self.averaged.state_dict(), settings


def with_cosine(
    optimizer: torch.optim.Optimizer, warmup: int, steps: float
) -> OptimizerLRSchedulerConfig:
    """Attach a linear warm-up and a cosine to zero, counted in steps."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        share = min(1.0, (step - warmup) / max(1.0, steps - warmup))
        return 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return OptimizerLRSchedulerConfig(
        optimizer=optimizer, lr_scheduler={"scheduler": schedule, "interval": "step"}
    )
