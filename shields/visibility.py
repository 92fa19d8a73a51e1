"""How far a pixel may move before people notice: a budget that follows the picture.

Source:
    A perceptually tuned subband image coder based on the measure of just-noticeable-distortion
    profile (Chou, Li, 1995), IEEE Transactions on Circuits and Systems for Video Technology 5(6).
    Luminance adaptation and contrast masking with the constants of that paper; its viewing
    distance is six picture heights.

Differs:
    The paper's threshold is for luminance; we use it for each of R, G and B.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from shields.types import Image

__all__ = ["just_noticeable"]

#: weights of the surroundings, 5 x 5
_BACKGROUND = (
    (1, 1, 1, 1, 1), (1, 2, 2, 2, 1), (1, 2, 0, 2, 1), (1, 2, 2, 2, 1), (1, 1, 1, 1, 1),
)  # fmt: skip
#: gradients: horizontal edge and the diagonal; the two others are their mirror images
_EDGE = ((0, 0, 0, 0, 0), (1, 3, 8, 3, 1), (0, 0, 0, 0, 0), (-1, -3, -8, -3, -1), (0, 0, 0, 0, 0))
_DIAGONAL = (
    (0, 0, 1, 0, 0), (0, 8, 3, 0, 0), (1, 3, 0, -3, -1), (0, 0, -3, -8, 0), (0, 0, -1, 0, 0),
)  # fmt: skip


def _filters() -> Tensor:
    edge, diagonal = torch.tensor(_EDGE).float() / 16, torch.tensor(_DIAGONAL).float() / 16
    background = torch.tensor(_BACKGROUND).float() / 32
    return torch.stack([background, edge, edge.T, diagonal, diagonal.flip(1)])[:, None]


def just_noticeable(image: Image) -> Tensor:
    """Threshold of visibility of every pixel: (B, 3, H, W), [0, 1] -> (B, 1, H, W), levels.

    Example:
        >>> grey = torch.full((1, 3, 8, 8), 127 / 255)
        >>> round(float(just_noticeable(grey).mean()), 2)
        3.0
    """
    weights = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luminance = (image * weights).sum(dim=1, keepdim=True) * 255
    padded = functional.pad(luminance, (2, 2, 2, 2), mode="replicate")
    responses = functional.conv2d(padded, _filters().to(image))
    background = responses[:, :1]
    contrast = responses[:, 1:].abs().amax(dim=1, keepdim=True)
    dark = 17 * (1 - (background / 127).clamp(0, 1).sqrt()) + 3
    adaptation = torch.where(background <= 127, dark, 3 / 128 * (background - 127) + 3)
    masking = contrast * (background * 1e-4 + 0.115) + 0.5 - background * 0.01
    return torch.maximum(adaptation, masking)
