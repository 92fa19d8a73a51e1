"""The residual networks of ArcFace and its followers, in the three layouts that are published.

Written from the papers and from tables of key names and shapes; state dicts are laid out like the
published ones. All take aligned faces of 112 x 112 pixels and return embeddings of any length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

__all__ = ["FaceNetwork", "IResNetwork", "IrNetwork", "SharedSlopeNetwork"]

#: side of the last feature map of a face of 112 pixels
_SIDE = 7
_WIDTHS = (64, 128, 256, 512)
#: how many times narrower a channel attention is inside
_REDUCTION = 16


class FaceNetwork(nn.Module, ABC):
    """Four stages of residual blocks, each at half the resolution of the one before, and a head."""

    @abstractmethod
    def maps(self, face: Tensor) -> tuple[Tensor, ...]:
        """Feature maps after each stage, of (B, 3, H, W) in the native range; any size."""

    @abstractmethod
    def head(self, features: Tensor) -> Tensor:
        """Last feature map (B, C, 7, 7) -> (B, dimensions), not normalised."""

    def forward(self, face: Tensor) -> Tensor:
        """(B, 3, 112, 112), native range -> (B, dimensions), not normalised."""
        return self.head(self.maps(face)[-1])


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """What the skip connection runs through where it cannot be the identity."""
    return nn.Sequential(
        _convolution(inputs, outputs, stride, kernel=1), nn.BatchNorm2d(outputs)
    )  # fmt: skip


class _Attention(nn.Module):
    """Channel attention by 1 x 1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = _convolution(width, width // _REDUCTION, kernel=1)
        self.fc2 = _convolution(width // _REDUCTION, width, kernel=1)

    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean(dim=(2, 3), keepdim=True)
        return features * self.fc2(self.fc1(mean).relu()).sigmoid()


class _IrUnit(nn.Module):
    """Normalise, convolve, bend, convolve, normalise; added to the input, or to a part of it."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, inner_norm: bool, attention: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(inputs), _convolution(inputs, outputs)]
        if inner_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers += [nn.PReLU(outputs), _convolution(outputs, outputs, stride)]
        layers.append(nn.BatchNorm2d(outputs))
        if attention:
            layers.append(_Attention(outputs))
        self.res_layer = nn.Sequential(*layers)
        self.shortcut_layer: nn.Module = _projection(inputs, outputs, stride)
        if inputs == outputs:
            self.shortcut_layer = nn.MaxPool2d(1, stride)  # picks every stride-th pixel

    def forward(self, features: Tensor) -> Tensor:
        shortcut: Tensor = self.shortcut_layer(features)
        return shortcut + self.res_layer(features)


class IrNetwork(FaceNetwork):
    """The layout of TreB1eN, pSp, AdaFace and CVLFace: `input_layer`, `body`, `output_layer`.

    Args:
        blocks: Units of the four stages; (3, 4, 14, 3) is called 50, (3, 13, 30, 3) is called 101.
        widths: Channels of the stages.
        dimensions: Length of the embedding.
        inner_norm: Normalise between the first convolution and its bend, as AdaFace does.
        attention: Weigh the channels of each unit ("SE"); widths are multiples of 16 then.
        affine: Scale and shift the normalised embedding, as TreB1eN does and AdaFace does not.

    Source:
        ArcFace (Deng et al., 2019), https://arxiv.org/abs/1801.07698; AdaFace (Kim, Jain, Liu,
        2022), https://arxiv.org/abs/2204.00964.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 14, 3),
        widths: Sequence[int] = _WIDTHS,
        dimensions: int = 512,
        *,
        inner_norm: bool = True,
        attention: bool = False,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            _convolution(3, widths[0]), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        units = []
        inputs = widths[0]
        for count, width in zip(blocks, widths, strict=True):
            for index in range(count):
                stride = 1 if index else 2
                units.append(
                    _IrUnit(inputs, width, stride, inner_norm=inner_norm, attention=attention)
                )
                inputs = width
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.Dropout(), nn.Flatten(),
            nn.Linear(inputs * _SIDE**2, dimensions), nn.BatchNorm1d(dimensions, affine=affine),
        )  # fmt: skip
        self._ends = list(accumulate(blocks))

    def maps(self, face: Tensor) -> tuple[Tensor, ...]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16."""
        features = self.input_layer(face)
        maps = []
        for index, unit in enumerate(self.body, start=1):
            features = unit(features)
            if index in self._ends:
                maps.append(features)
        return tuple(maps)

    def head(self, features: Tensor) -> Tensor:
        """Last feature map (B, C, 7, 7) -> (B, dimensions)."""
        embedding: Tensor = self.output_layer(features)
        return embedding


class _IResUnit(nn.Module):
    """The same unit as AdaFace's, under other names; the first of a stage projects its input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _convolution(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = _convolution(outputs, outputs, stride)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride) if stride > 1 else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        inner = self.prelu(self.bn2(self.conv1(self.bn1(features))))
        shortcut: Tensor = self.downsample(features)
        return shortcut + self.bn3(self.conv2(inner))


