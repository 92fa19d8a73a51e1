"""RelGAN's generator and its switchable norm, state dict laid out like the authors' one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["RelganGenerator", "SwitchNorm"]


class _Moments(torch.autograd.Function):
    """Unbiased variance and mean over pixels, (B, C, 1, 1) each; several times `torch.var_mean`.

    That one is slow on channels-last tensors, forwards and backwards; here is one pass of each.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401  torch's
        mean = features.mean(dim=(2, 3), keepdim=True)
        squares = (features - mean).square_().sum(dim=(2, 3), keepdim=True)
        ctx.save_for_backward(features, mean)
        return squares / (features[0, 0].numel() - 1), mean

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401  torch's
        features, mean = ctx.saved_tensors
        pixels = features[0, 0].numel()
        slope = 2 * gradients[0] / (pixels - 1)
        return torch.addcmul(gradients[1] / pixels - slope * mean, features, slope)


class SwitchNorm(nn.Module):
    """Switchable norm of (B, C, H, W): a learned blend of instance, layer and batch statistics.

    In evaluation the batch statistics are the running ones, so a batch is no more than its images.
    In training they are the batch's own, and the running ones follow. Their variance begins at
    zero, as the authors have it.

    Args:
        channels: C.
        decay: Share of the old running statistics that each training step keeps.

    Source:
        Switchable Normalization (Luo et al., 2019), https://arxiv.org/abs/1806.10779.
    """

    EPSILON = 1e-5

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        # Logits of the blend: instance, layer, batch.
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1))
        self.register_buffer("running_var", torch.zeros(1, channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise, in float32 inside: variances of raw activations need its digits."""
        whole = features.float()
        variance, mean = cast(tuple[Tensor, Tensor], _Moments.apply(whole))
        square = variance + mean**2
        layer_mean = mean.mean(dim=1, keepdim=True)
        layer_variance = square.mean(dim=1, keepdim=True) - layer_mean**2
        batch_mean, batch_variance = self._batch(mean, square)
        shares = self.mean_weight.float().softmax(0)
        mean = shares[0] * mean + shares[1] * layer_mean + shares[2] * batch_mean
        shares = self.var_weight.float().softmax(0)
        variance = shares[0] * variance + shares[1] * layer_variance + shares[2] * batch_variance
        scale = self.weight / (variance + self.EPSILON).sqrt()
        return torch.addcmul(self.bias - mean * scale, whole, scale).to(features.dtype)

    def _batch(self, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (1, C, 1, 1) over the batch, or the running ones."""
        if not self.training:
            return self.running_mean[..., None], self.running_var[..., None]
        batch_mean = mean.mean(dim=0, keepdim=True)
        batch_variance = square.mean(dim=0, keepdim=True) - batch_mean**2
        with torch.no_grad():
            self.running_mean.lerp_(batch_mean[..., 0], 1 - self.decay)
            self.running_var.lerp_(batch_variance[..., 0], 1 - self.decay)
        return batch_mean, batch_variance


class _Block(nn.Module):
    """Two normalised convolutions added to their input."""

    def __init__(self, width: int, decay: float) -> None:
        super().__init__()
        self.f = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1), SwitchNorm(width, decay), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1), SwitchNorm(width, decay),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        return features + self.f(features)


class RelganGenerator(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] and relative vector (B, N) -> (B, 3, H, W) in [-1, 1].

    The vector says what changes; zero means "leave it". Which sign adds an attribute was settled
    where the weights were trained. Sides must be multiples of 4.

    Args:
        attributes: N, entries of the relative vector.
        width: Channels at full resolution, 64 in the authors' files.
        blocks: Residual blocks at a quarter of the resolution.
        decay: Of the norms' running statistics, see `SwitchNorm`.

    Source:
        RelGAN (Wu et al., 2019), https://arxiv.org/abs/1908.07269.
    """

    def __init__(
        self, attributes: int = 5, width: int = 64, blocks: int = 6, decay: float = 0.9
    ) -> None:
        super().__init__()

        def layer(convolution: nn.Module, channels: int) -> nn.Sequential:
            return nn.Sequential(convolution, SwitchNorm(channels, decay), nn.ReLU())

        middle, deep = 2 * width, 4 * width
        self.conv_in = layer(nn.Conv2d(3 + attributes, width, 7, 1, 3), width)
        self.down1 = layer(nn.Conv2d(width, middle, 4, 2, 1), middle)
        self.down2 = layer(nn.Conv2d(middle, deep, 4, 2, 1), deep)
        self.resb = nn.Sequential(*(_Block(deep, decay) for _ in range(blocks)))
        self.up2 = layer(nn.ConvTranspose2d(deep, middle, 4, 2, 1), middle)
        self.up1 = layer(nn.ConvTranspose2d(middle, width, 4, 2, 1), width)
        self.conv_out = nn.Sequential(nn.Conv2d(width, 3, 7, 1, 3), nn.Tanh())

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Manipulated image, and the feature map (B, 4 width, H/4, W/4) half-way through `resb`."""
        planes = vector[:, :, None, None].expand(-1, -1, *image.shape[2:])
        half = len(self.resb) // 2
        stem = self.down2(self.down1(self.conv_in(torch.cat([image, planes], dim=1))))
        features = self.resb[:half](stem)
        return self.conv_out(self.up1(self.up2(self.resb[half:](features)))), features
