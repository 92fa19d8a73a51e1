"""PhotoGuard: steer the latent, or the whole sampler, of an editor to a useless target.

Source:
    Raising the Cost of Malicious AI-Powered Image Editing (Salman, Khaddaj, Leclerc, Ilyas,
    Madry, 2023), https://arxiv.org/abs/2302.06588; code https://github.com/MadryLab/photoguard.
    The variant under transforms: Eq. 2 of Edit Away and My Face Will not Stay (Wang et al.,
    2025), https://arxiv.org/abs/2411.16832, which ascribes it to PhotoGuard.

    PhotoGuard minimises ||E(x') - z_target||, PhotoGuardDiffusion ||f(x') - y_target|| with f the
    sampler of the editor, PhotoGuardEot maximises mean (E(f(x')) - E(x))^2 - beta mean (x' - x)^2
    over random transforms f.

Differs:
    All three sets of constants of the official encoder attack are presets (`code`, `demo`) or can
    be set; `paper` is the paper's table as it is remembered, its 16/255 read in [0, 1].
    The very first iterate is clamped to the valid range too. Target images come from a file of
    the user, never from the network, and are fitted to the photo's size.
    EOT: the form has no bound, we keep the budget beside the penalty; means instead of sums. The
    clean side is not transformed, as in the formula; `reference="transformed"` does it, which
    makes more sense where a transform moves pixels.
    Diffusion: the official notebook takes an inpainting pipeline and starts from pure noise. Here
    any Stable Diffusion 1.x or InstructPix2Pix denoiser serves: the former starts from the
    photo's noised latent, the latter also sees the photo beside it. The gradient repetitions are
    `draws`, their noise is fresh; text embeddings are computed once; each call of the denoiser is
    checkpointed. With an empty prompt or guidance 1 one branch of the guidance on the prompt tells
    nothing new, so it is not run. The classes' own settings are L-infinity at 8 levels; the
    notebook's L2 is `code`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional

from shields.budget import Norm
from shields.errors import ConfigError
from shields.models.base import Autoencoder
from shields.pgd import Start, Update
from shields.protectors.base import IterativeConfig, IterativeProtector
from shields.protectors.encoder import mean_square
from shields.types import Image, Mask, Objective, Step

if TYPE_CHECKING:
    from shields.models.diffusion import LatentDiffusion

__all__ = [
    "EotConfig",
    "PhotoGuard",
    "PhotoGuardConfig",
    "PhotoGuardDiffusion",
    "PhotoGuardDiffusionConfig",
    "PhotoGuardEot",
    "read_target",
]

Target = Literal["zero", "grey", "image"]


def read_target(path: str, image: Image) -> Image:
    """Read a photo as a target for `image`: (1, 3, H, W), [0, 1], squeezed to its size."""
    from shields.photo import read

    target = read(Path(path)).image(image.device)
    size = (image.shape[2], image.shape[3])
    return functional.interpolate(target, size, mode="bilinear", antialias=True).clamp(0, 1)


def _length(difference: Tensor) -> Tensor:
    """Euclidean length of each sample, (B,)."""
    length: Tensor = difference.flatten(1).norm(dim=1)
    return length


def _check_target(target: str, path: str | None) -> None:
    if target not in get_args(Target):
        raise ConfigError(f"`target` must be one of {get_args(Target)}, got {target!r}")
    if (target == "image") != (path is not None):
        raise ConfigError(
            f'`target_image` (a file) belongs to `target="image"`, got {path!r} with {target!r}'
        )


@dataclass(frozen=True, kw_only=True)
class PhotoGuardConfig(IterativeConfig):
    """PhotoGuard's encoder attack."""

    #: latent to steer to: all zero, that of a uniform grey, or that of an image file
    target: Target = "zero"
    #: the image file, for `target="image"`
    target_image: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_target(self.target, self.target_image)

    @classmethod
    def paper(cls) -> Self:
        """The paper's appendix: 16/255 and 2/255, 200 steps."""
        return cls(levels=16, step=2, steps=200, decay="linear")

    @classmethod
    def code(cls) -> Self:
        """The official img2img notebook."""
        return cls(levels=7.65, step=2.55, steps=1000, decay="linear")

    @classmethod
    def demo(cls) -> Self:
        """The official public demo: grey target, 15.3 levels."""
        return cls(levels=15.3, step=1.275, steps=200, decay="linear", target="grey")

    @classmethod
    def baseline(cls) -> Self:
        """As FaceLock compares itself with it: 2.55 levels."""
        return cls(levels=2.55, step=0.3825, steps=100, decay="linear")


