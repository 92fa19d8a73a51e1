"""Plain network definitions, state-dict compatible with the weights they load.

`Taef2` and `MobileFaceNet` are written anew from published layer descriptions, so that published
weights load strictly; `PortraitAutoencoder` and `FaceEmbedder` are our own and are trained by
`trainers`. Ranges, sizes and modes are hidden one level up, in `shields.models.autoencoders` and
`shields.models.recognizers`.

Source:
    taef2: Tiny AutoEncoder for FLUX.2 (Bohan, 2025), https://github.com/madebyollin/taesd, MIT.
    MobileFaceNet: MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification
    (Chen, Liu, Gao, Han, 2018), https://arxiv.org/abs/1804.07573.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FaceEmbedder", "MobileFaceNet", "PortraitAutoencoder", "Taef2"]


def _conv3(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


class _TaesdBlock(nn.Module):
    """Three convolutions with a shortcut; `pooled` adds a normalised 1x1 branch to the input."""

    def __init__(self, width: int, *, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv3(width, width), nn.ReLU(), _conv3(width, width), nn.ReLU(), _conv3(width, width)
        )
        self.pool = (
            nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, features: Tensor) -> Tensor:
        if self.pool is not None:
            features = features + self.pool(features)
        return torch.relu(self.conv(features) + features)


class _SoftClamp(nn.Module):
    """x -> 3 tanh(x / 3): keeps latents in the range that the decoder was trained on."""

    def forward(self, latent: Tensor) -> Tensor:
        return 3 * torch.tanh(latent / 3)


class Taef2(nn.Module):
    """Tiny autoencoder for the FLUX.2 latent space.

    `encoder`: (B, 3, H, W) in [0, 1], sides divisible by 8 -> (B, 32, H/8, W/8).
    `decoder`: the reverse, not clamped.
    """

    def __init__(self, width: int = 64, latent_channels: int = 32) -> None:
        super().__init__()

        def stage(*, pooled: bool = False) -> list[nn.Module]:
            return [_TaesdBlock(width, pooled=pooled) for _ in range(3)]

        def down() -> nn.Module:
            return _conv3(width, width, stride=2, bias=False)

        def up() -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), _conv3(width, width, bias=False)]

        self.encoder = nn.Sequential(
            _conv3(3, width), _TaesdBlock(width), down(), *stage(), down(), *stage(), down(),
            *stage(pooled=True), _conv3(width, latent_channels),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            _SoftClamp(), _conv3(latent_channels, width), nn.ReLU(), *stage(pooled=True), *up(),
            *stage(), *up(), *stage(), *up(), _TaesdBlock(width), _conv3(width, 3),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """Encode and decode: (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decoder(self.encoder(image))


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, PReLU unless `linear`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = None if linear else nn.PReLU(outputs)

    def forward(self, features: Tensor) -> Tensor:
        features = self.bn(self.conv(features))
        return features if self.prelu is None else self.prelu(features)


class _InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project; a shortcut where stride is 1 and widths agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.PReLU(hidden),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.PReLU(hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        result = self.conv(features)
        return features + result if self.shortcut else result


class MobileFaceNet(nn.Module):
    """(B, 3, 112, 96), (levels - 127.5) / 128 -> (B, 128), not normalised."""

    #: expansion, width, repeats, stride of the first
    STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvBlock(3, 64, 3, stride=2, padding=1)
        self.dw_conv1 = ConvBlock(64, 64, 3, padding=1, groups=64)
        blocks: list[nn.Module] = []
        width = 64
        for expansion, outputs, repeats, first_stride in self.STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(_InvertedResidual(width, outputs, stride, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = ConvBlock(width, 512, 1)
        self.linear7 = ConvBlock(512, 512, (7, 6), groups=512, linear=True)
        self.linear1 = ConvBlock(512, 128, 1, linear=True)

    def forward(self, face: Tensor) -> Tensor:
        """Embed aligned faces; not normalised."""
        features = self.conv2(self.blocks(self.dw_conv1(self.conv1(face))))
        return self.linear1(self.linear7(features)).flatten(1)


class _Residual(nn.Module):
    """Two convolutions added to their input; without normalisation the latents keep their scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _conv3(width, width)
        self.conv2 = _conv3(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv2(functional.silu(self.conv1(functional.silu(features))))


class PortraitAutoencoder(nn.Module):
    """Our embedded autoencoder: latents shaped, and trained to be scaled, like `Taef2`'s.

    A pixel-unshuffle stem works at a quarter of the resolution from the first layer on, which on a
    CPU costs a tenth of `Taef2`.

    `encoder`: (B, 3, H, W) in [0, 1], sides divisible by 8 -> (B, latent_channels, H/8, W/8).
    `decoder`: the reverse, not clamped.

    Args:
        fine: Width at a quarter of the resolution.
        coarse: Width at an eighth.
        blocks: Residual blocks at each of the two, in the encoder and in the decoder.
        latent_channels: Channels of the latent.
    """

    def __init__(
        self, fine: int = 64, coarse: int = 160, blocks: int = 2, latent_channels: int = 32
    ) -> None:
        super().__init__()

        def stage(width: int) -> list[nn.Module]:
            return [_Residual(width) for _ in range(blocks)]

        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4), _conv3(48, fine), *stage(fine), _conv3(fine, coarse, stride=2),
            *stage(coarse), nn.SiLU(), _conv3(coarse, latent_channels),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            _conv3(latent_channels, coarse), *stage(coarse), nn.SiLU(), nn.Upsample(scale_factor=2),
            _conv3(coarse, fine), *stage(fine), nn.SiLU(), _conv3(fine, 48), nn.PixelShuffle(4),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """Encode and decode: (B, 3, H, W) -> (B, 3, H, W)."""
        return self.decoder(self.encoder(image))


class NormResidual(nn.Module):
    """Pre-activation block of two convolutions with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv3(width, width, bias=False), nn.BatchNorm2d(width), nn.PReLU(width),
            _conv3(width, width, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


class FaceEmbedder(nn.Module):
    """Our embedded recognizer: (B, 3, 112, 96), (levels - 127.5) / 128 -> (B, 128).

    Plain convolutions in four stages of halving resolution; the head weighs every position of the
    last 7 x 6 map on its own, as `MobileFaceNet` does, since an aligned face has fixed places.

    Args:
        widths: Channels of the four stages, as a list.
        blocks: Residual blocks of the four stages.
        dimensions: Length of the embedding.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128, 256),
        blocks: tuple[int, ...] = (1, 2, 2, 1),
        dimensions: int = 128,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        inputs = 3
        for width, repeats in zip(widths, blocks, strict=True):
            stages.append(
                nn.Sequential(
                    ConvBlock(inputs, width, 3, stride=2, padding=1),
                    *(NormResidual(width) for _ in range(repeats)),
                )
            )
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(
            ConvBlock(inputs, 2 * inputs, 1),
            ConvBlock(2 * inputs, 2 * inputs, (7, 6), groups=2 * inputs, linear=True),
            ConvBlock(2 * inputs, dimensions, 1, linear=True),
        )

    def forward(self, face: Tensor) -> Tensor:
        """Embed aligned faces; not normalised."""
        return self.head(self.stages(face)).flatten(1)
