"""HiSD's edit once more, from its table of layers and a state dict alone, slowly and plainly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Reference"]


def reference_norm(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As the sheet says it, one channel of one image at a time."""
    result = torch.empty_like(features)
    for row in range(features.shape[0]):
        for channel in range(features.shape[1]):
            plane = features[row, channel]
            spread = ((plane - plane.mean()).square().sum() / (plane.numel() - 1)).sqrt()
            scaled = (plane - plane.mean()) / (spread + 1e-5)
            result[row, channel] = scaled * weight[channel] + bias[channel]
    return result


def leaky(features: Tensor) -> Tensor:
    return torch.where(features > 0, features, 0.2 * features)


def pooled(features: Tensor) -> Tensor:
    return features.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))


def doubled(features: Tensor) -> Tensor:
    return features.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Reference:
    """The whole edit, from the sheet's tables and the state dict alone."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, features: Tensor, name: str) -> Tensor:
        weight = self.state[f"{name}.weight"]
        bias = self.state.get(f"{name}.bias")
        return functional.conv2d(features, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, features: Tensor, name: str) -> Tensor:
        return reference_norm(
            features, self.state[f"{name}.weight"].flatten(), self.state[f"{name}.bias"].flatten()
        )

    def encode(self, photo: Tensor) -> Tensor:
        code = self.conv(photo, "encoder.0")
        for name in ("encoder.1", "encoder.2"):
            main = pooled(self.conv(leaky(self.norm(code, f"{name}.in1")), f"{name}.conv1"))
            main = self.conv(leaky(self.norm(main, f"{name}.in2")), f"{name}.conv2")
            code = (main + pooled(self.conv(code, f"{name}.sc"))) / 2**0.5
        return code

    def decode(self, code: Tensor) -> Tensor:
        for name in ("decoder.0", "decoder.1"):
            main = self.conv(doubled(leaky(self.norm(code, f"{name}.in1"))), f"{name}.conv1")
            main = self.conv(leaky(self.norm(main, f"{name}.in2")), f"{name}.conv2")
            code = (main + doubled(self.conv(code, f"{name}.sc"))) / 2**0.5
        return self.conv(code, "decoder.2")

    def translate(self, code: Tensor, style: Tensor, tag: int, inner: int, blocks: int) -> Tensor:
        start = f"translators.{tag}"
        numbers = functional.linear(
            style, self.state[f"{start}.style_to_params.weight"],
            self.state[f"{start}.style_to_params.bias"],
        )[0]  # fmt: skip
        features, taken = self.conv(code, f"{start}.model.0"), 0
        for block in range(1, blocks + 1):
            name, main = f"{start}.model.{block}", features
            for conv in ("conv1", "conv2"):
                bias = numbers[taken : taken + inner]
                weight = numbers[taken + inner : taken + 2 * inner] + 1
                taken += 2 * inner
                main = self.conv(leaky(reference_norm(main, weight, bias)), f"{name}.{conv}")
            features = (main + self.conv(features, f"{name}.sc")) / 2**0.5
        assert taken == len(numbers)
        mask = self.conv(features, f"{start}.masks.0").sigmoid()
        return self.conv(features, f"{start}.features.0") * mask + code * (1 - mask)

    def extract(self, photo: Tensor, tag: int, halvings: int, tags: int) -> Tensor:
        features = self.conv(photo, "extractors.model.0")
        for index in range(1, halvings + 1):
            name = f"extractors.model.{index}"
            main = pooled(self.conv(leaky(features), f"{name}.conv1"))
            main = self.conv(leaky(main), f"{name}.conv2")
            features = (main + pooled(self.conv(features, f"{name}.sc"))) / 2**0.5
        mean = features.mean(dim=(2, 3), keepdim=True)
        return self.conv(mean, f"extractors.model.{halvings + 2}").flatten(1).chunk(tags, 1)[tag]

    def imagine(self, noise: Tensor, tag: int, attribute: int) -> Tensor:
        def linear(values: Tensor, name: str) -> Tensor:
            key = f"mappers.{tag}.{name}"
            return values @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]

        values = linear(noise, "pre_model.0")
        for name in ("pre_model.1", "pre_model.2"):
            values = linear(values.clamp(min=0), f"{name}.linear")
        for index in (0, 1):
            values = linear(values.clamp(min=0), f"post_models.{attribute}.{index}.linear")
        return linear(values, f"post_models.{attribute}.2")