class PhotoGuard(IterativeProtector):
    """Steer the latent of the photo to zero, to grey or to another image."""

    Config = PhotoGuardConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"autoencoder": "portrait-ae"}
    paper = "https://arxiv.org/abs/2302.06588"
    config: PhotoGuardConfig
    autoencoder: Autoencoder

    def __init__(
        self, config: PhotoGuardConfig | None = None, *, autoencoder: Autoencoder | None = None
    ) -> None:
        super().__init__(config)
        self._hold(autoencoder=autoencoder)

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Negative distance to the target latent."""
        target = self._target(image)

        def value(view: Image, step: Step) -> Tensor:
            return -_length(self.autoencoder.encode(view).float() - target)

        return value

    @torch.no_grad()
    def _target(self, image: Image) -> Tensor:
        if self.config.target == "image" and self.config.target_image is not None:
            return self.autoencoder.encode(read_target(self.config.target_image, image)).float()
        latent = self.autoencoder.encode(torch.full_like(image[:1], 0.5)).float()
        return latent if self.config.target == "grey" else torch.zeros_like(latent)


@dataclass(frozen=True, kw_only=True)
class EotConfig(IterativeConfig):
    """Untargeted encoder attack under transforms, with a penalty on the change."""

    #: transforms drawn in a step, whose gradients are averaged
    draws: int = 2
    #: weight of the mean squared change (image units)
    penalty: float = 0.1
    #: compare with the latent of the clean photo, or of the clean photo transformed alike
    reference: Literal["clean", "transformed"] = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.penalty >= 0:
            raise ConfigError(f"`penalty` must be 0 or more, got {self.penalty}")
        if self.reference not in ("clean", "transformed"):
            raise ConfigError(f"`reference` must be clean or transformed, got {self.reference!r}")

    @classmethod
    def paper(cls) -> Self:
        """FaceLock's budget for its baselines; Eq. 2 itself names no constants."""
        return cls(levels=2.55, step=0.3825, steps=100, decay="linear")


class PhotoGuardEot(IterativeProtector):
    """Push the latent away on average over everyday handling, and pay for the change."""

    Config: ClassVar[type[EotConfig]] = EotConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"autoencoder": "portrait-ae"}
    paper = "https://arxiv.org/abs/2411.16832"
    config: EotConfig
    autoencoder: Autoencoder

    def __init__(
        self, config: EotConfig | None = None, *, autoencoder: Autoencoder | None = None
    ) -> None:
        super().__init__(config)
        self._hold(autoencoder=autoencoder)

    def transform(self) -> None:
        """None: the transforms are part of the objective, for the penalty must not see them."""
        return

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Shift of the transformed photo's latent less the penalty."""
        transformed = self.config.reference == "transformed"
        with torch.no_grad():
            clean = self.autoencoder.encode(image).float()

        def value(view: Image, step: Step) -> Tensor:
            reference = clean
            if transformed:  # one call for both sides: the same draw
                handled, other = self.handled()(torch.cat([view, image]), step.rng).chunk(2)
                with torch.no_grad():
                    reference = self.autoencoder.encode(other).float()
            else:
                handled = self.handled()(view, step.rng)
            shift = mean_square(self.autoencoder.encode(handled) - reference)
            return shift - self.config.penalty * mean_square(view - image)

        return value


