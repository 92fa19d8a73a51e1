"""HiSD's generator: encode, translate one tag by a style, decode; styles from noise or a photo.

Written from the paper's tables; state dicts are laid out like the published ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shields.errors import WeightsError

__all__ = ["DownBlock", "HisdGenerator", "sizes"]


def _normalised(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise (B, C, H, W) per image and channel by the unbiased deviation, then scale."""
    # In half precision a flat channel's scale would overflow.
    wide = features if features.dtype == torch.float64 else features.float()
    deviation, mean = torch.std_mean(wide, dim=(2, 3), keepdim=True)
    return ((wide - mean) * (weight / (deviation + 1e-5)) + bias).to(features.dtype)


def _leaky(features: Tensor) -> Tensor:
    return functional.leaky_relu(features, 0.2)


def _halved(features: Tensor) -> Tensor:
    return functional.avg_pool2d(features, 2)


def _doubled(features: Tensor) -> Tensor:
    return functional.interpolate(features, scale_factor=2)


class _Norm(nn.Module):
    """Instance norm of no mode and no buffers; epsilon is added to the deviation itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        return _normalised(features, self.weight[..., None], self.bias[..., None])


class DownBlock(nn.Module):
    """Residual block to half the resolution: (B, inputs, H, W) -> (B, outputs, H // 2, W // 2).

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        norm: Whether features are normalised; the encoder does, what makes styles does not.
    """

    def __init__(self, inputs: int, outputs: int, *, norm: bool = False) -> None:
        super().__init__()
        self.in1 = _Norm(inputs) if norm else nn.Identity()
        self.in2 = _Norm(inputs) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 1, 1)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.sc = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Halve the resolution."""
        main = _halved(self.conv1(_leaky(self.in1(features))))
        main = self.conv2(_leaky(self.in2(main)))
        return (main + _halved(self.sc(features))) / math.sqrt(2)


class _UpBlock(nn.Module):
    """Normalised residual block to twice the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in1 = _Norm(inputs)
        self.in2 = _Norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.sc = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        main = self.conv1(_doubled(_leaky(self.in1(features))))
        main = self.conv2(_leaky(self.in2(main)))
        return (main + _doubled(self.sc(features))) / math.sqrt(2)


class _MiddleBlock(nn.Module):
    """Residual block whose two normalisations are told their scale and offset."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.sc = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, features: Tensor, settings: Tensor) -> Tensor:
        """`settings` (B or 1, 2, 2, C): of each normalisation the offset, then scale less 1."""
        bias, weight = settings[..., None, None].unbind(dim=2)
        weight = weight + 1
        main = self.conv1(_leaky(_normalised(features, weight[:, 0], bias[:, 0])))
        main = self.conv2(_leaky(_normalised(main, weight[:, 1], bias[:, 1])))
        return (main + self.sc(features)) / math.sqrt(2)


class _LinearBlock(nn.Module):
    """ReLU, and only then the linear map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, values: Tensor) -> Tensor:
        mapped: Tensor = self.linear(functional.relu(values))
        return mapped


class _Translator(nn.Module):
    """Changes one tag of the code (B, C, h, w) where its mask says so."""

    def __init__(self, channels: int, inner: int, blocks: int, style: int) -> None:
        super().__init__()
        self.shape = (blocks, 2, 2, inner)
        middle = [_MiddleBlock(inner) for _ in range(blocks)]
        self.model = nn.Sequential(nn.Conv2d(channels, inner, 1), *middle)
        self.style_to_params = nn.Linear(style, math.prod(self.shape))
        self.features = nn.Sequential(nn.Conv2d(inner, channels, 1))
        self.masks = nn.Sequential(nn.Conv2d(inner, channels, 1), nn.Sigmoid())

    def forward(self, code: Tensor, style: Tensor) -> Tensor:
        # Handed over as arguments: stored on the modules they would leak into the next call.
        settings = self.style_to_params(style).reshape(-1, *self.shape)
        features = self.model[0](code)
        for block, own in zip(self.model[1:], settings.unbind(dim=1), strict=True):
            features = block(features, own)
        mask = self.masks(features)
        changed: Tensor = self.features(features) * mask + code * (1 - mask)
        return changed


class _Mapper(nn.Module):
    """Noise -> style of one tag, with an end for each of its attributes."""

    def __init__(self, noise: int, hidden: int, style: int, attributes: int) -> None:
        super().__init__()
        self.pre_model = nn.Sequential(
            nn.Linear(noise, hidden), _LinearBlock(hidden, hidden), _LinearBlock(hidden, hidden)
        )
        self.post_models = nn.ModuleList(
            nn.Sequential(
                _LinearBlock(hidden, hidden), _LinearBlock(hidden, hidden), nn.Linear(hidden, style)
            )
            for _ in range(attributes)
        )

    def forward(self, noise: Tensor) -> Tensor:
        """(B, noise) -> (B, attributes, style)."""
        shared = self.pre_model(noise)
        return torch.stack([end(shared) for end in self.post_models], dim=1)


class _Extractors(nn.Module):
    """Photo -> a style for each tag."""

    def __init__(self, widths: Sequence[int], tags: int, style: int) -> None:
        super().__init__()
        self.tags = tags
        pairs = itertools.pairwise(widths)
        self.model = nn.Sequential(
            nn.Conv2d(3, widths[0], 1),
            *(DownBlock(inputs, outputs) for inputs, outputs in pairs),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(widths[-1], tags * style, 1),
        )

    def forward(self, photo: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, tags, style)."""
        styles: Tensor = self.model(photo)
        return styles.reshape(len(photo), self.tags, -1)


class HisdGenerator(nn.Module):
    """Everything that edits: images in about [-1, 1], codes (B, 4 width, H/4, W/4), styles (B, S).

    The result is not bounded. Nothing is kept between calls.

    Args:
        attributes: Number of values of each tag.
        width: Channels at full resolution, 64 in the published files.
        inner: Channels inside a translator.
        blocks: Residual blocks of a translator.
        style: S, numbers of a style.
        noise: Numbers of noise that become a style.
        hidden: Channels inside a mapper.
        extractor: Channels of the extractor, at full resolution and after each halving.

    Source:
        HiSD (Li et al., 2021), https://arxiv.org/abs/2103.01456.
    """

    def __init__(
        self,
        attributes: Sequence[int] = (2, 2, 3),
        width: int = 64,
        inner: int = 64,
        blocks: int = 7,
        style: int = 256,
        noise: int = 32,
        hidden: int = 256,
        extractor: Sequence[int] = (32, 64, 128, 256, 512, 512, 512),
    ) -> None:
        super().__init__()
        self.attributes, self.noise = tuple(attributes), noise
        #: least side of a photo that a style is taken from, pixels
        self.least = 2 ** (len(extractor) - 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 1),
            DownBlock(width, 2 * width, norm=True),
            DownBlock(2 * width, 4 * width, norm=True),
        )
        self.decoder = nn.Sequential(
            _UpBlock(4 * width, 2 * width), _UpBlock(2 * width, width), nn.Conv2d(width, 3, 1)
        )
        self.extractors = _Extractors(extractor, len(self.attributes), style)
        self.translators = nn.ModuleList(
            _Translator(4 * width, inner, blocks, style) for _ in self.attributes
        )
        self.mappers = nn.ModuleList(
            _Mapper(noise, hidden, style, count) for count in self.attributes
        )

    def encode(self, image: Tensor) -> Tensor:
        """Image -> code."""
        code: Tensor = self.encoder(image)
        return code

    def decode(self, code: Tensor) -> Tensor:
        """Code -> image, not bounded."""
        image: Tensor = self.decoder(code)
        return image

    def extract(self, photo: Tensor, tag: int) -> Tensor:
        """Style (B, S) of a tag as a photo shows it; sides from `least` pixels on."""
        styles: Tensor = self.extractors(photo)
        return styles[:, tag]

    def imagine(self, noise: Tensor, tag: int) -> Tensor:
        """Styles (B, attributes, S) of all values of a tag, from noise (B, `noise`)."""
        styles: Tensor = self.mappers[tag](noise)
        return styles

    def fixed_noise(self) -> Tensor:
        """The noise (1, `noise`) that is used where nobody asks for variety."""
        rng = torch.Generator().manual_seed(0)
        return torch.randn(1, self.noise, generator=rng).to(next(self.parameters()))

    def translate(self, code: Tensor, style: Tensor, tag: int) -> Tensor:
        """Change one tag of a code; a style (1, S) serves the whole batch."""
        changed: Tensor = self.translators[tag](code, style)
        return changed

    def forward(self, image: Tensor, style: Tensor, tag: int) -> tuple[Tensor, Tensor]:
        """Manipulated image, and the code of the image itself."""
        code = self.encode(image)
        return self.decode(self.translate(code, style, tag)), code


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of `HisdGenerator` from the shapes of its state dict.

    Raises:
        WeightsError: It is no state dict of HiSD.
    """
    tags = _count(state, "mappers.{}.pre_model.0.weight")
    halvings = _count(state, "extractors.model.{}.sc.weight", 1)
    try:
        return {
            "attributes": tuple(
                _count(state, f"mappers.{tag}.post_models.{{}}.0.linear.weight")
                for tag in range(tags)
            ),
            "width": state["encoder.0.weight"].shape[0],
            "inner": state["translators.0.model.0.weight"].shape[0],
            "blocks": _count(state, "translators.0.model.{}.sc.weight", 1),
            "style": state["translators.0.style_to_params.weight"].shape[1],
            "noise": state["mappers.0.pre_model.0.weight"].shape[1],
            "hidden": state["mappers.0.pre_model.0.weight"].shape[0],
            "extractor": (
                state["extractors.model.0.weight"].shape[0],
                *(state[f"extractors.model.{i + 1}.sc.weight"].shape[0] for i in range(halvings)),
            ),
        }
    except (KeyError, IndexError) as error:
        raise WeightsError(f"these are not the weights of a HiSD generator: {error}") from error


def _count(state: Mapping[str, Tensor], pattern: str, first: int = 0) -> int:
    """How many keys follow the pattern, numbered without a gap."""
    number = first
    while pattern.format(number) in state:
        number += 1
    return number - first
