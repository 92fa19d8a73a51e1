"""Discriminators: they judge whether a picture is real, and which attributes it shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ["StarDiscriminator", "adversarial_loss", "fooling_loss", "gradient_at_photos",
           "gradient_penalty"]  # fmt: skip


class StarDiscriminator(nn.Module):
    """StarGAN's: (B, 3, S, S) in [-1, 1] -> realness (B, s, s) and attribute logits (B, N).

    Args:
        attributes: N, entries of the label vector.
        size: S, pixels.
        width: Channels of the first layer.
        depth: Layers, each of half the resolution and twice the channels.
        spectral: Whether to bound the layers' norms, as the hinge loss wants it.
        widest: Most channels of a layer.
    """

    def __init__(
        self, attributes: int, size: int, width: int = 64, depth: int = 5, *,
        spectral: bool = False, widest: int = 2048,
    ) -> None:  # fmt: skip
        super().__init__()
        wrap = spectral_norm if spectral else (lambda module: module)
        layers: list[nn.Module] = []
        inputs = 3
        for _ in range(depth):
            layers += [wrap(nn.Conv2d(inputs, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
            inputs, width = width, min(2 * width, widest)
        self.main = nn.Sequential(*layers)
        self.realness = wrap(nn.Conv2d(inputs, 1, 3, 1, 1, bias=False))
        # Bounding this one too would keep the logits, and so the gradient of an edit, near zero.
        self.attributes = nn.Conv2d(inputs, attributes, size >> depth, bias=False)
        if not spectral:
            self.apply(_begin)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Realness of every patch, and attribute logits."""
        features = self.main(image)
        return self.realness(features)[:, 0].float(), self.attributes(features)[:, :, 0, 0].float()


def _begin(module: nn.Module) -> None:
    """Keep activations of order one: with torch's own start the first scores hardly differ."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, 0.2)


def adversarial_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on scores.

    Args:
        kind: "logistic", to which `gradient_at_photos` is added outside; "hinge", for networks of
            bounded norm; or "wgan-gp", to which `gradient_penalty` is added outside.
        real: Scores of photographs.
        fake: Scores of forgeries.
    """
    if kind == "logistic":
        return functional.softplus(-real).mean() + functional.softplus(fake).mean()
    if kind == "hinge":
        return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def fooling_loss(kind: str, fake: Tensor) -> Tensor:
    """The generator's loss on the scores of its forgeries, for each kind of `adversarial_loss`."""
    return functional.softplus(-fake).mean() if kind == "logistic" else -fake.mean()


def gradient_penalty(
    score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, rng: torch.Generator
) -> Tensor:
    """Squared distance from 1 of a score's gradient norm, between photo and forgery.

    Source:
        WGAN-GP (Gulrajani et al., 2017), https://arxiv.org/abs/1704.00028.
    """
    share = torch.rand(len(real), 1, 1, 1, generator=rng).to(real)
    mixed = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(score(mixed).sum(), mixed, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def gradient_at_photos(score: Callable[[Tensor], Tensor], photo: Tensor) -> Tensor:
    """Mean squared norm of the score's gradient at photos, with a graph.

    Args:
        score: (B, 3, S, S) -> (B,), samples independent.
        photo: (B, 3, S, S).

    Source:
        R1 of Mescheder et al. (2018), https://arxiv.org/abs/1801.04406.
    """
    photo = photo.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(photo).sum(), photo, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
