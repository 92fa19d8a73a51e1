"""Purifiers that add noise to a photo and let a diffusion model of photos take it out again.

What a timestep means, for the linear schedule of 1000 steps: the noise has a standard deviation of
5.6 levels at 10, 22 at 50, 43 at 100, 66 at 150 and 437 at 500, relative to what is left of the
photo. From some hundred on a part of the face is invented, so the purified *clean* photo has to
stand beside every figure.

Source:
    Diffusion Models for Adversarial Purification (Nie, Guo, Huang, Xiao, Vahdat, Anandkumar, 2022),
    https://arxiv.org/abs/2205.07460: DiffPure.
    Can Protective Perturbation Safeguard Personal Data from Being Exploited by Stable Diffusion?
    (Zhao, Duan, Xu, Wang, Zhang, Du, Guo, Hu, 2024), https://arxiv.org/abs/2312.00084: GrIDPure;
    code https://github.com/ZhengyueZhao/GrIDPure.
    Diffusion-based Adversarial Purification from the Perspective of the Frequency Domain (Pei, Ma,
    Sun, Xu, Huang, 2025), https://arxiv.org/abs/2505.01267: FreqPure; code
    https://github.com/GaozhengPei/FreqPure.

Differs:
    Noise is drawn once per call and shared by the photos of a batch, which so gives what its photos
    give one by one; each tile of a photo has its own.
    `steps` below `timestep` and `sampler="deterministic"` are ours: fewer runs of the network.
    DiffPure: always the discrete chain; the paper's ImageNet figures come from an SDE solver with
    steps of the same length. What was resized is enlarged again by Lanczos. Shrinking is
    antialiased, in the literature's code it is not. `fit="tiles"` is ours.
    GridPure: the command line's defaults differ from the README's values and do not run as
    published; the defaults are the README's. A photo that is one tile has no corner tile, which
    would be the same tile again. Smaller photos are padded by their edge.
    FreqPure: the code compares with a re-noised and once denoised copy of the round's input, drawn
    anew at each step, overwrites the low phases before it limits them, so that its limit has no
    effect, and takes the modulus of the inverse transform. `official` does that (its copy is noised
    to the timestep where the round starts, in the code to the one after); the default does what the
    paper describes, with the protected photo itself as the reference in all rounds, and
    the distance of phases taken around the circle.
    FreqPure's radius counts in an image of 256 pixels; for networks of other sizes it is scaled.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from robustness.purifiers import Purifier, PurifierConfig
from robustness.purifiers.spectrum import exchange
from robustness.purifiers.tiles import Tiles
from robustness.settings import check_settings
from shields.codec import resize
from shields.errors import ConfigError
from shields.jpeg import carry
from shields.models import load as load_network
from shields.models.unconditional import Prediction, UnconditionalDiffusion
from shields.types import Image
from shields.weights import WeightStore

__all__ = [
    "DiffPure",
    "DiffPureConfig",
    "DiffPureFast",
    "DiffPureFastConfig",
    "DiffusionConfig",
    "FreqPure",
    "FreqPureConfig",
    "GridPure",
    "GridPureConfig",
]

#: side of the images in which FreqPure's radii count, pixels
_REFERENCE_SIDE = 256
_MANY = 10**6


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(PurifierConfig):
    """What the three share."""

    #: a card of role "denoiser", a folder or a Hugging Face id in diffusers' layout
    network: str = "ddpm-celebahq-256"
    #: steps of noise that are added, of the schedule's 1000; 0 leaves the photo alone
    timestep: int = 100
    #: steps in which they are removed, evenly spread; 0 for all, as published
    steps: int = 0
    #: "ancestral" draws at each step, as published; "deterministic" needs fewer steps
    sampler: Literal["ancestral", "deterministic"] = "ancestral"
    #: keep predictions of the clean image within the valid range
    clip: bool = True
    #: tiles or photos that run through the network at once
    batch: int = 16

    def __post_init__(self) -> None:
        least = {"timestep": 0, "steps": 0, "batch": 1}
        check_settings(self, {name: (value, _MANY) for name, value in least.items()})
        if self.steps > self.timestep > 0:
            raise ConfigError(
                f"`steps` must not be above `timestep`, got {self.steps} and {self.timestep}"
            )


@dataclass(frozen=True, kw_only=True)
class DiffPureConfig(DiffusionConfig):
    """DiffPure; the class default is what face protections are usually tried with."""

    #: "resize" squeezes the photo into the network's square and enlarges the result; "tiles" keeps
    #: the resolution and averages overlapping squares
    fit: Literal["resize", "tiles"] = "resize"

    @classmethod
    def imagenet(cls) -> Self:
        """The paper's setting for ImageNet; name a network that was trained on it."""
        return cls(timestep=150)

    @classmethod
    def protection(cls) -> Self:
        """What "DiffPure" means to papers on protected photos; likewise."""
        return cls(timestep=100)

    @classmethod
    def celebahq(cls) -> Self:
        """The paper's setting for faces against 16 levels; the identity suffers visibly."""
        return cls(timestep=500, clip=False)