@dataclass(frozen=True, kw_only=True)
class PhotoGuardDiffusionConfig(IterativeConfig):
    """PhotoGuard's attack on the whole sampler."""

    #: number of updates
    steps: int = 50
    #: at the photo: the objective is targeted, so its gradient is not zero there
    start: Start = "zero"
    #: image to steer the edit to: "zero" of [-1, 1] and "grey" are the same mid grey, or a file
    target: Target = "zero"
    #: the image file, for `target="image"`
    target_image: str | None = None
    #: prompt of the edit that is simulated
    prompt: str = ""
    #: steps of the sampler
    inference_steps: int = 4
    #: share of the sampler's steps that are run, from the noised photo on, (0, 1]
    strength: float = 1.0
    #: classifier-free guidance on the prompt
    guidance: float = 7.5
    #: classifier-free guidance on the photo (InstructPix2Pix)
    image_guidance: float = 1.5
    #: share of fresh noise in each step of the sampler, 0 (DDIM) to 1
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_target(self.target, self.target_image)
        if self.inference_steps < 1:
            raise ConfigError(f"`inference_steps` must be at least 1, got {self.inference_steps}")
        if not 0 < self.strength <= 1:
            raise ConfigError(f"`strength` must lie in (0, 1], got {self.strength}")
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"`eta` must lie in [0, 1], got {self.eta}")

    @classmethod
    def paper(cls) -> Self:
        """The paper's appendix: 16/255 and 2/255, 200 steps."""
        return cls(levels=16, step=2, steps=200, draws=10)

    @classmethod
    def code(cls) -> Self:
        """The official notebook, Euclidean: 16 in [-1, 1] are 2040 levels, a step is 127.5."""
        norm: Norm = "l2"
        update: Update = "l2"
        return cls(levels=2040, norm=norm, step=127.5, update=update, steps=200, draws=10)

    @classmethod
    def linf(cls) -> Self:
        """The official notebook, L-infinity: 12.75 levels."""
        return cls(levels=12.75, step=0.765, steps=200, draws=5)


class PhotoGuardDiffusion(IterativeProtector):
    """Steer what a diffusion editor makes of the photo to a target, through its whole sampler."""

    Config = PhotoGuardDiffusionConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {"diffusion": "stable-diffusion-1-5"}
    paper = "https://arxiv.org/abs/2302.06588"
    config: PhotoGuardDiffusionConfig
    diffusion: LatentDiffusion

    def __init__(
        self,
        config: PhotoGuardDiffusionConfig | None = None,
        *,
        diffusion: LatentDiffusion | None = None,
    ) -> None:
        super().__init__(config)
        self._hold(diffusion=diffusion)

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Negative distance, in [-1, 1], of the edited photo to the target."""
        config = self.config
        target: Image | float = 0.5
        if config.target == "image" and config.target_image is not None:
            target = read_target(config.target_image, image)
        predict = self._guided()
        height, width = image.shape[2:]

        def value(view: Image, step: Step) -> Tensor:
            edited = self._sample(view, step.rng, predict)[..., :height, :width]
            return -_length(2 * (edited.float() - target))

        return value

    def _sample(self, view: Image, rng: torch.Generator, predict: Predict) -> Image:
        """Edit: noise the latent, run the sampler, decode."""
        diffusion, config = self.diffusion, self.config
        timesteps = diffusion.ddim_timesteps(config.inference_steps)
        run = max(1, round(config.strength * len(timesteps)))
        timesteps = timesteps[len(timesteps) - run :]
        clean = diffusion.latent(view)
        condition = clean / diffusion.scaling if diffusion.image_channels else None

        def noise() -> Tensor:
            return torch.randn(clean.shape[1:], generator=rng).to(view)[None]

        latent = diffusion.noisy(clean, noise(), timesteps[0])
        for timestep, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
            latent = diffusion.ddim_step(
                latent, predict(latent, timestep, condition), timestep, previous,
                eta=config.eta, noise=noise() if config.eta else None,
            )  # fmt: skip
        return diffusion.autoencoder.decode(latent / diffusion.scaling)

    def _guided(self) -> Predict:
        """The denoiser under guidance; branches that agree are run once."""
        diffusion, config = self.diffusion, self.config
        prompted, empty = diffusion.embed(config.prompt), diffusion.embed("")
        same = config.prompt == ""

        def run(latent: Tensor, timestep: int, text: Tensor, condition: Tensor | None) -> Tensor:
            return diffusion.predict(latent, timestep, text, condition, checkpoint=True)

        def predict(latent: Tensor, timestep: int, condition: Tensor | None) -> Tensor:
            full = run(latent, timestep, prompted, condition)
            blindfolded = condition is not None and config.image_guidance != 1
            if not same and (config.guidance != 1 or blindfolded):
                unprompted = run(latent, timestep, empty, condition)
            else:
                unprompted = full
            guided = unprompted + config.guidance * (full - unprompted)
            if condition is None or not blindfolded:
                return guided
            blind = run(latent, timestep, empty, torch.zeros_like(condition))
            return guided + (config.image_guidance - 1) * (unprompted - blind)

        return predict


#: (latent, timestep, latent of the photo or None) -> predicted noise
Predict = Callable[[Tensor, int, Tensor | None], Tensor]
