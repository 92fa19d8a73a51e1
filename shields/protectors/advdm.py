"""AdvDM, Mist, SDS and SDST: make a photo hard (or oddly easy) for a latent diffusion model.

Source:
    Adversarial Example Does Good: Preventing Painting Imitation from Diffusion Models via
    Adversarial Examples (Liang et al., 2023), https://arxiv.org/abs/2302.04578: AdvDM.
    Mist: Towards Improved Adversarial Examples for Diffusion Models (Liang, Wu, 2023),
    https://arxiv.org/abs/2305.12683.
    Toward Effective Protection Against Diffusion-Based Mimicry through Score Distillation (Xue,
    Liang, Wu, Chen, 2024), https://arxiv.org/abs/2311.12832: SDS and SDST; code
    https://github.com/xavihart/Diff-Protect.

    With z = scaled E(x'), random t and noise, e the denoiser: L_S = mean (e(z_t, t) - noise)^2 and
    L_T = sum (E(x') - E(target))^2. AdvDM climbs (+) or descends (-) L_S; Mist climbs
    10^4 (+-L_S) - L_T; SDS goes along +-J_E^T (e - noise), without the denoiser's Jacobian; SDST
    along +-5 J_E^T (e - noise) - J^T of L_T.

Differs:
    Latents are posterior means; the codes sample the posterior, which only adds noise.
    One draw of t and noise serves the batch. t is stratified over the steps and the noise
    antithetic (both signs, averaged) by default; the presets of the code do neither.
    The codes run the denoiser on the constant target too and throw the result away, and embed
    the prompt at each step; nothing of the kind here.
    Mist's sign flips L_S, as its text has it; the code flips L_T.
    The value that SDS and SDST report is L_S (less L_T): only the gradient is the surrogate.
    Photos keep their shape; the codes squeeze them to 512 x 512. The pattern that Mist steers to
    is our own drawing; a file can be given (`target_image`).
    The prompt is a setting, not guessed from a folder's name. Results are rounded, not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.pgd import Start
from shields.protectors.base import IterativeConfig, IterativeProtector
from shields.protectors.photoguard import read_target
from shields.types import Image, Mask, Objective, Step

if TYPE_CHECKING:
    from shields.models.diffusion import LatentDiffusion

__all__ = [
    "AdvDm", "AdvDmConfig", "Mist", "MistConfig", "Sds", "SdsConfig", "Sdst", "SdstConfig",
    "pattern",
]  # fmt: skip


def pattern(height: int, width: int) -> Image:
    """Draw rows of made-up black letters on white, (1, 3, H, W), values 0 and 1.

    Each letter is a mirrored pattern of 5 x 7 dots from a fixed seed; some ten rows fill a photo.
    """
    dot = max(1, min(height, width) // 80)
    rows, columns = -(-height // (8 * dot)), -(-width // (6 * dot))
    rng = torch.Generator().manual_seed(5)
    half = torch.rand(rows, columns, 7, 3, generator=rng) < 0.6
    letters = torch.zeros(rows, columns, 8, 6)
    letters[:, :, :7, :5] = torch.cat([half, half[..., :2].flip(-1)], dim=-1).float()
    page = letters.permute(0, 2, 1, 3).reshape(rows * 8, columns * 6)
    page = page.repeat_interleave(dot, 0).repeat_interleave(dot, 1)[:height, :width]
    return (1 - page).expand(1, 3, -1, -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class AdvDmConfig(IterativeConfig):
    """AdvDM; the class default is plus at 8 levels."""

    #: "+" makes the photo hard to denoise, "-" easy (smoother to look at)
    sign: Literal["+", "-"] = "+"
    #: prompt under which the denoiser runs
    prompt: str = "a portrait photo"
    #: run each draw of noise with both signs and average
    antithetic: bool = True
    #: spread the timesteps of the steps evenly over the schedule, in random order
    stratified: bool = True
    #: run the denoiser anew in the backward pass: slower, far less memory
    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sign not in ("+", "-"):
            raise ConfigError(f'`sign` must be "+" or "-", got {self.sign!r}')

    @classmethod
    def paper(cls) -> Self:
        """AdvDM's paper as it is remembered: 8/255 and 2/255, 40 steps, plain Monte Carlo."""
        return cls(levels=8, step=2, steps=40, antithetic=False, stratified=False)

    @classmethod
    def code(cls) -> Self:
        """The repositories mist and Diff-Protect: 16 levels, 100 steps of 1, plain Monte Carlo."""
        return cls(levels=16, step=1, steps=100, antithetic=False, stratified=False)


@dataclass(frozen=True, kw_only=True)
class MistConfig(AdvDmConfig):
    """Mist: AdvDM and a target image."""

    #: weight of L_S against L_T
    rate: float = 1e4
    #: an image file to steer to; a pattern of letters if left out
    target_image: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate > 0:
            raise ConfigError(f"`rate` must be above 0, got {self.rate}")

    @classmethod
    def paper(cls) -> Self:
        """The settings of its code, which the paper shares: 16 levels."""
        return cls.code()


@dataclass(frozen=True, kw_only=True)
class SdsConfig(AdvDmConfig):
    """SDS; minus is what its authors recommend."""

    #: "+" climbs the score distillation loss, "-" descends
    sign: Literal["+", "-"] = "-"
    #: at the photo: the gradient is random, not zero, there
    start: Start = "zero"

    @classmethod
    def paper(cls) -> Self:
        """Diff-Protect: 16 levels, 100 steps of 1, plain Monte Carlo."""
        return cls.code()


