"""Stand-ins for the tests: real small networks with seeded weights, never mocks.

`autoencoder`, `recognizer` and `perceptual` are smooth, so that gradients can be trusted down to
small differences; nothing here reads a file, the network, or global random state.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.models.ars_network import ArsGenerator
from shields.models.base import Autoencoder, Perceptual, Recognizer
from shields.models.generators import ArsModel
from shields.models.idguard import IdGuardModel
from shields.models.idguard_network import ResNetGenerator
from shields.models.manipulators import StarGANModel
from shields.models.star_networks import StarGenerator
from shields.types import Image

if TYPE_CHECKING:
    from shields.models.detectors import MtcnnDetector
    from shields.models.diffusion import LatentDiffusion

__all__ = [
    "autoencoder",
    "detector",
    "diffusion",
    "diffusion_parts",
    "faces_image",
    "generator",
    "idguard",
    "landmarks",
    "manipulator",
    "perceptual",
    "recognizer",
    "save_diffusion",
    "seeded",
]

#: five landmarks of an upright face as shares of a square photo, x and y
_FACE = torch.tensor([[0.36, 0.42], [0.64, 0.42], [0.50, 0.56], [0.39, 0.70], [0.61, 0.70]])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Build networks from a seed and leave global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _spread(network: nn.Module) -> None:
    """Keep activations of order one, so that a small change of the image is not lost."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(module.weight, gain=1.7)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)


