"""How well a manipulator forges, on people it never saw: the numbers of its card, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from shields.budget import Budget
from shields.errors import ImageError
from shields.models import load
from shields.models.classifiers import AttributeClassifierModel
from shields.models.manipulation import Condition, Manipulator, resized
from shields.pgd import PgdConfig, pgd
from shields.types import Image, Step
from shields.weights import WeightStore
from trainers.data import FacePack, middle

__all__ = ["draw_sheet", "held_out_faces", "measure"]

#: budget and steps with which ID-Guard measures how easily a manipulator is disturbed
_LEVELS, _STEPS = 6.375, 10
#: share of a packed face's side that is shown to manipulators: 1.6 face boxes out of 1.8
_REGION = 0.89


def held_out_faces(
    pack: Path, attributes: Sequence[str], *, count: int | None = None, size: int | None = None
) -> tuple[Image, Tensor, Tensor]:
    """Cut held-out faces as manipulators see them.

    Args:
        pack: A file made by `trainers.pack`, with labels.
        attributes: Which labels.
        count: How many faces, spread evenly over the held-out ones; all where left out.
        size: Side to bring them to, pixels; as packed where left out.

    Returns:
        Images (B, 3, S, S), landmarks (B, 5, 2) in their pixels, labels (B, N).

    Raises:
        ImageError: It is no such file, or nobody of whom the labels are known is held out.
    """
    held = FacePack(pack, validation=True, attributes=attributes)
    total = len(held)
    if not total:
        raise ImageError(
            f"{pack} holds nobody with labels among the held-out people, a tenth of all by a hash "
            "of the name; pack photos of more people"
        )
    rows = torch.linspace(0, total - 1, min(count or total, total)).long().tolist()
    samples = [held[row] for row in rows]
    cut, start = middle(torch.stack([sample["face"] for sample in samples]), _REGION)
    image = cut.float() / 255
    landmarks = torch.stack([sample["landmarks"] for sample in samples]) - start
    if size is not None:
        image, landmarks = resized(image, (size, size)), landmarks * (size / cut.shape[-1])
    return image, landmarks, torch.stack([sample["labels"] for sample in samples])


def _condition(model: Manipulator, attribute: str, *, give: bool) -> Condition:
    """Look up what gives or takes an attribute, as StarGAN's kin or as HiSD name it."""
    name = attribute.lower()
    kin = name if give else f"not_{name}"
    return model.condition(
        kin if kin in model.conditions else f"{name}:{'with' if give else 'without'}"
    )


def _forged(
    model: Manipulator, image: Image, attribute: str, wanted: Tensor, *, batch: int = 32
) -> Image:
    """Give each face the attribute, or take it away, as its entry of `wanted` says."""
    forged = torch.empty_like(image)
    for value in (1, 0):
        condition = _condition(model, attribute, give=bool(value))
        found = (wanted == value).nonzero().flatten()
        for rows in torch.split(found, batch) if len(found) else ():
            forged[rows] = model(image[rows], condition)
    return forged


@torch.no_grad()
def measure(
    model: Manipulator, pack: Path, attribute: str, *, classifier: str, recognizer: str, size: int,
    store: WeightStore | None = None,
) -> dict[str, float]:  # fmt: skip
    """Measure edits of one attribute on all held-out faces.

    Returns:
        `success`: share of edits that the classifier sees; `identity`: mean cosine between the
        recognizer's embeddings of photo and edit; `reconstruction_psnr`: dB, where the attribute
        that is asked for is there already; `alpha`: mean squared distance in [-1, 1] that a
        6.375-level PGD of 10 steps moves the output of 64 faces, ID-Guard's prior; `disturbed`:
        share of these that it moves by more than 0.05.
    """
    store = store or WeightStore()
    cpu = torch.device("cpu")
    judge = load("classifier", classifier, store=store, device=cpu)
    assert isinstance(judge, AttributeClassifierModel), "the registry of classifiers holds no other"
    knower = load("recognizer", recognizer, store=store, device=cpu)
    image, landmarks, labels = held_out_faces(pack, [attribute], size=size)
    own = labels[:, 0]
    forged = _forged(model, image, attribute, 1 - own).clamp(0, 1)
    same = _forged(model, image, attribute, own).clamp(0, 1)
    matrix = knower.matrix(landmarks, image)
    cosine = (knower(image, matrix) * knower(forged, matrix)).sum(1)
    seen = (judge(forged)[:, judge.attributes.index(attribute)] > 0.5).long()
    error = (same - image).square().mean(dim=(1, 2, 3))
    moved = _moved(model, image[:: max(1, len(image) // 64)][:64], attribute)
    return {
        "faces": float(len(image)),
        "success": float((seen == 1 - own).float().mean()),
        "identity": float(cosine.mean()),
        "reconstruction_psnr": float((-10 * error.log10()).mean()),
        "alpha": float(moved.mean()),
        "disturbed": float((moved > 0.05).float().mean()),
    }


def _moved(model: Manipulator, image: Image, attribute: str) -> Tensor:
    """Mean squared distance (B,), in [-1, 1], between forgeries of photo and perturbed photo."""
    condition = _condition(model, attribute, give=True)
    clean = model(image, condition)

    def objective(view: Image, step: Step) -> Tensor:
        return (model(view, condition) - clean).square().mean(dim=(1, 2, 3))

    with torch.enable_grad():
        perturbation = pgd(
            image, objective, Budget(levels=_LEVELS), PgdConfig(steps=_STEPS),
            mask=torch.ones_like(image[:, :1]), rng=torch.Generator().manual_seed(0),
        )  # fmt: skip
    disturbed = model((image + perturbation).clamp(0, 1), condition)
    return 4 * (disturbed - clean).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def draw_sheet(
    models: Sequence[Manipulator], pack: Path, attribute: str, *, people: int = 8, side: int = 128
) -> PILImage.Image:
    """Draw held-out people in columns; photos on top, one row of forgeries per manipulator."""
    image, _, labels = held_out_faces(pack, [attribute], count=people)
    rows = {"photo": image}
    for model in models:
        rows[model.name] = _forged(model, image, attribute, 1 - labels[:, 0]).clamp(0, 1)
    margin, gap = 130, 4
    sheet = PILImage.new(
        "RGB", (margin + len(image) * (side + gap), len(rows) * (side + gap)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    for row, (name, pictures) in enumerate(rows.items()):
        top = row * (side + gap)
        draw.text((margin - 8, top + side / 2), name, fill="black", font=font, anchor="rm")
        for column, picture in enumerate(resized(pictures, (side, side)).clamp(0, 1)):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            place = (margin + column * (side + gap), top)
            sheet.paste(PILImage.fromarray(np.ascontiguousarray(pixels)), place)
    return sheet
