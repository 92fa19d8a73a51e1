"""The generators of StarGAN, AttentionGAN and Fixed-Point GAN: one trunk, three ends.

Written from the papers' tables; state dicts are laid out like the published ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AttentionGenerator", "FixedPointGenerator", "PerImageNorm", "StarGenerator"]


class PerImageNorm(nn.Module):
    """Instance norm that always uses each image's own statistics, whatever the mode.

    The published files carry running statistics that nobody ever used (their authors leave the
    network in training mode); they are kept so that files load and save, and never read.
    """

    BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise (B, C, H, W) per image and channel, biased variance."""
        if len(features) > 1:
            return functional.instance_norm(features, weight=self.weight, bias=self.bias, eps=1e-5)
        # By hand: torch 2.15 gets the gradient of the above wrong without a word on CPUs, for a
        # single image in channels-last layout.
        wide = features if features.dtype == torch.float64 else features.float()
        variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)
        scale = self.weight[:, None, None] * (variance + 1e-5).rsqrt()
        return ((wide - mean) * scale + self.bias[:, None, None]).to(features.dtype)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    # Zero padding is no detail: constant label planes act through the border alone, because the
    # normalisation takes out what they add elsewhere.
    padding = (kernel - stride + 1) // 2
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)


class _Block(nn.Module):
    """Two normalised convolutions added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _convolution(width, width, 3), PerImageNorm(width), nn.ReLU(),
            _convolution(width, width, 3), PerImageNorm(width),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + self.main(features)


class StarGenerator(nn.Module):
    """StarGAN's generator: image (B, 3, H, W) and labels (B, N) -> (B, 3, H, W), all in [-1, 1].

    Args:
        attributes: N, entries of the label vector.
        width: Channels at full resolution, 64 in the published files.
        blocks: Residual blocks at a quarter of the resolution, an even number.

    Source:
        StarGAN (Choi et al., 2018), https://arxiv.org/abs/1711.09020.
    """

    #: channels of the last convolution
    OUTPUTS = 3

    def __init__(self, attributes: int = 5, width: int = 64, blocks: int = 6) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            _convolution(3 + attributes, width, 7), PerImageNorm(width), nn.ReLU()
        ]  # fmt: skip
        for _ in range(2):
            layers += [_convolution(width, 2 * width, 4, 2), PerImageNorm(2 * width), nn.ReLU()]
            width *= 2
        layers += [_Block(width) for _ in range(blocks)]
        for _ in range(2):
            up = nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False)
            layers += [up, PerImageNorm(width // 2), nn.ReLU()]
            width //= 2
        self.main = nn.Sequential(*layers, _convolution(width, self.OUTPUTS, 7))
        #: index in `main` behind which half of the residual blocks are done
        self.middle = 9 + blocks // 2

    def trunk(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the last convolution, and the feature map (B, 4 width, H/4, W/4)."""
        planes = labels[:, :, None, None].expand(-1, -1, *image.shape[2:])
        features = self.main[: self.middle](torch.cat([image, planes], dim=1))
        return self.main[self.middle :](features), features

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Manipulated image, and the feature map half-way through the residual blocks."""
        output, features = self.trunk(image, labels)
        return output.tanh(), features


class AttentionGenerator(StarGenerator):
    """AttentionGAN v1, several domains: content is blended in where attention is high.

    The result leaves [-1, 1]: nothing bounds the content.

    Source:
        AttentionGAN (Tang et al., 2019), https://arxiv.org/abs/1903.12296.
    """

    OUTPUTS = 4

    def compose(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, feature map, and attention (B, 1, H, W) in [0, 1]; 0 keeps the photo."""
        output, features = self.trunk(image, labels)
        attention = output[:, :1].sigmoid()
        return output[:, 1:] * attention + image * (1 - attention), features, attention

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Blended image, and the feature map half-way through the residual blocks."""
        result, features, _ = self.compose(image, labels)
        return result, features


class FixedPointGenerator(StarGenerator):
    """Fixed-Point GAN: the network makes a residual, the picture is tanh(image + residual).

    Source:
        Fixed-Point GAN (Siddiquee et al., 2019), https://arxiv.org/abs/1908.06965.
    """

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Manipulated image, and the feature map half-way through the residual blocks."""
        output, features = self.trunk(image, labels)
        return (image + output).tanh(), features
