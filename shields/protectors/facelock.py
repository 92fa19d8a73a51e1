"""FaceLock: make the person unrecognisable after the autoencoder of an editor.

Source:
    Edit Away and My Face Will not Stay: Personal Biometric Defense against Malicious Generative
    Editing (Wang, Zhang, Zhu, Li, Chen, Liu, Xu, Jiang, Tu, 2025),
    https://arxiv.org/abs/2411.16832; code https://github.com/taco-group/FaceLock.

With z = E(x), z' = E(x') and x_d = clamp(Dec(z')), the objective of step n of N is

    w1(n) * -cos(FR(x_d), FR(x))  +  w2(n) * P(x_d, x)  +  0.2 * mean (z' - z)^2

where w1 = 1 from n >= 0.35 N on and w2 = 1 once n > 0.25 N. The designs that the paper rejects on
its way stand in the same file: CVL (-cos of the photo itself), CVL-D (-cos after the autoencoder)
and CVL-DP (CVL-D and a pixel-level term in the face).

Differs:
    The schedule and the decay of the step stand in the code and not in the paper; they are in
    both presets and can be switched off (`scheduled`, `decay`).
    The paper writes the latent term as a sum; the code takes the mean, and so do we: a sum over
    a latent of 16 384 values would drown the other terms. Latents of other autoencoders have
    another scale than those of Stable Diffusion: the formula is kept, `latent_weight` is there.
    The paper maximises a "similarity"; we take its negative, as its appendix and code do.
    The start is uniform in the budget (code), not N(0, 1) (paper): one projection turns the
    latter into sign noise.
    The alignment is computed on the clean photo, once, and no gradient flows through landmarks.
    All that depends on the clean photo is computed once, and a term without weight is not run;
    the code recomputes the former at each step and runs the latter with weight 0.
    The objective is a number per photo, so batches are possible; everything is float32 unless
    `precision` says otherwise, where the code runs and steps in float16.
    `photo_weight`, `jitter` and `hardened()` are ours: they make the result carry over to
    networks that it was not optimised against.
    CVL-DP: Eq. 4 read literally has no network in its last term; the prose speaks of the
    difference between output and photo. Both readings are offered, the literal one is the
    default. Its weight is not given. The face region is what the aligned crop covers.
    The paper's recognizer and perceptual network are interchangeable roles here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from shields.errors import ConfigError
from shields.models.base import Autoencoder, Perceptual, Recognizer
from shields.protectors.base import (
    IterativeConfig,
    IterativeProtector,
    ProtectorConfig,
    check_weights,
)
from shields.protectors.encoder import mean_square
from shields.types import Image, Mask, Objective, Step

__all__ = [
    "Cvl",
    "CvlConfig",
    "CvlD",
    "CvlDConfig",
    "CvlDp",
    "CvlDpConfig",
    "FaceLock",
    "FaceLockConfig",
    "face_region",
    "jittered",
]


@dataclass(frozen=True, kw_only=True)
class FaceLockConfig(IterativeConfig):
    """FaceLock; the class default is the setting for the embedded networks at 8 levels."""

    #: number of updates
    steps: int = 40
    #: weight of the cosine between clean face and face after the autoencoder
    identity_weight: float = 1.0
    #: weight of the mean squared distance of the latents
    latent_weight: float = 0.2
    #: weight of the perceptual distance between clean photo and photo after the autoencoder
    perceptual_weight: float = 0.0
    #: weight of the cosine between clean face and face of the protected photo itself
    photo_weight: float = 0.0
    #: standard deviation of a random affine map added to the alignment at each step, as a share
    #: of half the aligned crop's side
    jitter: float = 0.0
    #: bring in the perceptual term after `perceptual_from`, the two cosines at `identity_from`
    scheduled: bool = False
    #: share of the steps after which the perceptual term runs, [0, 1)
    perceptual_from: float = 0.25
    #: share of the steps at which the cosines start, [0, 1)
    identity_from: float = 0.35

    _WEIGHTS: ClassVar[tuple[str, ...]] = (
        "identity_weight", "latent_weight", "perceptual_weight", "photo_weight",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self, self._WEIGHTS, ("jitter",))
        for name in ("perceptual_from", "identity_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}")
        if self.scheduled and not self.latent_weight:
            raise ConfigError("`scheduled` needs `latent_weight` above 0: it starts with it alone")
        if self.scheduled and (self.keep == "best" or self.patience):
            raise ConfigError(
                "`scheduled` changes the objective on the way, so values of different steps cannot "
                'be compared: use `keep="last"` and `patience=0`, or `scheduled=False`'
            )

    @classmethod
    def paper(cls) -> Self:
        """Table A1 (2.55 levels) with the schedule of the code."""
        return cls(
            levels=2.55, step=0.3825, steps=100, decay="linear",
            perceptual_weight=1.0, scheduled=True,
        )  # fmt: skip

    @classmethod
    def code(cls) -> Self:
        """The defaults of the official command line (3.825 levels)."""
        return dataclasses.replace(cls.paper(), levels=3.825, step=1.275)

    def hardened(self) -> Self:
        """Average over everyday handling, and aim past the very networks at hand (`--robust`)."""
        return dataclasses.replace(
            super().hardened(), photo_weight=max(1.0, self.photo_weight), jitter=0.02,
            momentum=0.9, smooth=7,
        )  # fmt: skip

    def identity_runs(self, step: Step) -> bool:
        """Whether the cosines take part in this step."""
        return not self.scheduled or step.index >= self.identity_from * step.total - 1e-9

    def perceptual_runs(self, step: Step) -> bool:
        """Whether the perceptual term takes part in this step."""
        return not self.scheduled or step.index > self.perceptual_from * step.total + 1e-9


def jittered(
    matrix: Tensor, sigma: float, crop_size: tuple[int, int], rng: torch.Generator
) -> Tensor:
    """Add a small random affine map around the crop's centre to alignments (B, 2, 3).

    One draw for the whole batch; `sigma` is the deviation of each of the six numbers, translations
    in half sides of the crop.
    """
    if not sigma:
        return matrix
    height, width = crop_size
    draw = (torch.randn(2, 3, generator=rng) * sigma).to(matrix)
    half = matrix.new_tensor([width / 2, height / 2])
    centre = matrix.new_tensor([(width - 1) / 2, (height - 1) / 2])
    linear = torch.eye(2).to(matrix) + draw[:, :2]
    shift = matrix[..., 2] - centre
    moved = shift @ linear.T + centre + draw[:, 2] * half
    return torch.cat([linear @ matrix[..., :2], moved.unsqueeze(-1)], dim=-1)


def face_region(matrix: Tensor, crop_size: tuple[int, int], image: Image) -> Mask:
    """The pixels of each photo that its aligned crop shows, (B, 1, H, W), 0 or 1."""
    height, width = image.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack([columns, rows, torch.ones_like(rows)]).flatten(1).to(matrix)
    # Not a matrix product: under autocast it would round coordinates to 8 bits.
    x, y = (matrix[..., None] * points).sum(dim=2).unbind(1)
    inside = (x >= -0.5) & (x < crop_size[1] - 0.5) & (y >= -0.5) & (y < crop_size[0] - 0.5)
    return inside.view(len(matrix), 1, height, width).to(image)


@dataclass(frozen=True, kw_only=True)
class _Clean:
    """What depends on the clean photo alone; None where no term with weight asks for it."""

    image: Image
    latent: Tensor | None
    matrix: Tensor | None
    identity: Tensor | None
    perceptual: tuple[Tensor, ...] | None


class _Journey:
    """A protected photo on its way through the autoencoder; a stage runs when first asked for."""

    def __init__(self, view: Image, protector: FaceLock) -> None:
        self.view, self._protector = view, protector

    @cached_property
    def latent(self) -> Tensor:
        return self._protector.autoencoder.encode(self.view)

    @cached_property
    def decoded(self) -> Image:
        height, width = self.view.shape[2:]
        return self._protector.autoencoder.decode(self.latent).clamp(0, 1)[..., :height, :width]


class FaceLock(IterativeProtector):
    """Make the face unrecognisable once an editor's autoencoder has encoded and decoded it."""

    Config = FaceLockConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {
        "autoencoder": "portrait-ae",
        "recognizer": "face-embedder",
        "perceptual": "features:portrait-ae",
    }
    paper = "https://arxiv.org/abs/2411.16832"
    config: FaceLockConfig
    autoencoder: Autoencoder
    recognizer: Recognizer
    perceptual: Perceptual

    def __init__(
        self,
        config: FaceLockConfig | None = None,
        *,
        autoencoder: Autoencoder | None = None,
        recognizer: Recognizer | None = None,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__(config)
        self._hold(autoencoder=autoencoder, recognizer=recognizer, perceptual=perceptual)

    @classmethod
    def roles(cls, config: ProtectorConfig) -> Mapping[str, str]:
        """The networks of the terms that have weight."""
        if not isinstance(config, FaceLockConfig):
            return cls.NETWORKS
        used = {
            "autoencoder": (
                config.identity_weight or config.latent_weight or config.perceptual_weight
            ),
            "recognizer": config.identity_weight or config.photo_weight,
            "perceptual": config.perceptual_weight,
        }
        return {role: name for role, name in cls.NETWORKS.items() if used[role]}

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Sum of the terms that take part in a step."""
        clean = self._clean(image, landmarks)

        def value(view: Image, step: Step) -> Tensor:
            return torch.stack(list(self._terms(_Journey(view, self), clean, step))).sum(dim=0)

        return value

    @torch.no_grad()
    def _clean(self, image: Image, landmarks: Tensor | None) -> _Clean:
        config = self.config
        roles = self.roles(config)
        matrix = self.recognizer.matrix(landmarks, image) if "recognizer" in roles else None
        return _Clean(
            image=image,
            latent=self.autoencoder.encode(image).float() if config.latent_weight else None,
            matrix=matrix,
            identity=None if matrix is None else self.recognizer(image, matrix),
            perceptual=self.perceptual.features(image) if config.perceptual_weight else None,
        )

    def _terms(self, journey: _Journey, clean: _Clean, step: Step) -> Iterator[Tensor]:
        """The weighted terms (B,) of this step; one without weight or not yet due is not run."""
        config = self.config
        if clean.latent is not None:
            yield config.latent_weight * mean_square(journey.latent - clean.latent)
        if clean.perceptual is not None and config.perceptual_runs(step):
            features = self.perceptual.features(journey.decoded)
            distance = self.perceptual.distance(features, clean.perceptual)
            yield config.perceptual_weight * distance.float()
        if clean.matrix is None or clean.identity is None or not config.identity_runs(step):
            return
        matrix = jittered(clean.matrix, config.jitter, self.recognizer.crop_size, step.rng)
        if config.identity_weight:
            embedding = self.recognizer(journey.decoded, matrix)
            yield -config.identity_weight * (embedding * clean.identity).sum(dim=1)
        if config.photo_weight:
            embedding = self.recognizer(journey.view, matrix)
            yield -config.photo_weight * (embedding * clean.identity).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class _DesignConfig(FaceLockConfig):
    #: weight of the mean squared distance of the latents
    latent_weight: float = 0.0

    @classmethod
    def paper(cls) -> Self:
        """Table A1 (2.55 levels) with the decay of the code."""
        return cls(levels=2.55, step=0.3825, steps=100, decay="linear")

    @classmethod
    def code(cls) -> Self:
        """The defaults of the official command line, whose code lacks the designs themselves."""
        return dataclasses.replace(cls.paper(), levels=3.825, step=1.275)


@dataclass(frozen=True, kw_only=True)
class CvlConfig(_DesignConfig):
    """Design I: the cosine of the photo itself, no autoencoder."""

    #: weight of the cosine between clean face and face after the autoencoder
    identity_weight: float = 0.0
    #: weight of the cosine between clean face and face of the protected photo itself
    photo_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CvlDConfig(_DesignConfig):
    """Design II: the cosine after the autoencoder."""


@dataclass(frozen=True, kw_only=True)
class CvlDpConfig(CvlDConfig):
    """Design III: design II and a pixel-level term in the face."""

    #: weight of the pixel-level term, a Euclidean length in image units
    pixel_weight: float = 0.1
    #: "literal": length of the perturbation in the face; "prose": of what the autoencoder changed
    reading: Literal["literal", "prose"] = "literal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading not in ("literal", "prose"):
            raise ConfigError(f'`reading` must be "literal" or "prose", got {self.reading!r}')
        if not self.pixel_weight >= 0:
            raise ConfigError(f"`pixel_weight` must be 0 or more, got {self.pixel_weight}")


class Cvl(FaceLock):
    """FaceLock's design I: make the face of the photo itself unrecognisable, no autoencoder."""

    Config = CvlConfig


class CvlD(FaceLock):
    """FaceLock's design II: make the face unrecognisable after the autoencoder, nothing else."""

    Config = CvlDConfig


class CvlDp(FaceLock):
    """FaceLock's design III: design II and a change of the face's pixels."""

    Config = CvlDpConfig
    config: CvlDpConfig

    @classmethod
    def roles(cls, config: ProtectorConfig) -> Mapping[str, str]:
        """The networks of the terms that have weight; one reading looks at the round trip."""
        needed = set(super().roles(config))
        if isinstance(config, CvlDpConfig) and config.pixel_weight and config.reading == "prose":
            needed.add("autoencoder")
        return {role: name for role, name in cls.NETWORKS.items() if role in needed}

    def _terms(self, journey: _Journey, clean: _Clean, step: Step) -> Iterator[Tensor]:
        yield from super()._terms(journey, clean, step)
        if not self.config.pixel_weight:
            return
        matrix = clean.matrix
        if matrix is None:  # no recognizer in use: the face is the whole photo
            region = torch.ones_like(clean.image[:, :1])
        else:
            region = face_region(matrix, self.recognizer.crop_size, clean.image)
        changed = journey.view if self.config.reading == "literal" else journey.decoded
        difference = ((changed - clean.image) * region).float().flatten(1)
        # A length has no gradient at 0; the tiny offset keeps it finite there.
        yield self.config.pixel_weight * (difference.square().sum(dim=1) + 1e-12).sqrt()
