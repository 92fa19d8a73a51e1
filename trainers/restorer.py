"""Train a compact network to restore portraits that were compressed and shrunk.

What it is for: the enlargement inside TIP-RSR and other purifiers, with nothing to download. Photos
are damaged by the codec and the resampler themselves, and a share of them by noise that looks like
a protection of no particular kind, so that a restored photo is near the clean one.

Source:
    Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data (Wang, Xie,
    Dong, Shan, 2021), https://arxiv.org/abs/2107.10833: damage that is drawn anew for each photo.
    Fast and Accurate Image Super-Resolution with Deep Laplacian Pyramid Networks (Lai, Huang,
    Ahuja, Yang, 2018), https://arxiv.org/abs/1710.01992: the Charbonnier loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from shields.codec import Kernel, resize, uniform
from shields.errors import ConfigError
from shields.jpeg import real_jpeg
from shields.metrics import ssim
from shields.models.restoration import Compact
from shields.types import Image, Perturbation
from trainers.averaging import follow
from trainers.data import random_crop
from trainers.portrait_ae import psnr, with_cosine

__all__ = ["Damage", "RestorerTraining", "charbonnier", "pretended", "restoration_loss"]

#: Lanczos is what nearly every program does, and what TIP-RSR does
_KERNELS: tuple[Kernel, ...] = ("lanczos", "lanczos", "lanczos", "bicubic", "bilinear")


def charbonnier(error: Tensor, softness: float = 1e-3) -> Tensor:
    """Mean absolute error, rounded off where it is below `softness`."""
    return (error.square() + softness**2).sqrt().mean()


def restoration_loss(restored: Image, clean: Image, frequency: float) -> Tensor:
    """Charbonnier, and the mean distance of the spectra with a weight; both (B, 3, H, W)."""
    error = restored.float() - clean
    loss = charbonnier(error)
    if frequency:
        loss = loss + frequency * torch.fft.rfft2(error, norm="ortho").abs().mean()
    return loss


def pretended(image: Image, levels: float, rng: torch.Generator) -> Perturbation:
    """Noise that looks like somebody's protection: fine or coarse, of all values or of two.

    Args:
        image: (B, 3, H, W); only its shape counts.
        levels: Nothing is further from zero.
        rng: A CPU generator; the batch shares what is drawn.

    Returns:
        (1, 3, H, W), image units.
    """
    height, width = image.shape[2:]
    coarse = 2 ** int(torch.randint(3, (), generator=rng))
    sides = (-(-height // coarse), -(-width // coarse))
    field = torch.randn(1, 3, *sides, generator=rng)
    field = functional.interpolate(field, (height, width), mode="bilinear")
    if float(torch.rand((), generator=rng)) < 0.5:
        field = field.sign()
    return field.clamp(-1, 1).to(image) * (levels / 255)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What a photo suffers before the network sees it; a call draws for each photo of a batch."""

    #: how many times smaller the result is, 1 or 2
    scale: int = 2
    #: JPEG's quality, libjpeg's scale
    quality: tuple[int, int] = (40, 95)
    #: largest standard deviation of noise, levels
    noise: float = 4.0
    #: largest reach of what looks like a protection, levels
    perturbation: float = 12.0

    def __call__(self, image: Image, rng: torch.Generator) -> Image:
        """(B, 3, H, W), [0, 1], sides multiples of `scale` -> (B, 3, H/scale, W/scale), 8 bits."""
        return torch.cat([self._drawn(one[None], rng) for one in image])

    def _drawn(self, image: Image, rng: torch.Generator) -> Image:
        def chance(share: float) -> bool:
            return float(torch.rand((), generator=rng)) < share

        if chance(0.4):
            image = image + pretended(image, uniform((2.0, self.perturbation), rng), rng)
        if chance(0.3):
            spread = uniform((0.0, self.noise), rng) / 255
            image = image + torch.randn(image.shape, generator=rng).to(image) * spread
        if chance(0.8):
            image = self._compressed(image, rng)
        kernel = _KERNELS[int(torch.randint(len(_KERNELS), (), generator=rng))]
        image = self._shrunk(image, kernel)
        if chance(0.25):  # shared once more after it was shrunk
            image = self._compressed(image, rng)
        return _whole(image)

    def _compressed(self, image: Image, rng: torch.Generator) -> Image:
        low, high = self.quality
        quality = int(torch.randint(low, high + 1, (), generator=rng))
        return real_jpeg(image.clamp(0, 1), quality)

    def _shrunk(self, image: Image, kernel: Kernel) -> Image:
        height, width = image.shape[2:]
        return resize(image, (height // self.scale, width // self.scale), kernel).clamp(0, 1)

    def usual(self, image: Image) -> Image:
        """JPEG 75, then Lanczos to the smaller size: TIP-RSR's first step, nothing drawn."""
        return _whole(self._shrunk(real_jpeg(image.clamp(0, 1), 75), "lanczos"))


def _whole(image: Image) -> Image:
    return (image.clamp(0, 1) * 255).round() / 255


class RestorerTraining(pl.LightningModule):
    """A compact network against damage.

    Args:
        scale: 2 to enlarge what was halved; 1 to leave the size alone.
        features: Channels between the network's convolutions.
        convolutions: How many there are between the first and the last.
        quality: Smallest and largest quality of JPEG.
        noise: Largest standard deviation of noise, levels.
        perturbation: Largest reach of what looks like a protection, levels.
        crop: Side of a training crop before it is shrunk, pixels, even.
        frequency: Weight of the distance of the spectra beside the Charbonnier loss.
        rate: Adam's peak learning rate.
        warmup: Steps until the peak.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops, mirrors and damage.
    """

    def __init__(
        self,
        scale: int = 2,
        features: int = 64,
        convolutions: int = 16,
        quality: tuple[int, int] = (40, 95),
        noise: float = 4.0,
        perturbation: float = 12.0,
        crop: int = 96,
        frequency: float = 0.1,
        rate: float = 1e-3,
        warmup: int = 200,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if scale not in (1, 2) or crop % scale:
            raise ConfigError(
                f"`scale` must be 1 or 2 and divide `crop` (pixels), got {scale} and {crop}"
            )
        self.save_hyperparameters()
        self.network = Compact(scale, features, convolutions)
        self.network = self.network.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        self.damage = Damage(scale=scale, quality=quality, noise=noise, perturbation=perturbation)
        self.crop, self.frequency, self.rate = crop, frequency, rate
        self.warmup, self.average, self.seed = warmup, average, seed

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Restore crops that were damaged, each in its own way."""
        rng = torch.Generator().manual_seed(self.seed + self.global_step)
        clean = random_crop(batch["face"], self.crop, rng).float() / 255
        damaged = self.damage(clean, rng).contiguous(memory_format=torch.channels_last)
        restored = self.network(damaged).float()
        loss = restoration_loss(restored, clean, self.frequency)
        self.log("psnr", psnr(restored.detach(), clean).mean(), prog_bar=True)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Move the averaged weights; early on they follow faster."""
        follow(self.averaged, self.network, done=self.global_step, most=self.average)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Restore held-out portraits, as they are and with noise like a protection of 8 levels."""
        clean = batch["face"].float() / 255
        rng = torch.Generator().manual_seed(index)
        values: dict[str, Tensor] = {}
        for ending, added in (("", 0.0), ("_perturbed", 8.0)):
            protected = _whole(clean + pretended(clean, added, rng)) if added else clean
            damaged = self.damage.usual(protected)
            plain = resize(damaged, (clean.shape[2], clean.shape[3]), "bicubic").clamp(0, 1)
            # Autocast would take SSIM's windows to half precision as well.
            with torch.autocast(self.device.type, enabled=False):
                restored = _whole(self.averaged(damaged))
                for name, measure in (("psnr", psnr), ("ssim", ssim)):
                    found = measure(restored, clean).mean()
                    values[f"val_{name}{ending}"] = found
                    # Above bicubic enlargement; at scale 1 above leaving it alone.
                    values[f"val_{name}_gain{ending}"] = found - measure(plain, clean).mean()
        self.log_dict(values, batch_size=len(clean))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, linear warm-up, cosine to zero over the trainer's steps."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.rate)
        return with_cosine(optimizer, self.warmup, self.trainer.estimated_stepping_batches)

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        how = "enlarges twofold" if self.damage.scale == 2 else "keeps the size"
        return {
            "role": "purifier",
            "architecture": "compact",
            "summary": f"Embedded restoration of portraits after JPEG and shrinking; {how}. "
            "Other programs load it as RealESRGAN Compact.",
            "licence": "Apache-2.0; trained on LFW (research use) and public-domain portraits",
            "data": "the packs that the recipe names; a tenth of the people, chosen by a hash of "
            "the name, is held out; results on them after JPEG 75 and the scale by Lanczos, gains "
            "over bicubic enlargement; `perturbed`: with noise of 8 levels before",
            "teacher": "",
        }

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor arguments of the network that is shipped."""
        settings = {name: self.hparams[name] for name in ("scale", "features", "convolutions")}
        return self.averaged.state_dict(), settings
