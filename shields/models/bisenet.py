"""BiSeNet for face parsing, laid out like the published weights.

Written from the layer table of the published network; nothing is fetched on construction.

Source:
    BiSeNet: Bilateral Segmentation Network for Real-time Semantic Segmentation (Yu et al., 2018),
    https://arxiv.org/abs/1808.00897; the variant and the weights are those of
    https://github.com/zllrunning/face-parsing.PyTorch (MIT).

Differs:
    The two auxiliary heads, needed for training alone, are loaded and never run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BiSeNet"]


def _average(features: Tensor) -> Tensor:
    """Mean over all places: (B, C, H, W) -> (B, C, 1, 1)."""
    return features.mean(dim=(2, 3), keepdim=True)


def _grown(features: Tensor, like: Tensor) -> Tensor:
    """Repeat the nearest value up to another map's size."""
    return functional.interpolate(features, size=like.shape[2:], mode="nearest")


class _ConvNormRelu(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(features)))


class _Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        result = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(features)))))
        kept = features if self.downsample is None else self.downsample(features)
        return torch.relu(result + kept)


class _ResNet18(nn.Module):
    """ResNet-18 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(_Residual(64, 64, 1), _Residual(64, 64, 1))
        self.layer2 = nn.Sequential(_Residual(64, 128, 2), _Residual(128, 128, 1))
        self.layer3 = nn.Sequential(_Residual(128, 256, 2), _Residual(256, 256, 1))
        self.layer4 = nn.Sequential(_Residual(256, 512, 2), _Residual(512, 512, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature maps at an eighth, a sixteenth and a thirty-second."""
        stem = torch.relu(self.bn1(self.conv1(image)))
        fine = self.layer2(self.layer1(functional.max_pool2d(stem, 3, 2, 1)))
        middle = self.layer3(fine)
        return fine, middle, self.layer4(middle)


class _Attention(nn.Module):
    """Refine a map, and weigh its channels by its own average."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _ConvNormRelu(inputs, outputs)
        self.conv_atten = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        refined = self.conv(features)
        return refined * torch.sigmoid(self.bn_atten(self.conv_atten(_average(refined))))


class _ContextPath(nn.Module):
    """What the whole picture shows, from coarse to fine."""

    def __init__(self) -> None:
        super().__init__()
        self.resnet = _ResNet18()
        self.arm16 = _Attention(256, 128)
        self.arm32 = _Attention(512, 128)
        self.conv_head32 = _ConvNormRelu(128, 128)
        self.conv_head16 = _ConvNormRelu(128, 128)
        self.conv_avg = _ConvNormRelu(512, 128, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """ResNet's map at an eighth (128 channels), and the context brought to its size (128)."""
        fine, middle, coarse = self.resnet(image)
        whole = self.arm32(coarse) + self.conv_avg(_average(coarse))
        context = self.conv_head32(_grown(whole, middle))
        return fine, self.conv_head16(_grown(self.arm16(middle) + context, fine))


class _Fusion(nn.Module):
    """Join both maps, and add what channel attention picks of them."""

    def __init__(self) -> None:
        super().__init__()
        self.convblk = _ConvNormRelu(256, 256, 1)
        self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, fine: Tensor, context: Tensor) -> Tensor:
        features = self.convblk(torch.cat([fine, context], dim=1))
        attention = self.conv2(torch.relu(self.conv1(_average(features))))
        return features * torch.sigmoid(attention) + features


class _Head(nn.Module):
    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv = _ConvNormRelu(inputs, hidden)
        self.conv_out = nn.Conv2d(hidden, classes, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv_out(self.conv(features))


class BiSeNet(nn.Module):
    """(B, 3, H, W), ImageNet's mean 0 and deviation 1 -> logits (B, classes, H, W).

    Sides of 32 pixels or more; evaluation mode is a must, a norm stands on a 1 x 1 map.

    Args:
        classes: 19 in the published weights.
    """

    def __init__(self, classes: int = 19) -> None:
        super().__init__()
        self.cp = _ContextPath()
        self.ffm = _Fusion()
        self.conv_out = _Head(256, 256, classes)
        self.conv_out16 = _Head(128, 64, classes)
        self.conv_out32 = _Head(128, 64, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the main head, at the image's size."""
        logits = self.conv_out(self.ffm(*self.cp(image)))
        return functional.interpolate(
            logits, size=image.shape[2:], mode="bilinear", align_corners=True
        )
