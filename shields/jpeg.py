"""JPEG on tensors: the codec itself, and an imitation that has a gradient.

Source:
    Rec. ITU-T T.81 (1992), https://www.w3.org/Graphics/JPEG/itu-t81.pdf: transform and tables.
    JPEG-resistant Adversarial Images (Shin, Song, 2017): rounding replaced by a cubic.

Differs:
    The value of a compressed image is never approximated: the forward pass is the codec itself.
    What is soft is the gradient alone.
"""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional

from shields.types import Image

__all__ = ["TO_YCC", "Subsampling", "carry", "real_jpeg", "soft_jpeg"]

Subsampling = Literal["4:2:0", "4:4:4"]

#: threads for a batch; Pillow lets go of the interpreter while it codes
_THREADS = 8
#: JFIF: RGB -> Y, Cb, Cr (chroma about 0)
TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


def _through_codec(pixels: np.ndarray, quality: int, subsampling: Subsampling) -> np.ndarray:
    """Encode and decode (H, W, 3) uint8."""
    file = io.BytesIO()
    image = PillowImage.fromarray(pixels)
    image.save(file, format="JPEG", quality=quality, subsampling=subsampling)
    with PillowImage.open(file) as decoded:
        return np.array(decoded)


@torch.no_grad()
def real_jpeg(image: Image, quality: int, subsampling: Subsampling = "4:2:0") -> Image:
    """Round to 8 bits, then encode and decode with libjpeg, on the CPU.

    Args:
        image: (B, 3, H, W), [0, 1], on any device.
        quality: libjpeg's scale, 1 to 100.
        subsampling: "4:2:0" halves the colour planes, as nearly every program does; "4:4:4" not.

    Returns:
        (B, 3, H, W), every value k / 255, without gradient, on the image's device.
    """
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    photos = list(levels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def work(pixels: np.ndarray) -> np.ndarray:
        return _through_codec(pixels, quality, subsampling)

    if len(photos) == 1:
        coded = [work(photos[0])]
    else:
        # Built anew each time: threads kept for later would not survive a fork (data loaders).
        with ThreadPoolExecutor(min(len(photos), _THREADS)) as pool:
            coded = list(pool.map(work, photos))
    return torch.from_numpy(np.stack(coded)).permute(0, 3, 1, 2).to(image) / 255


def soft_jpeg(image: Image, quality: int, subsampling: Subsampling = "4:2:0") -> Image:
    """Imitate the codec differentiably: rounding becomes a cubic that bends through it.

    For 4:2:0 this is `kornia.enhance.jpeg_codec_differentiable`; for 4:4:4, which it lacks, the
    same steps without the halved colour planes. About one level from the codec on photos, far
    more on noise: use the gradient, not the value.

    Args:
        image: (B, 3, H, W), [0, 1].
        quality: libjpeg's scale, 1 to 100.
        subsampling: "4:2:0" or "4:4:4".

    Returns:
        (B, 3, H, W), [0, 1]; the last clamp is a plain one.
    """
    if subsampling == "4:2:0":
        from kornia.enhance import jpeg_codec_differentiable

        coded: Tensor = jpeg_codec_differentiable(image, image.new_tensor([float(quality)]))
        return coded
    height, width = image.shape[2:]
    padded = functional.pad(image, (0, -width % 8, 0, -height % 8), mode="replicate")
    to_ycc, dct = image.new_tensor(TO_YCC), _dct_matrix().to(image)
    offset = image.new_tensor([128.0, 0.0, 0.0]).view(3, 1, 1)
    planes = torch.einsum("kc,bcyx->bkyx", to_ycc, padded * 255) - offset
    blocks = planes.reshape(len(image), 3, planes.shape[2] // 8, 8, -1, 8)
    table = _tables(quality).to(image).view(3, 1, 8, 1, 8)
    scaled = torch.einsum("ua,bkyaxd,vd->bkyuxv", dct, blocks, dct) / table
    whole = scaled.detach().round()
    rounded = whole + (scaled - whole) ** 3
    blocks = torch.einsum("ua,bkyuxv,vd->bkyaxd", dct, rounded * table, dct)
    planes = blocks.flatten(4, 5).flatten(2, 3) + offset
    colours = torch.einsum("ck,bkyx->bcyx", to_ycc.inverse(), planes) / 255
    return colours[..., :height, :width].clamp(0, 1)


@lru_cache(maxsize=1)
def _dct_matrix() -> Tensor:
    """The orthonormal 8-point cosine transform, (frequency, position)."""
    positions, frequencies = torch.arange(8) + 0.5, torch.arange(8)
    matrix = torch.cos(torch.outer(frequencies, positions) * math.pi / 8) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


@lru_cache(maxsize=128)
def _tables(quality: int) -> Tensor:
    """Steps of quantisation as the codec has them at this quality: (3, 8, 8) for Y, Cb, Cr."""
    file = io.BytesIO()
    PillowImage.new("RGB", (8, 8)).save(file, format="JPEG", quality=quality)
    with PillowImage.open(file) as coded:
        tables = coded.quantization  # type: ignore[attr-defined]  # a JPEG has it, others not
    luma, chroma = (torch.tensor(tables[key], dtype=torch.float32).view(8, 8) for key in (0, 1))
    return torch.stack([luma, chroma, chroma])


class _Carry(torch.autograd.Function):
    """The first input's value with the second input's gradient."""

    @staticmethod
    def forward(_context: object, value: Tensor, _carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def carry(value: Tensor, carrier: Tensor) -> Tensor:
    """Return `value`, bit for bit, with the gradient of `carrier`.

    `carrier + (value - carrier).detach()` would do the same only up to rounding.

    Example:
        >>> x = torch.tensor([0.3], requires_grad=True)
        >>> y = carry(x.detach().round(), x * 2)
        >>> y.sum().backward()
        >>> float(y.detach()), float(x.grad)
        (0.0, 2.0)
    """
    carried: Tensor = _Carry.apply(value, carrier)
    return carried