@dataclass(frozen=True, kw_only=True)
class DiffPureFastConfig(DiffPureConfig):
    """A tenth of the network's runs."""

    steps: int = 10
    sampler: Literal["ancestral", "deterministic"] = "deterministic"


@dataclass(frozen=True, kw_only=True)
class GridPureConfig(DiffusionConfig):
    """GrIDPure as its authors recommend it."""

    timestep: int = 10
    #: how often the whole is repeated
    iterations: int = 20
    #: share of the previous iteration's image that stays, [0, 1]
    blend: float = 0.1
    #: distance of neighbouring tiles, pixels; 0 for half a tile
    stride: int = 0
    #: one more tile, put together from the photo's four corners, which one tile alone covers
    corner_tile: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, {"iterations": (0, _MANY), "blend": (0, 1), "stride": (0, _MANY)})


@dataclass(frozen=True, kw_only=True)
class FreqPureConfig(DiffusionConfig):
    """FreqPure with the settings of its authors' ImageNet script."""

    timestep: int = 50
    steps: int = 5
    clip: bool = False
    #: how often the whole is repeated
    rounds: int = 8
    #: frequencies up to here get the photo's amplitude, in waves over 256 pixels; 0 for none
    amplitude_radius: float = 10.0
    #: frequencies up to here get nearly the photo's phase, likewise
    phase_radius: float = 10.0
    #: how far such a phase may be from the photo's, radians
    delta: float = 0.3
    #: what the authors' code does instead of what the paper says
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("rounds", "amplitude_radius", "phase_radius", "delta")
        check_settings(self, {name: (0, float("inf")) for name in names})


