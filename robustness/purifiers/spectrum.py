"""Amplitudes and phases of images, low frequencies apart from high ones."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from shields.types import Image

__all__ = ["exchange"]


def exchange(
    image: Image,
    reference: Image,
    *,
    amplitude_radius: float,
    phase_radius: float,
    delta: float,
) -> Image:
    """Give an image the low amplitudes, and nearly the low phases, of another.

    Args:
        image: (B, 3, H, W).
        reference: (B, 3, H, W).
        amplitude_radius: Frequencies up to here get the amplitude of `reference`, in waves over
            the image; 0 for none at all.
        phase_radius: Frequencies up to here get a phase no further than `delta` from that of
            `reference`; 0 for none at all.
        delta: Radians.

    Returns:
        (B, 3, H, W), not clamped.
    """
    ours, theirs = torch.fft.rfft2(image), torch.fft.rfft2(reference)
    amplitude = torch.where(_low(image, amplitude_radius), theirs.abs(), ours.abs())
    # Around the circle: the difference of two angles may be past half a turn.
    apart = torch.angle(ours * theirs.conj()).clamp(-delta, delta)
    phase = torch.where(_low(image, phase_radius), torch.angle(theirs) + apart, torch.angle(ours))
    mended: Any = torch.fft.irfft2(torch.polar(amplitude, phase), s=image.shape[2:])
    return cast("Image", mended)


def _low(image: Image, radius: float) -> Tensor:
    """Which frequencies of the half spectrum of (B, 3, H, W) lie within the radius: (H, W/2+1)."""
    height, width = image.shape[2:]
    down = torch.fft.fftfreq(height, 1 / height, device=image.device)
    across = torch.fft.rfftfreq(width, 1 / width, device=image.device)
    inside: Tensor = torch.hypot(down[:, None], across) <= radius
    return inside & (radius > 0)