class TinyAutoencoder(Autoencoder):
    """(B, 3, H, W) -> (B, channels, H / factor, W / factor), factor a power of two."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.multiple = factor
        self.channels = channels
        down: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(channels, 8, 3, padding=1)]
        for _ in range(round(math.log2(factor))):
            down += [nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)]
            up += [nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1)]
        self.encoder = nn.Sequential(*down, nn.SiLU(), nn.Conv2d(8, channels, 1))
        self.decoder = nn.Sequential(*up, nn.SiLU(), nn.Conv2d(8, 3, 1))

    def _encode(self, image: Image) -> Tensor:
        return self.encoder(2 * image - 1)  # type: ignore[no-any-return]

    def _decode(self, latent: Tensor) -> Image:
        return torch.sigmoid(self.decoder(latent))


class TinyRecognizer(Recognizer):
    """(B, 3, 32, 24) -> (B, 16)."""

    crop_size = (32, 24)

    def __init__(self) -> None:
        super().__init__()
        # The face fills the crop: 24 pixels wide, 32 high.
        points = torch.tensor([[7.5, 14.8], [16.4, 14.7], [12.0, 20.5], [8.4, 26.4], [15.7, 26.3]])
        self.register_buffer("template", points)
        self.threshold = 0.5
        self.shallow = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.SiLU())
        self.head = nn.Linear(16 * 8 * 6, 16)

    def _embed(self, face: Image) -> Tensor:
        return self.head(self.features(face)[-1].flatten(1))  # type: ignore[no-any-return]

    def features(self, face: Image) -> tuple[Tensor, ...]:
        shallow = self.shallow(2 * face - 1)
        return shallow, self.deep(shallow)


class TinyPerceptual(Perceptual):
    """Mean squared difference of channel-normalised features at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.SiLU())

    def features(self, image: Image) -> tuple[Tensor, ...]:
        shallow = self.shallow(2 * image - 1)
        maps = (shallow, self.deep(shallow))
        return tuple(functional.normalize(features, dim=1) for features in maps)

    def distance(self, features: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> Tensor:
        gaps = [
            (ours - theirs).square().sum(1).mean((1, 2))
            for ours, theirs in zip(features, reference, strict=True)
        ]
        return torch.stack(gaps).sum(0)


def autoencoder(seed: int = 0, *, channels: int = 4, factor: int = 4) -> TinyAutoencoder:
    """A small convolutional autoencoder; takes any size."""
    with seeded(seed):
        network = TinyAutoencoder(channels, factor)
        _spread(network)
    network.freeze()
    network.name = f"tiny-autoencoder-{seed}"
    return network


def recognizer(seed: int = 0) -> TinyRecognizer:
    """A small recognizer of crops 32 high and 24 wide, 16 numbers an embedding."""
    with seeded(seed):
        network = TinyRecognizer()
        _spread(network)
    network.freeze()
    network.name = f"tiny-recognizer-{seed}"
    return network


def perceptual(seed: int = 0) -> TinyPerceptual:
    """A small perceptual distance."""
    with seeded(seed):
        network = TinyPerceptual()
        _spread(network)
    network.freeze()
    network.name = f"tiny-perceptual-{seed}"
    return network


def faces_image(
    batch: int = 2, size: int = 64, seed: int = 0, *, width: int | None = None
) -> Image:
    """Smooth random images: (batch, 3, size, width or size), every value in [0.1, 0.9]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 6, 6, generator=rng)
    shape = (size, size if width is None else width)
    smooth = functional.interpolate(coarse, shape, mode="bilinear", align_corners=True)
    return 0.1 + 0.8 * smooth


def landmarks(batch: int = 2, size: int = 64, seed: int = 0) -> Tensor:
    """Five landmarks (batch, 5, 2) of faces that lie inside a square photo, in pixels."""
    rng = torch.Generator().manual_seed(seed)
    shift = 0.04 * (2 * torch.rand(batch, 1, 2, generator=rng) - 1)
    return (_FACE + shift) * size


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    symbols = [*string.ascii_lowercase, *string.digits, *",.-'!?"]
    words = ["<|startoftext|>", "<|endoftext|>", *symbols, *(symbol + "</w>" for symbol in symbols)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=40)


def diffusion_parts(seed: int = 0, *, image_condition: bool = False) -> dict[str, Any]:
    """The parts of a random pipeline, as diffusers' and transformers' own classes.

    Latents have 4 channels at a quarter of the resolution; sides are multiples of 4.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer()
    with seeded(seed):
        unet = UNet2DConditionModel(
            sample_size=16, in_channels=8 if image_condition else 4, out_channels=4,
            block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8,
            attention_head_dim=2, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, sample_size=64,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, projection_dim=8,
                num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=40,
                bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }


def diffusion(seed: int = 0, *, image_condition: bool = False) -> LatentDiffusion:
    """A random latent diffusion model; with `image_condition` one like InstructPix2Pix."""
    from shields.models.diffusion import DiffusersAutoencoder, LatentDiffusion

    parts = diffusion_parts(seed, image_condition=image_condition)
    network = LatentDiffusion.from_parts(
        parts["unet"],
        DiffusersAutoencoder(parts["vae"]),
        parts["text_encoder"],
        parts["tokenizer"],
        parts["scheduler"],
    )
    network.name = f"tiny-diffusion-{seed}"
    network.autoencoder.name = network.name
    return network


def save_diffusion(folder: Path, seed: int = 0, *, image_condition: bool = False) -> Path:
    """Save the same as a pipeline folder, as diffusers does, and return the folder."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline

    kind = StableDiffusionInstructPix2PixPipeline if image_condition else StableDiffusionPipeline
    parts = diffusion_parts(seed, image_condition=image_condition)
    pipeline = kind(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    return folder


def detector() -> MtcnnDetector:
    """MTCNN itself: small, and its weights come with its package."""
    from shields.models.detectors import MtcnnDetector

    return MtcnnDetector.load()


def generator(seed: int = 0) -> ArsModel:
    """A random ARS generator of three levels."""
    with seeded(seed):
        return ArsModel(ArsGenerator(widths=(8, 8, 16), encoder=(4, 8), channels=8))


def idguard(seed: int = 0) -> IdGuardModel:
    """A random ID-Guard generator with a universal perturbation beside it."""
    with seeded(seed):
        universal = (torch.rand(3, 32, 32) - 0.5) * 0.1
        return IdGuardModel(ResNetGenerator(width=4, blocks=1), universal)


def manipulator(seed: int = 0) -> StarGANModel:
    """A random StarGAN of width 8 with three attributes, two of them hair colours."""
    with seeded(seed):
        network = StarGenerator(3, width=8, blocks=2)
        for parameter in network.parameters():  # far enough from zero for edits to differ
            parameter.data.mul_(1.5)
    model = StarGANModel(network, ("Black_Hair", "Blond_Hair", "Smiling"))
    model.name = f"tiny-manipulator-{seed}"
    return model