class _DiffusionPurifier(Purifier):
    """A purifier with an unconditional diffusion model."""

    Config: ClassVar[type[DiffusionConfig]]
    config: DiffusionConfig

    def __init__(
        self, config: DiffusionConfig | None = None, *, network: UnconditionalDiffusion
    ) -> None:
        super().__init__(config)
        self.network = network
        if self.config.timestep > network.timesteps:
            raise ConfigError(
                f"`timestep` must be at most {network.timesteps} with the denoiser "
                f"{network.name!r}, got {self.config.timestep}"
            )

    @classmethod
    def load(cls, config: DiffusionConfig, *, store: WeightStore, device: torch.device) -> Self:
        """Load the denoiser that the config names."""
        network = load_network("denoiser", config.network, store=store, device=device)
        if not isinstance(network, UnconditionalDiffusion):
            raise ConfigError(f"{config.network!r} is no unconditional diffusion model")
        return cls(config, network=network)

    def _purify(self, image: Image, rng: torch.Generator) -> Image:
        return image if self.config.timestep == 0 else self._run(image, rng)

    @abstractmethod
    def _run(self, image: Image, rng: torch.Generator) -> Image:
        """Purify, with some noise to add."""

    def _squeezed(self, image: Image) -> Image:
        """The whole photo in the network's square."""
        return resize(image, (self.network.size, self.network.size), "bilinear").clamp(0, 1)

    def _fresh(self, state: Tensor, photos: int, rng: torch.Generator) -> Tensor:
        """Noise for the tiles of one photo, the same for every other."""
        shape = (len(state) // photos, *state.shape[1:])
        return torch.randn(shape, generator=rng).to(state).repeat(photos, 1, 1, 1)

    def _diffuse(
        self,
        image: Image,
        photos: int,
        rng: torch.Generator,
        correct: Callable[[Prediction], Prediction] | None = None,
    ) -> Image:
        """Add noise and remove it.

        Args:
            image: (photos * tiles, 3, S, S), [0, 1].
            photos: Over how many photos the tiles are spread evenly.
            rng: Where noise comes from.
            correct: What happens to each prediction before it is used.

        Returns:
            (photos * tiles, 3, S, S), not clamped.
        """
        config, network = self.config, self.network
        timesteps = network.respaced(config.timestep, config.steps)
        state = network.state(image)
        state = network.noisy(state, self._fresh(state, photos, rng), timesteps[0])
        for timestep, previous in zip(timesteps, [*timesteps[1:], -1], strict=True):
            prediction = network.predict(state, timestep, clip=config.clip, batch=config.batch)
            if correct is not None:
                prediction = correct(prediction)
            if config.sampler == "deterministic" or previous < 0:
                state = network.deterministic_step(prediction, previous)
            else:
                fresh = self._fresh(state, photos, rng)
                state = network.ancestral_step(prediction, timestep, previous, fresh)
        return network.image(state)

    def _tiled(self, image: Image, rng: torch.Generator, tiles: Tiles) -> Image:
        """Purify a photo tile by tile, all at once."""
        return tiles.merge(self._diffuse(tiles.cut(image), len(image), rng)).clamp(0, 1)

    def _padded(self, image: Image) -> Image:
        """The photo, at least as large as a tile."""
        bottom, right = (max(self.network.size - side, 0) for side in image.shape[2:])
        if not (bottom or right):
            return image
        return functional.pad(image, (0, right, 0, bottom), mode="replicate")


class DiffPure(_DiffusionPurifier):
    """Noise until the perturbation drowns, then a diffusion model's way back to a photo."""

    Config = DiffPureConfig
    config: DiffPureConfig
    paper = "https://arxiv.org/abs/2205.07460"

    def _run(self, image: Image, rng: torch.Generator) -> Image:
        height, width = image.shape[2:]
        if self.config.fit == "resize":
            purified = self._diffuse(self._squeezed(image), len(image), rng)
            return resize(purified.clamp(0, 1), (height, width), "lanczos")
        padded = self._padded(image)
        size = self.network.size
        tiles = Tiles(*padded.shape[2:], size=size, stride=size // 2, corner_tile=False)
        return self._tiled(padded, rng, tiles)[..., :height, :width]


class DiffPureFast(DiffPure):
    """DiffPure in ten deterministic steps."""

    Config = DiffPureFastConfig
    config: DiffPureFastConfig


class GridPure(_DiffusionPurifier):
    """Many rounds of little noise, on overlapping tiles at the photo's own resolution."""

    Config = GridPureConfig
    config: GridPureConfig
    paper = "https://arxiv.org/abs/2312.00084"

    def _run(self, image: Image, rng: torch.Generator) -> Image:
        height, width = image.shape[2:]
        config, current = self.config, self._padded(image)
        size = self.network.size
        tiles = Tiles(
            *current.shape[2:],
            size=size,
            stride=config.stride or size // 2,
            corner_tile=config.corner_tile,
        )
        for _ in range(config.iterations):
            purified = self._tiled(current, rng, tiles)
            mixed = (1 - config.blend) * purified + config.blend * current
            # Whole levels, as if saved in between; the gradient passes by.
            current = carry((mixed.detach() * 255).round() / 255, mixed)
        return current[..., :height, :width]


class FreqPure(_DiffusionPurifier):
    """A way back that keeps the photo's low frequencies, which perturbations hardly touch."""

    Config = FreqPureConfig
    config: FreqPureConfig
    paper = "https://arxiv.org/abs/2505.01267"

    def _run(self, image: Image, rng: torch.Generator) -> Image:
        photo = current = self._squeezed(image)
        for _ in range(self.config.rounds):
            current = self._round(current, photo, rng).clamp(0, 1)
        return resize(current, (image.shape[2], image.shape[3]), "lanczos")

    def _round(self, current: Image, photo: Image, rng: torch.Generator) -> Image:
        official = self.config.official

        def correct(prediction: Prediction) -> Prediction:
            reference = self._denoised_once(current, rng) if official else photo
            clean = self.network.image(prediction.clean).clamp(0, 1)
            mended = self._exchange(clean, reference)
            # The authors step with the least variance, whatever the network learned.
            return prediction._replace(clean=self.network.state(mended), share=0.0)

        return self._diffuse(current, len(current), rng, correct)

    def _denoised_once(self, current: Image, rng: torch.Generator) -> Image:
        timestep, state = self.config.timestep - 1, self.network.state(current)
        state = self.network.noisy(state, self._fresh(state, len(state), rng), timestep)
        prediction = self.network.predict(state, timestep, clip=False, batch=self.config.batch)
        return self.network.image(prediction.clean).clamp(0, 1)

    def _exchange(self, image: Image, reference: Image) -> Image:
        config, scale = self.config, self.network.size / _REFERENCE_SIDE
        mended = exchange(
            image,
            reference,
            amplitude_radius=config.amplitude_radius * scale,
            phase_radius=config.phase_radius * scale,
            delta=0.0 if config.official else config.delta,
        )
        return (mended.abs() if config.official else mended).clamp(0, 1)
