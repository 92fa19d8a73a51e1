"""EditShield: push the editor's latent away under small handling, with a penalty on the change.

Source:
    EditShield: Protecting Unauthorized Image Editing by Instruction-guided Diffusion Models
    (Chen, Jin, Liu, Chen, Wang, Sun, 2024), https://arxiv.org/abs/2311.12066; code
    https://github.com/Allen-piexl/Editshield.

    Maximise mean (E(f(x')) - E(x))^2 - 0.1 mean (x' - x)^2 over random transforms f, by Adam.

Differs:
    Ours is the form of the paper: posterior mean, range as the network wants it, transforms drawn
    anew in each step and averaged, and a bound of 8 levels, which the code defines and never uses.
    The code's transforms are a crop that does nothing at 512 x 512, one rotation of the input, or
    one blur; ours are those of everyday handling.
    `faithful` is the code: no bound and no transforms, an image in [0, 1] given to a network that
    wants [-1, 1], and a distance between noised scaled latents beside the plain ones where both
    sides have their own noise and timestep, so that most of it is noise. Where the code samples
    the posterior, `faithful` takes its mean, and the noise schedule is that of Stable Diffusion
    in closed form, so that no denoiser has to be loaded. The change is not wrapped around at 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from shields.pgd import Start, Update
from shields.protectors.encoder import mean_square
from shields.protectors.photoguard import EotConfig, PhotoGuardEot
from shields.types import Image, Mask, Objective, Step

__all__ = ["EditShield", "EditShieldConfig"]

#: what Stable Diffusion multiplies latents by, and the ends of its noise schedule
_SCALING, _BETAS, _TIMESTEPS = 0.18215, (0.00085, 0.012), 1000


@dataclass(frozen=True, kw_only=True)
class EditShieldConfig(EotConfig):
    """EditShield."""

    #: number of updates
    steps: int = 30
    #: Adam's learning rate, in levels; 0.255 is 0.001 in [0, 1]
    step: float = 0.255
    #: Adam, as the code has it
    update: Update = "adam"
    #: at the photo
    start: Start = "zero"
    #: do as the official code does, with its wrong range, its noise and without transforms
    as_coded: bool = False

    @classmethod
    def paper(cls) -> Self:
        """The paper's form without a bound, 30 steps of Adam."""
        return cls(norm="none")

    @classmethod
    def faithful(cls) -> Self:
        """What the official code computes, flaws included."""
        return cls(norm="none", draws=1, as_coded=True)


class EditShield(PhotoGuardEot):
    """Push the latent away under small handling by a few steps of Adam, and pay for the change."""

    Config: ClassVar[type[EditShieldConfig]] = EditShieldConfig
    paper = "https://arxiv.org/abs/2311.12066"
    config: EditShieldConfig

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Shift of the latent less the penalty; the code's own shift where asked for."""
        if not self.config.as_coded:
            return super().objective(image, mask, landmarks=landmarks, rng=rng)
        with torch.no_grad():
            goal = self._noised(image, rng)

        def value(view: Image, step: Step) -> Tensor:
            shift = mean_square(self._noised(view, step.rng) - goal)
            return shift - self.config.penalty * mean_square(view - image)

        return value

    def _noised(self, image: Image, rng: torch.Generator) -> Tensor:
        """Noised scaled latent and plain latent, one after the other: (B, 2C, h, w)."""
        # A network that maps [0, 1] to [-1, 1] itself sees [0, 1] when it is given (v + 1) / 2.
        latent = self.autoencoder.encode((image + 1) / 2).float()
        first, last = (beta**0.5 for beta in _BETAS)
        signal = (1 - torch.linspace(first, last, _TIMESTEPS).square()).cumprod(dim=0)
        share = float(signal[int(torch.randint(_TIMESTEPS, (), generator=rng))])
        noise = torch.randn(latent.shape[1:], generator=rng).to(latent)
        noisy = share**0.5 * _SCALING * latent + (1 - share) ** 0.5 * noise
        return torch.cat([noisy, latent], dim=1)
