"""FaceLock's loop written plainly, in the shape the official code has: the yardstick of the bench.

One photo at a time; what depends on the clean photo is computed again at every step; terms whose
weight is zero at this step are run and multiplied by zero. The arithmetic is ours and the result
agrees with `shields` up to the random start; only the work done per step differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shields.models.base import Autoencoder, Perceptual, Recognizer
from shields.protectors.facelock import FaceLockConfig

__all__ = ["plain_facelock"]


def plain_facelock(
    image: Tensor,
    landmarks: Tensor,
    autoencoder: Autoencoder,
    recognizer: Recognizer,
    perceptual: Perceptual,
    config: FaceLockConfig,
) -> Tensor:
    """Protect (B, 3, H, W), photo by photo; returns the protected photos."""
    results = []
    for photo, points in zip(image.split(1), landmarks.split(1), strict=True):
        matrix = recognizer.matrix(points, photo)
        reach = config.levels / 255
        protected = (photo + (torch.rand_like(photo) * 2 - 1) * reach).clamp(0, 1)
        for index in range(config.steps):
            protected = protected.detach().requires_grad_(True)
            late, very_late = index > 0.25 * config.steps, index >= 0.35 * config.steps
            latent = autoencoder.encode(protected)
            decoded = autoencoder.decode(latent).clamp(0, 1)
            identity = (recognizer(decoded, matrix) * recognizer(photo, matrix)).sum()
            distance = perceptual(decoded, photo).sum()
            gap = (latent - autoencoder.encode(photo)).square().mean()
            total = -identity * float(very_late) + 0.2 * gap + distance * float(late)
            (gradient,) = torch.autograd.grad(total, protected)
            step = config.step * (1 - 0.99 * index / config.steps) / 255
            moved = protected.detach() + step * gradient.sign()
            protected = moved.clamp(photo - reach, photo + reach).clamp(0, 1)
        results.append(protected.detach())
    return torch.cat(results)