class IResNetwork(FaceNetwork):
    """InsightFace's own layout: `conv1`, `bn1`, `prelu`, `layer1` to `layer4`, `bn2`, `fc`.

    Args:
        blocks: Units of the four stages; (3, 4, 14, 3) is iresnet50, (3, 13, 30, 3) iresnet100.
        widths: Channels of the stages.
        dimensions: Length of the embedding.

    Source:
        ArcFace (Deng et al., 2019), https://arxiv.org/abs/1801.07698.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 14, 3),
        widths: Sequence[int] = _WIDTHS,
        dimensions: int = 512,
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        stages = []
        inputs = widths[0]
        for count, width in zip(blocks, widths, strict=True):
            units = [_IResUnit(inputs, width, 2)]
            units += [_IResUnit(width, width, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*units))
            inputs = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * _SIDE**2, dimensions)
        self.features = nn.BatchNorm1d(dimensions)

    def maps(self, face: Tensor) -> tuple[Tensor, ...]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16."""
        first = self.layer1(self.prelu(self.bn1(self.conv1(face))))
        second = self.layer2(first)
        third = self.layer3(second)
        return first, second, third, self.layer4(third)

    def head(self, features: Tensor) -> Tensor:
        """Last feature map (B, C, 7, 7) -> (B, dimensions)."""
        embedding: Tensor = self.features(self.fc(self.bn2(features).flatten(1)))
        return embedding


class _PooledAttention(nn.Module):
    """Channel attention by linear layers with a slope between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // _REDUCTION
        self.fc = nn.Sequential(nn.Linear(width, inner), nn.PReLU(), nn.Linear(inner, width))

    def forward(self, features: Tensor) -> Tensor:
        weights: Tensor = self.fc(features.mean(dim=(2, 3))).sigmoid()
        return features * weights[..., None, None]


class _SharedSlopeUnit(nn.Module):
    """A unit with attention that bends twice by one learned slope: inside, and after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(inputs)
        self.conv1 = _convolution(inputs, inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.prelu = nn.PReLU()
        self.conv2 = _convolution(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.se = _PooledAttention(outputs)
        same = stride == 1 and inputs == outputs
        self.downsample = nn.Identity() if same else _projection(inputs, outputs, stride)

    def forward(self, features: Tensor) -> Tensor:
        inner = self.prelu(self.bn1(self.conv1(self.bn0(features))))
        outer = self.se(self.bn2(self.conv2(inner)))
        bent: Tensor = self.prelu(outer + self.downsample(features))
        return bent


class SharedSlopeNetwork(FaceNetwork):
    """The ArcFace of SimSwap and ID-Guard, from foamliu's InsightFace-v2, 33 units with attention.

    ID-Guard's file of it is called `arcface_ir_se50.pth`, which it is not.

    Args:
        blocks: Units of the four stages.
        widths: Channels of the stages, multiples of 16.
        dimensions: Length of the embedding.

    Source:
        ArcFace (Deng et al., 2019), https://arxiv.org/abs/1801.07698.
    """

    def __init__(
        self,
        blocks: Sequence[int] = (3, 4, 23, 3),
        widths: Sequence[int] = _WIDTHS,
        dimensions: int = 512,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, bias=False)  # no border: 112 becomes 110
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU()
        self.maxpool = nn.MaxPool2d(2)
        stages = []
        inputs = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            units = [_SharedSlopeUnit(inputs, width, 2 if stage else 1)]
            units += [_SharedSlopeUnit(width, width, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*units))
            inputs = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn2 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs * _SIDE**2, dimensions)
        self.bn3 = nn.BatchNorm1d(dimensions)

    def maps(self, face: Tensor) -> tuple[Tensor, ...]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16; the last one is normalised, as in ID-Guard."""
        first = self.layer1(self.maxpool(self.prelu(self.bn1(self.conv1(face)))))
        second = self.layer2(first)
        third = self.layer3(second)
        return first, second, third, self.bn2(self.layer4(third))

    def head(self, features: Tensor) -> Tensor:
        """Last feature map (B, C, 7, 7) -> (B, dimensions)."""
        embedding: Tensor = self.bn3(self.fc(torch.flatten(features, 1)))
        return embedding
