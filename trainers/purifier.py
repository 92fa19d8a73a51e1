"""Train the cheapest attacker who knows what he is up against: a network for one protector.

Whoever has the protector can make as many pairs of clean and protected photos as he likes, and
learn from them what it adds. How much of it the network removes says how predictable a protection
is; it says nothing about attackers who do not know which one was used.

Source:
    LightShed: Defeating Perturbation-based Image Copyright Protections (Foerster, Behrouzi, Rieger,
    Jadliwala, Sadeghi, 2025),
    https://www.usenix.org/conference/usenixsecurity25/presentation/foerster.

Differs:
    A small U-Net without attention, and one loss throughout, on the photo that is left; the
    published one compares perturbations, by SSIM first.
"""

from __future__ import annotations

import copy

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from shields.budget import Budget
from shields.codec import resize, uniform
from shields.errors import ConfigError
from shields.jpeg import real_jpeg
from shields.models import load
from shields.models.generators import Generator
from shields.models.restoration import PerturbationUNet
from shields.transforms import parse
from shields.types import Image, Perturbation
from shields.weights import WeightStore
from trainers.averaging import follow
from trainers.data import random_crop
from trainers.portrait_ae import psnr, with_cosine
from trainers.restorer import charbonnier

__all__ = ["PurifierTraining", "left", "likelier", "saved"]


def saved(image: Image, perturbation: Perturbation, levels: float) -> Image:
    """Add a perturbation as a saved photo has it: whole levels, within the budget."""
    whole = Budget(levels=levels).whole_levels
    steps = (perturbation * 255).round().clamp(-whole, whole)
    return ((image * 255).round() + steps).clamp(0, 255) / 255


def left(purified: Image, protected: Image, clean: Image) -> Tensor:
    """Energy of what is left of a perturbation, as a share of what there was: (B,), 0 for none."""
    rest = (purified - clean).square().sum(dim=(1, 2, 3))
    return rest / (protected - clean).square().sum(dim=(1, 2, 3)).clamp_min(1e-12)


def likelier(scores: Tensor, others: Tensor) -> Tensor:
    """How often one of `scores` (B,) is above one of `others` (B,); half a point for a tie."""
    gap = scores[:, None] - others[None]
    return ((gap > 0).float() + 0.5 * (gap == 0).float()).mean()