@dataclass(frozen=True, kw_only=True)
class SdstConfig(SdsConfig):
    """SDST: SDS and a target image."""

    #: weight of the surrogate gradient against that of L_T
    rate: float = 5.0
    #: an image file to steer to; a pattern of letters if left out
    target_image: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate > 0:
            raise ConfigError(f"`rate` must be above 0, got {self.rate}")


class AdvDm(IterativeProtector):
    """Raise (or lower) the training loss of a latent diffusion model on the photo."""

    Config: ClassVar[type[AdvDmConfig]] = AdvDmConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"diffusion": "stable-diffusion-1-5"}
    paper = "https://arxiv.org/abs/2302.04578"
    config: AdvDmConfig
    diffusion: LatentDiffusion

    def __init__(
        self, config: AdvDmConfig | None = None, *, diffusion: LatentDiffusion | None = None
    ) -> None:
        super().__init__(config)
        self._hold(diffusion=diffusion)

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """The denoiser's loss with its sign, and whatever a variant adds."""
        embedding = self.diffusion.embed(self.config.prompt)
        timestep = self._timesteps(rng)
        weight = self._weight() * (1 if self.config.sign == "+" else -1)
        pull = self._pull(image)

        def value(view: Image, step: Step) -> Tensor:
            latent = self.diffusion.latent(view)
            loss = self._semantic(latent, timestep(step), embedding, step.rng)
            return weight * loss + pull(latent)

        return value

    def _weight(self) -> float:
        return 1.0

    def _pull(self, image: Image) -> Callable[[Tensor], Tensor]:
        """What is added for a latent (B, C, h, w): (B,)."""
        return lambda latent: latent.new_zeros(len(latent))

    def _timesteps(self, rng: torch.Generator) -> Callable[[Step], int]:
        """How a step gets its timestep; `rng` orders the strata."""
        if not self.config.stratified:
            return lambda step: int(torch.randint(self.diffusion.timesteps, (), generator=step.rng))
        order = torch.randperm(self.config.steps, generator=rng).tolist()

        def draw(step: Step) -> int:
            within = float(torch.rand((), generator=step.rng))
            share = (order[step.index] + within) / len(order)
            return min(int(share * self.diffusion.timesteps), self.diffusion.timesteps - 1)

        return draw

    def _semantic(
        self, latent: Tensor, timestep: int, embedding: Tensor, rng: torch.Generator
    ) -> Tensor:
        """L_S (B,), with the gradient that the method follows."""
        noise = torch.randn(latent.shape[1:], generator=rng).to(latent)
        signs = (1, -1) if self.config.antithetic else (1,)
        losses = [self._loss(latent, sign * noise[None], timestep, embedding) for sign in signs]
        return torch.stack(losses).mean(dim=0)

    def _loss(self, latent: Tensor, noise: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        """Mean squared error (B,) of the predicted noise."""
        error = self._error(latent, noise, timestep, embedding)
        return error.square().flatten(1).mean(dim=1)

    def _error(self, latent: Tensor, noise: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        """Predicted less true noise (B, C, h, w)."""
        diffusion = self.diffusion
        noisy = diffusion.noisy(latent, noise, timestep)
        condition = latent / diffusion.scaling if diffusion.image_channels else None
        predicted = diffusion.predict(
            noisy, timestep, embedding, condition, checkpoint=self.config.checkpoint
        )
        return predicted.float() - noise


def _pull_to(protector: Mist | Sdst, image: Image) -> Callable[[Tensor], Tensor]:
    """Minus L_T: the target's latent is encoded once, its denoising never."""
    path = protector.config.target_image
    target = pattern(*image.shape[2:]).to(image) if path is None else read_target(path, image)
    with torch.no_grad():
        goal = protector.diffusion.latent(target).float()
    return lambda latent: -(latent.float() - goal).square().flatten(1).sum(dim=1)


class Mist(AdvDm):
    """AdvDM, and the latent is pulled to that of a high-contrast pattern."""

    Config: ClassVar[type[MistConfig]] = MistConfig
    paper = "https://arxiv.org/abs/2305.12683"
    config: MistConfig

    def _weight(self) -> float:
        return self.config.rate

    def _pull(self, image: Image) -> Callable[[Tensor], Tensor]:
        return _pull_to(self, image)


class Sds(AdvDm):
    """Follow the denoiser's error through the encoder only: half the cost of AdvDM."""

    Config: ClassVar[type[SdsConfig]] = SdsConfig
    paper = "https://arxiv.org/abs/2311.12832"
    config: SdsConfig

    def _loss(self, latent: Tensor, noise: Tensor, timestep: int, embedding: Tensor) -> Tensor:
        """L_S in value; in gradient J_E^T (predicted - true noise), a sum over the latent."""
        with torch.no_grad():
            error = self._error(latent, noise, timestep, embedding)
            value = error.square().flatten(1).mean(dim=1)
        surrogate = (latent.float() * error).flatten(1).sum(dim=1)
        return value + (surrogate - surrogate.detach())


class Sdst(Sds):
    """SDS, and the latent is pulled to that of a high-contrast pattern."""

    Config: ClassVar[type[SdstConfig]] = SdstConfig
    config: SdstConfig

    def _weight(self) -> float:
        return self.config.rate

    def _pull(self, image: Image) -> Callable[[Tensor], Tensor]:
        return _pull_to(self, image)
