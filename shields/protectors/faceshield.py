"""FaceShield: hide the face from recognizers, from a detector and from image prompts.

Source:
    FaceShield: Defending Facial Image against Deepfake Threats (Jeong, In, Kim, Shin, Jeong, Yoon,
    Chung, Kim, 2025), https://arxiv.org/abs/2412.09921; code
    https://github.com/kuai-lab/iccv25_faceshield.

    The objective is 4 sum (1 - cos(FR(x'), FR(x))) over recognizers FR, plus mean |I(x') - I(x)| of
    an image encoder I, less mean (A(x') - R)^2 of a denoiser's attention A to the photo, less 9
    times how far a detector's sure places, above 0.6, are from 0.4. Each step is softened where it
    has a sharp edge, added, and the sum is low-passed: 25 of the 64 frequencies of each block of
    8 x 8 are kept.

Differs:
    The paper's recognizers are two ArcFaces, the adapter IP-Adapter on Stable Diffusion 1.5, the
    detector MTCNN. Here the embedded recognizer and MTCNN run by default, other recognizers can be
    added, and the two terms of the adapter have weight 0 until its weights are at hand
    (`attention`, and the authors' own run, `code`, give them 1).
    The code compares the second recognizer with a reference of the first; here each with its own.
    What the attention is pulled to could not be read. Here R is the clean photo's attention, but
    even over the tokens where it varies most: `attention_threshold` of the largest variance of its
    layer. The paper's aim, to leave the face out, is kept; its threshold may mean something else.
    The code weighs the pyramid's levels from the eighth on by 8, 10 and 20, which are the three
    coarsest of a photo of 512 pixels; here these weights go to the three coarsest of any size.
    Photos enter networks in the ranges they want, latents are posterior means, faces are aligned.
    The code starts at the photo, where a cosine has no gradient but rounding; the presets do, the
    class default starts inside the budget.
    The borders of the photo count neither as an edge nor as zeros. As in the code the clamp comes
    after the low-pass and brings back a little of the high frequencies. Saved photos are rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.budget import Budget
from shields.errors import ConfigError
from shields.models.base import Recognizer
from shields.pgd import pgd
from shields.protectors.base import (
    IterativeConfig,
    IterativeProtector,
    ProtectorConfig,
    check_weights,
)
from shields.protectors.encoder import mean_square
from shields.types import Image, Mask, Objective, Perturbation, Progress, Step

if TYPE_CHECKING:
    from shields.models.detectors import MtcnnDetector, ProposalNetwork
    from shields.models.diffusion import LatentDiffusion
    from shields.models.ip_adapter import IpAdapterModel

__all__ = ["FaceShield", "FaceShieldConfig", "low_pass", "soften"]

#: weights of the pyramid's levels, coarsest first; all finer ones have the last
_LEVEL_WEIGHTS = (20.0, 10.0, 8.0, 6.0)
#: a place counts as a face above the first and is pulled to the second
_SURE, _DOUBTFUL = 0.6, 0.4
#: frequencies kept in each row of a block's cosine transform
_KEPT = (6, 5, 5, 4, 3, 2, 0, 0)
_BLOCK = 8
_WINDOW, _SIGMA = 9, 5.0


@lru_cache(maxsize=1)
def _block_filter() -> Tensor:
    """(64, 64): a block of 8 x 8, row by row, to the same with its low frequencies alone."""
    places = torch.arange(_BLOCK, dtype=torch.float64)
    cosines = torch.cos((places + 0.5) * places[:, None] * math.pi / _BLOCK) / 2
    cosines[0] /= math.sqrt(2)
    transform = torch.kron(cosines, cosines)
    kept = torch.stack([places < count for count in _KEPT]).flatten()
    return (transform.T @ (transform * kept[:, None])).float()


def low_pass(perturbation: Perturbation) -> Perturbation:
    """Keep the 25 lowest of the 64 frequencies of each 8 x 8 block of (B, 3, H, W)."""
    height, width = perturbation.shape[2:]
    padding = (0, -width % _BLOCK, 0, -height % _BLOCK)
    padded = functional.pad(perturbation, padding, mode="replicate")
    blocks = functional.unfold(padded, _BLOCK, stride=_BLOCK)
    blocks = blocks.view(len(padded), -1, _BLOCK**2, blocks.shape[2])
    kept = torch.einsum("pq,bcql->bcpl", _block_filter().to(perturbation), blocks)
    size = (padded.shape[2], padded.shape[3])
    return functional.fold(kept.flatten(1, 2), size, _BLOCK, stride=_BLOCK)[..., :height, :width]


def _each_channel(image: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel of (B, C, H, W) with (k, k), borders repeated, same size."""
    channels, radius = image.shape[1], kernel.shape[0] // 2
    padded = functional.pad(image, (radius,) * 4, mode="replicate")
    return functional.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def soften(update: Tensor) -> Tensor:
    """Blur a step (B, 3, H, W) around its sharpest edges, each sample for itself.

    An edge is where a Sobel response is the largest of the sample; it and four pixels around it
    get a Gaussian of 9 pixels and sigma 5.
    """
    low, high = update.flatten(1).aminmax(dim=1, keepdim=True)
    span = (high - low).clamp_min(1e-12)
    scaled = ((update.flatten(1) - low) / span).view_as(update)
    across = update.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    edges = torch.zeros_like(update)
    for kernel in (across, across.T):
        response = _each_channel(scaled, kernel).abs()
        largest = response.flatten(1).amax(dim=1).view(-1, 1, 1, 1)
        # Steps are a few whole signs, so that equals differ by rounding alone.
        edges = torch.maximum(edges, ((response >= largest - 1e-4) & (largest > 1e-4)).float())
    edges = functional.max_pool2d(edges, _WINDOW, stride=1, padding=_WINDOW // 2)
    places = torch.arange(_WINDOW).to(update) - _WINDOW // 2
    line = torch.exp(-0.5 * (places / _SIGMA) ** 2)
    line = line / line.sum()
    return torch.lerp(update, _each_channel(update, torch.outer(line, line)), edges)


@dataclass(frozen=True, kw_only=True)
class _ShapedBudget(Budget):
    """A budget for one run, whose projection also shapes: what has been added, then the sum."""

    softened: bool = True
    low_passed: bool = True
    #: the perturbation that was returned last
    last: list[Tensor] = field(default_factory=list)

    def project(self, perturbation: Perturbation, low: Tensor, high: Tensor) -> Perturbation:
        """Soften the change since the last call, low-pass the sum, and only then bound it."""
        last = self.last.pop() if self.last else torch.zeros_like(perturbation)
        if perturbation is not last:
            update = perturbation - last
            perturbation = last + (soften(update) if self.softened else update)
            if self.low_passed:
                perturbation = low_pass(perturbation)
            perturbation = super().project(perturbation, low, high)
        self.last.append(perturbation)
        return perturbation


@dataclass(frozen=True, kw_only=True)
class FaceShieldConfig(IterativeConfig):
    """FaceShield; the class default is the setting for the embedded networks at 8 levels."""

    #: number of updates
    steps: int = 30
    #: weight of 1 - cosine between clean and protected face
    identity_weight: float = 4.0
    #: weight of the pull of the detector's sure places to doubtful ones
    detector_weight: float = 9.0
    #: how many of the pyramid's levels count, from the coarsest on; 0 = all
    detector_levels: int = 3
    #: weight of the mean absolute change of the image prompt's embedding
    prompt_weight: float = 0.0
    #: weight of the mean squared distance of the denoiser's attention to its reference
    attention_weight: float = 0.0
    #: share of a layer's largest variance above which its attention is evened out, [0, 1]
    attention_threshold: float = 0.2
    #: blur each step around its sharpest edges
    softened: bool = True
    #: keep the perturbation to low frequencies
    low_passed: bool = True

    _WEIGHTS: ClassVar[tuple[str, ...]] = (
        "identity_weight", "detector_weight", "prompt_weight", "attention_weight",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self, self._WEIGHTS)
        if self.detector_levels < 0:
            raise ConfigError(f"`detector_levels` must be 0 or more, got {self.detector_levels}")
        if not 0 <= self.attention_threshold <= 1:
            raise ConfigError(
                f"`attention_threshold` must lie in [0, 1], got {self.attention_threshold}"
            )
        if self.space != "pixel" and (self.softened or self.low_passed):
            raise ConfigError('`space="tanh"` needs softened=false and low_passed=false')

    @classmethod
    def paper(cls) -> Self:
        """The paper's budget and walk (12 levels), with the terms that need no adapter."""
        return cls(levels=12, start="zero")

    @classmethod
    def attention(cls) -> Self:
        """All four terms at the paper's weights; needs IP-Adapter and Stable Diffusion 1.5."""
        return cls(levels=12, start="zero", prompt_weight=1.0, attention_weight=1.0)

    @classmethod
    def code(cls) -> Self:
        """What the published command runs: no detector term; needs the same networks."""
        return dataclasses.replace(cls.attention(), detector_weight=0.0)


@dataclass(frozen=True, kw_only=True)
class _Clean:
    """What depends on the clean photo alone; empty or None where no term asks for it."""

    #: alignment and embedding of each recognizer
    faces: tuple[tuple[Tensor, Tensor], ...]
    prompt: Tensor | None
    #: scaled latent and embedding of the empty prompt
    scene: tuple[Tensor, Tensor] | None
    #: what the attention of each layer is pulled to
    attention: tuple[Tensor, ...]


class FaceShield(IterativeProtector):
    """Hide the face from recognizers, a detector and image prompts, in low frequencies alone."""

    Config = FaceShieldConfig
    NETWORKS: ClassVar[Mapping[str, str]] = {
        "recognizer": "face-embedder",
        "detector": "mtcnn",
        "adapter": "ip-adapter-sd15-prompt",
        "diffusion": "stable-diffusion-1-5",
    }
    paper = "https://arxiv.org/abs/2412.09921"
    config: FaceShieldConfig
    recognizer: Recognizer
    detector: ProposalNetwork
    adapter: IpAdapterModel
    diffusion: LatentDiffusion

    def __init__(
        self,
        config: FaceShieldConfig | None = None,
        *,
        recognizer: Recognizer | None = None,
        detector: MtcnnDetector | None = None,
        adapter: IpAdapterModel | None = None,
        diffusion: LatentDiffusion | None = None,
        further: Sequence[Recognizer] = (),
    ) -> None:
        super().__init__(config)
        proposals = None if detector is None else detector.proposals
        self._hold(recognizer=recognizer, detector=proposals, adapter=adapter, diffusion=diffusion)
        #: recognizers beside the first
        self.further = nn.ModuleList(further)

    @classmethod
    def roles(cls, config: ProtectorConfig) -> Mapping[str, str]:
        """The networks of the terms that have weight."""
        if not isinstance(config, FaceShieldConfig):
            return cls.NETWORKS
        used = {
            "recognizer": config.identity_weight,
            "detector": config.detector_weight,
            "adapter": config.prompt_weight or config.attention_weight,
            "diffusion": config.attention_weight,
        }
        return {role: name for role, name in cls.NETWORKS.items() if used[role]}

    def objective(
        self, image: Image, mask: Mask, *, landmarks: Tensor | None, rng: torch.Generator
    ) -> Objective:
        """Sum of the terms that have weight."""
        clean = self._clean(image, landmarks)

        def value(view: Image, step: Step) -> Tensor:
            return torch.stack(list(self._terms(view, clean))).sum(dim=0)

        return value

    @torch.no_grad()
    def _clean(self, image: Image, landmarks: Tensor | None) -> _Clean:
        config, faces, prompt, scene, attention = self.config, [], None, None, []
        for network in self._recognizers():
            matrix = network.matrix(landmarks, image)
            faces.append((matrix, network(image, matrix)))
        if config.prompt_weight or config.attention_weight:
            prompt = self.adapter.embed(image).float()
        if config.attention_weight and prompt is not None:
            scene = (self.diffusion.latent(image), self.diffusion.embed(""))
            attention = [
                self._evened(layer)
                for layer in self.adapter.attention(self.diffusion, *scene, prompt)
            ]
        return _Clean(faces=tuple(faces), prompt=prompt, scene=scene, attention=tuple(attention))

    def _recognizers(self) -> list[Recognizer]:
        if not self.config.identity_weight:
            return []
        further = [network for network in self.further if isinstance(network, Recognizer)]
        return [self.recognizer, *further]

    def _evened(self, layer: Tensor) -> Tensor:
        """Attention (B, heads, places, tokens), even over the tokens where it varies most."""
        variance = layer.var(dim=-1, unbiased=False, keepdim=True)
        largest = variance.flatten(1).amax(dim=1).view(-1, 1, 1, 1)
        varied = variance > self.config.attention_threshold * largest
        return torch.where(varied, 1 / layer.shape[-1], layer)

    def _terms(self, view: Image, clean: _Clean) -> Iterator[Tensor]:
        """The weighted terms (B,); one without weight is not run."""
        config = self.config
        for network, (matrix, face) in zip(self._recognizers(), clean.faces, strict=True):
            cosine = (network(view, matrix) * face).sum(dim=1)
            yield config.identity_weight * (1 - cosine)
        if config.detector_weight:
            yield -config.detector_weight * self._sureness(view)
        if clean.prompt is None:
            return
        embedding = self.adapter.embed(view)
        if config.prompt_weight:
            change = (embedding.float() - clean.prompt).abs().mean(dim=1)
            yield config.prompt_weight * change
        if clean.scene is not None:
            layers = self.adapter.attention(self.diffusion, *clean.scene, embedding)
            gaps = [
                mean_square(layer - goal)
                for layer, goal in zip(layers, clean.attention, strict=True)
            ]
            yield -config.attention_weight * torch.stack(gaps).sum(dim=0)

    def _sureness(self, view: Image) -> Tensor:
        """How far the detector's sure places are above doubt, (B,); 0 where there is none."""
        sizes = self.detector.sizes(view.shape[2], view.shape[3])[::-1]
        total = view.new_zeros(len(view))
        for place, size in enumerate(sizes[: self.config.detector_levels or None]):
            weight = _LEVEL_WEIGHTS[min(place, len(_LEVEL_WEIGHTS) - 1)]
            for kernel in ("bilinear", "area"):
                face = self.detector(view, size, kernel).float().flatten(1)
                excess = torch.where(face > _SURE, face - _DOUBTFUL, 0)
                total = total + weight * excess.square().mean(dim=1)
        return total

    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        """Climb with `shields.pgd.pgd`, whose projection shapes what it is given."""
        config = self.config
        budget = _ShapedBudget(
            levels=config.levels,
            norm=config.norm,
            softened=config.softened,
            low_passed=config.low_passed,
        )
        return pgd(
            image,
            self.objective(image, mask, landmarks=landmarks, rng=rng),
            budget,
            config,
            mask=mask,
            rng=rng,
            transform=self.transform(),
            progress=progress,
        )