class PurifierTraining(pl.LightningModule):
    """A U-Net that predicts one protector's perturbation, to subtract it.

    Args:
        protector: Card of a generator, which protects while training goes on. With `pairs` only
            the name that the card shall give.
        pairs: The packs hold pairs, made by `trainers.pairs` from photos that any tool protected.
        levels: Smallest and largest budget, levels, of which each step draws one.
        validation_levels: Budget at which held-out people are measured, levels.
        stretch: How many times the perturbation is enlarged, drawn for each step: a protector
            works at a size of its own, and a photo may be larger.
        handling: What may happen to the photos before, as `shields.transforms.parse` reads it.
        handled: Share of the steps in which it does.
        untouched: Share of the photos that are clean, of which nothing shall be taken away.
        widths: Channels of the U-Net at each resolution.
        crop: Side of a training crop, pixels, a multiple of 2 for each width but the first.
        rate: Adam's peak learning rate.
        warmup: Steps until the peak.
        average: Decay of the averaged weights that are validated and exported.
        seed: Fixes crops, mirrors and draws.
    """

    def __init__(
        self,
        protector: str = "ars-latent",
        pairs: bool = False,
        levels: tuple[float, float] = (4.0, 16.0),
        validation_levels: float = 12.75,
        stretch: tuple[float, float] = (1.0, 2.0),
        handling: str = "jpeg:60..95",
        handled: float = 0.25,
        untouched: float = 0.2,
        widths: tuple[int, ...] = (24, 48, 96, 128),
        crop: int = 160,
        rate: float = 1e-3,
        warmup: int = 200,
        average: float = 0.998,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = PerturbationUNet(widths).to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        if crop % self.network.multiple:
            raise ConfigError(
                f"`crop` must be a multiple of {self.network.multiple} pixels, got {crop}"
            )
        self.protector, self.pairs, self.levels = protector, pairs, levels
        self.validation_levels, self.stretch, self.crop = validation_levels, stretch, crop
        self.handling, self.handled, self.untouched = parse(handling), handled, untouched
        self.rate, self.warmup, self.average, self.seed = rate, warmup, average, seed
        # A list hides the protector from checkpoints and from the optimizer.
        self._generator: list[Generator] = []
        if not pairs:
            cpu, store = torch.device("cpu"), WeightStore()
            self._generator = [load("generator", protector, store=store, device=cpu)]

    @torch.no_grad()
    def pair(self, packed: Tensor, levels: float, stretch: float, rng: torch.Generator) -> Tensor:
        """Clean and protected photos one behind the other: (B, 3 or 6, S, S) -> (B, 6, S, S).

        Args:
            packed: uint8; clean faces, which are protected here, or pairs.
            levels: Budget.
            stretch: The protector sees the faces so many times smaller.
            rng: What the protector draws from.

        Raises:
            ConfigError: The packs hold faces where pairs are expected, or the other way round.
        """
        expected = 6 if self.pairs else 3
        if packed.shape[1] != expected:
            found = "pairs" if packed.shape[1] == 6 else "faces"
            raise ConfigError(f"the pack holds {found}; set `pairs` to {not self.pairs}")
        image = packed.float() / 255
        if self.pairs:
            return image
        (generator,) = self._generator
        sides = (image.shape[2], image.shape[3])
        small = resize(image, (round(sides[0] / stretch), round(sides[1] / stretch)), "bicubic")
        made = generator.to(self.device).perturb(small.clamp(0, 1), levels=levels, rng=rng)
        made = functional.interpolate(made, sides, mode="bilinear")
        return torch.cat([image, saved(image, made, levels)], dim=1)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Give crops of protected photos back as they were, and of clean ones as they are."""
        rng = torch.Generator().manual_seed(self.seed + self.global_step)
        levels, stretch = uniform(self.levels, rng), uniform(self.stretch, rng)
        pair = random_crop(self.pair(batch["face"], levels, stretch, rng), self.crop, rng)
        clean, protected = pair.chunk(2, dim=1)
        spared = torch.rand(len(clean), 1, 1, 1, generator=rng).to(clean.device) < self.untouched
        protected = torch.where(spared, clean, protected)
        if float(torch.rand((), generator=rng)) < self.handled:
            clean, protected = self.handling(torch.cat([clean, protected]), rng).chunk(2)
        restored = self.network(protected.contiguous(memory_format=torch.channels_last)).float()
        loss = charbonnier(restored - clean)
        touched = ~spared.flatten()
        if touched.any():
            share = left(restored.detach(), protected, clean)[touched].mean()
            self.log("left", share, prog_bar=True)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Move the averaged weights; early on they follow faster."""
        follow(self.averaged, self.network, done=self.global_step, most=self.average)

    def _purified(self, image: Image) -> Image:
        """Purify photos of any size by the averaged weights, in whole levels."""
        height, width = image.shape[2:]
        bottom, right = (-side % self.averaged.multiple for side in (height, width))
        padded = functional.pad(image, (0, right, 0, bottom), mode="replicate")
        with torch.autocast(self.device.type, enabled=False):
            made = self.averaged(padded)[..., :height, :width]
        return (made.clamp(0, 1) * 255).round() / 255

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Whole held-out faces, protected; once as they are, once after JPEG 75 ("handled")."""
        rng = torch.Generator().manual_seed(index)
        with torch.autocast(self.device.type, enabled=False):
            pair = self.pair(batch["face"], self.validation_levels, 1.0, rng)
        clean, protected = pair.chunk(2, dim=1)
        purified, kept = self._purified(protected), self._purified(clean)
        coded = [real_jpeg(image, 75) for image in (protected, clean)]
        values = {
            "val_left": left(purified, protected, clean),
            "val_left_handled": left(self._purified(coded[0]), *coded),
            "val_psnr_before": psnr(protected, clean),
            "val_psnr_after": psnr(purified, clean),
            # What it costs a photo that nobody protected.
            "val_psnr_clean": psnr(kept, clean),
            # How often more is taken from a protected photo than from a clean one.
            "val_detected": likelier(
                (purified - protected).abs().mean(dim=(1, 2, 3)),
                (kept - clean).abs().mean(dim=(1, 2, 3)),
            ),
        }
        means = {name: value.mean() for name, value in values.items()}
        self.log_dict(means, batch_size=len(clean))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam, linear warm-up, cosine to zero over the trainer's steps."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.rate)
        return with_cosine(optimizer, self.warmup, self.trainer.estimated_stepping_batches)

    @property
    def CARD(self) -> dict[str, str]:  # noqa: N802  a constant with the other trainers
        """What the card says beside what is measured."""
        how = "pairs of photos" if self.pairs else f"{self.validation_levels:g} levels"
        return {
            "role": "purifier",
            "architecture": "unet",
            "summary": f"Adaptive, knows the protector {self.protector}: subtracts what it "
            "predicts of its perturbation.",
            "licence": "Apache-2.0; trained on LFW (research use) and public-domain portraits",
            "data": "the packs that the recipe names; a tenth of the people, chosen by a hash of "
            f"the name, is held out; results on them, {how}; `left`: energy of what is left of the "
            "perturbation, as a share",
            "teacher": self.protector,
        }

    def export(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """State dict and constructor arguments of the network that is shipped."""
        return self.averaged.state_dict(), {"widths": list(self.hparams["widths"])}
