"""Unconditional diffusion in pixel space: what photos of faces look like, and nothing else.

Source:
    Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel, 2020),
    https://arxiv.org/abs/2006.11239: `ancestral_step`.
    Denoising Diffusion Implicit Models (Song, Meng, Ermon, 2021),
    https://arxiv.org/abs/2010.02502: `deterministic_step`.
    Improved Denoising Diffusion Probabilistic Models (Nichol, Dhariwal, 2021),
    https://arxiv.org/abs/2102.09672: variances that a network learned, and fewer steps.

Differs:
    A step starts from a prediction of the clean state, so that a purifier can correct it in between
    (diffusers' schedulers clip and step in one call, and the deterministic one fails on networks
    that predict variances too).
    Fewer steps are spread so that the last one always ends in the clean state.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from shields.errors import ConfigError, WeightsError
from shields.models.base import Frozen, signed_range_to_unit, unit_range_to_signed
from shields.models.diffusion import from_folder
from shields.types import Image
from shields.weights import Card, read_table

__all__ = ["Prediction", "UnconditionalDiffusion"]

#: what a scheduler may be asked for; the rest of its settings concerns its own sampling
_SCHEDULE = frozenset(inspect.signature(DDPMScheduler.__init__).parameters) - {"self"}


class Prediction(NamedTuple):
    """What the network makes of a noisy state."""

    #: (B, 3, H, W), the state without noise, about [-1, 1]
    clean: Tensor
    #: (B, 3, H, W), the noise in it, in agreement with `clean`
    noise: Tensor
    #: where the variance of an ancestral step lies between the least possible one (0) and the
    #: greatest (1), on a logarithmic scale; (B, 3, H, W) where the network learned it
    share: Tensor | float


class UnconditionalDiffusion(Frozen):
    """A denoiser of whole images, with its noise schedule.

    It works on *states*: images in [-1, 1] that carry noise. `state` and `image` convert. A state
    at timestep t has been through t + 1 steps of noise; timestep -1 is the clean one.

    Args:
        network: (B, 3, H, W) and a timestep -> an object whose `sample` is (B, 3, H, W), or
            (B, 6, H, W) where variances are predicted.
        schedule: Settings of a DDPM scheduler as diffusers names them: betas, `prediction_type`,
            `variance_type`.
        size: Side of the images that it was trained on, pixels.
        multiple: Sides of states must be multiples of this, pixels.

    Raises:
        WeightsError: Noise, velocity and fixed or interpolated variances are known, no others.
    """

    HOT = ("_denoise",)

    def __init__(
        self, network: nn.Module, schedule: Mapping[str, Any], *, size: int, multiple: int = 1
    ) -> None:
        super().__init__()
        self.network, self.size, self.multiple = network, size, multiple
        self._configure(schedule)
        self.freeze()

    def _configure(self, schedule: Mapping[str, Any]) -> None:
        known = {key: value for key, value in schedule.items() if key in _SCHEDULE}
        try:
            scheduler = DDPMScheduler(**known)
        # diffusers raises several types where a setting makes no sense.
        except Exception as error:
            raise WeightsError(f"the noise schedule cannot be read: {error}") from error
        self._prediction = str(scheduler.config.prediction_type)
        self._variance = str(scheduler.config.variance_type)
        if self._prediction not in {"epsilon", "v_prediction"}:
            raise WeightsError(f"a denoiser that predicts {self._prediction!r} is not known")
        # Plain numbers: reading them from a GPU would wait for it at every step.
        self._signals: list[float] = scheduler.alphas_cumprod.tolist()
        if not min(self._signals) > 0:
            raise WeightsError("a noise schedule that ends without any signal is not known")
        self.timesteps = len(self._signals)

    @classmethod
    def load(cls, source: Path, card: Card) -> Self:
        """Load the folder of a DDPM pipeline of diffusers, or of a `UNet2DModel`.

        Args:
            source: A folder with `unet` and `scheduler` in it, or with `config.json`, the weights
                and `scheduler_config.json` side by side.
            card: Its `[config]` holds settings of the schedule that the folder lacks or has wrong.

        Raises:
            WeightsError: It is no such folder, the schedule is unknown, or the network takes
                anything but a photo.
        """
        folder = source / "unet" if (source / "unet").is_dir() else source
        if not (folder / "config.json").is_file():
            raise WeightsError(
                f"{source} should be a folder in diffusers' layout with a UNet2DModel, but there is"
                f" no {folder / 'config.json'}"
            )
        schedule = {**_read_schedule(source), **card.config}
        if not schedule:
            raise WeightsError(
                f"{source} does not say which noise schedule belongs to the network: put its "
                "scheduler_config.json there, or the settings into the card's [config]"
            )
        network = from_folder(UNet2DModel, folder)
        return cls(network, schedule, **_layout(network.config, source))

    def state(self, image: Image) -> Tensor:
        """Convert an image (B, 3, H, W), [0, 1] to a clean state, [-1, 1]."""
        return unit_range_to_signed(image)

    def image(self, state: Tensor) -> Image:
        """Convert a clean state to an image of about [0, 1], not clamped."""
        return signed_range_to_unit(state)

    def noisy(self, state: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """Mix a clean state (B, 3, H, W) with noise (B or 1, 3, H, W) as at `timestep`."""
        signal = self._signal(timestep)
        return math.sqrt(signal) * state + math.sqrt(1 - signal) * noise

    def predict(
        self, state: Tensor, timestep: int, *, clip: bool = True, batch: int = 0
    ) -> Prediction:
        """Predict the clean state behind a noisy one.

        Args:
            state: (B, 3, H, W), sides multiples of `multiple`.
            timestep: 0 up to `timesteps` - 1.
            clip: Keep the prediction in [-1, 1], and let the noise follow.
            batch: States that run at once; 0 for all of them.

        Returns:
            Clean state, noise and share of the variance; a gradient flows, at the price of one
            further run of the network in the backward pass instead of its activations.
        """
        parts = torch.split(state, batch or len(state))
        output = torch.cat([self._run(part, timestep) for part in parts])
        predicted, channels = output[:, :3], output.shape[1]
        signal = self._signal(timestep)
        if self._prediction == "epsilon":
            clean = (state - math.sqrt(1 - signal) * predicted) / math.sqrt(signal)
        else:
            clean = math.sqrt(signal) * state - math.sqrt(1 - signal) * predicted
        if clip:
            clean = clean.clamp(-1, 1)
        noise = (state - math.sqrt(signal) * clean) / math.sqrt(1 - signal)
        if self._variance == "learned_range" and channels == 6:
            return Prediction(clean, noise, (output[:, 3:] + 1) / 2)
        return Prediction(clean, noise, 1.0 if "large" in self._variance else 0.0)

    def _run(self, state: Tensor, timestep: int) -> Tensor:
        if state.requires_grad and torch.is_grad_enabled():
            output: Tensor = recompute(self._denoise, state, timestep, use_reentrant=False)
            return output
        return self._denoise(state, timestep)

    def _denoise(self, state: Tensor, timestep: int) -> Tensor:
        output: Tensor = self.network(state, timestep).sample
        return output

    def deterministic_step(self, prediction: Prediction, previous: int) -> Tensor:
        """Go to the state (B, 3, H, W) at `previous` without fresh noise; below 0 ends it."""
        signal = self._signal(previous)
        return math.sqrt(signal) * prediction.clean + math.sqrt(1 - signal) * prediction.noise

    def ancestral_step(
        self, prediction: Prediction, timestep: int, previous: int, noise: Tensor
    ) -> Tensor:
        """Draw the state at `previous` given the one at `timestep`.

        Args:
            prediction: Of the state at `timestep`.
            timestep: Where the state is.
            previous: The next, less noisy timestep; below 0 after the last one, where nothing is
                added any more.
            noise: (B or 1, 3, H, W), standard normal.

        Returns:
            (B, 3, H, W) at `previous`.
        """
        signal, target = self._signal(timestep), self._signal(previous)
        if previous < 0:
            return prediction.clean
        most = 1 - signal / target
        least = most * (1 - target) / (1 - signal)
        mean = math.sqrt(target) * prediction.clean + (
            math.sqrt(1 - target - least) * prediction.noise
        )
        share = prediction.share
        if isinstance(share, Tensor):
            spread = torch.exp((share * math.log(most) + (1 - share) * math.log(least)) / 2)
            return mean + spread * noise
        return mean + math.sqrt(most**share * least ** (1 - share)) * noise

    def respaced(self, start: int, steps: int = 0) -> list[int]:
        """Timesteps of a sampler that starts after `start` steps of noise, noisiest first.

        Args:
            start: 1 up to `timesteps`.
            steps: How many of them are taken, evenly spread; 0 for all.

        Raises:
            ConfigError: There are not that many.

        Example:
            From 150 in 15 steps: 149, 139, …, 9, and from there to the clean state.
        """
        steps = steps or start
        if not 1 <= steps <= start <= self.timesteps:
            raise ConfigError(
                f"a sampler takes between 1 step and as many as there are, at most "
                f"{self.timesteps}; got {steps} steps from timestep {start}"
            )
        return [(2 * start * left + steps) // (2 * steps) - 1 for left in range(steps, 0, -1)]

    def _signal(self, timestep: int) -> float:
        if timestep >= self.timesteps:
            raise ConfigError(f"`timestep` must be below {self.timesteps}, got {timestep}")
        return self._signals[timestep] if timestep >= 0 else 1.0


def _read_schedule(source: Path) -> dict[str, Any]:
    """Settings of the scheduler beside a network; none where there is no such file."""
    for path in (source / "scheduler", source):
        file = path / "scheduler_config.json"
        if file.is_file():
            return read_table(file, f"{file} cannot be read")
    return {}


def _layout(config: Any, source: Path) -> dict[str, int]:  # noqa: ANN401  diffusers' own
    """Size and legal sides of a network, which must take photos and nothing else."""
    if config.in_channels != 3 or config.out_channels not in {3, 6}:
        raise WeightsError(
            f"{source} takes {config.in_channels} channels and gives {config.out_channels}; "
            "needed is a denoiser of photos: 3 channels, and 3 or 6"
        )
    if config.class_embed_type or config.num_class_embeds:
        raise WeightsError(f"{source} wants to be told a class; needed is an unconditional network")
    sides = config.sample_size
    sides = {int(side) for side in (sides if isinstance(sides, list | tuple) else [sides or 0])}
    if len(sides) != 1 or 0 in sides:
        raise WeightsError(f"{source}: `sample_size` must be one side of a square, got {sides}")
    return {"size": sides.pop(), "multiple": 2 ** (len(config.block_out_channels) - 1)}
