"""How much a manipulator withstands: the numbers of ID-Guard's Table VII.

Source:
    ID-Guard (Qu et al., 2025), https://arxiv.org/abs/2409.13349, section IV-D5 and Eq. 16.

Differs:
    The paper names the attacks and says nothing of their strength. Here each has its budget, 0.05
    in [-1, 1] (6.375 levels); FGSM, I-FGSM and PGD are the presets of Disrupting Deepfakes, and the
    noise has a deviation of 0.05 in [-1, 1].
    C&W is its walk, Adam on w with image = (tanh w + 1) / 2 and the best of all steps, inside the
    same budget, which stands for the penalty on the perturbation's length.
    An attack knows the network and all of its edits, and all edits are measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shields.models.base import Recognizer
from shields.models.manipulation import Manipulator
from shields.protectors.disrupting import Disrupting, DisruptingConfig
from shields.types import Image
from trainers.idguard_faces import plain_name, success

__all__ = ["ATTACKS", "measure_robustness"]

#: name in a card -> how the manipulator is attacked
ATTACKS: Mapping[str, DisruptingConfig] = {
    "fgsm": DisruptingConfig.fgsm(),
    "ifgsm": DisruptingConfig.ifgsm(),
    "pgd": DisruptingConfig.paper(),
    "cw": DisruptingConfig(
        levels=6.375, steps=30, step=0.01, update="adam", space="tanh", classes="joint",
        keep="best",
    ),
}  # fmt: skip
#: standard deviation of the noise, image units
_NOISE = 0.025


def measure_robustness(
    model: Manipulator,
    faces: Image,
    landmarks: Tensor,
    *,
    judge: Recognizer,
    rng: torch.Generator,
) -> dict[str, float]:
    """Measure how forgeries of disturbed photos differ from those of clean ones.

    Args:
        model: The manipulator; it is attacked with full knowledge of it.
        faces: (B, 3, H, W), [0, 1].
        landmarks: (B, 5, 2), pixels.
        judge: Says how alike two faces are.
        rng: A CPU generator.

    Returns:
        Of "noise" and of each of `ATTACKS` the means `l2_face_NAME`, which a robust manipulator
        keeps low, and `identity_NAME`, which it keeps high.
    """
    noise = _NOISE * torch.randn(faces.shape, generator=rng).to(faces)
    disturbed = {"noise": (faces + noise).clamp(0, 1)}
    for name, config in ATTACKS.items():
        made = Disrupting(config, manipulator=model)(faces, rng=rng)
        disturbed[name] = (faces + made).clamp(0, 1)
    values = {}
    ending = plain_name(model.name)
    for name, image in disturbed.items():
        found = success([model], [model.conditions], (faces, image), landmarks, judge)
        for kind in ("l2_face", "identity"):
            values[f"{kind}_{name}"] = float(found[f"{kind}_{ending}"])
    return values
