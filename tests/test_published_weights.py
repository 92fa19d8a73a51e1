"""Networks that others published, with their own weights: they do what was measured."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from shields import models
from shields.types import Face
from shields.weights import WeightStore

SHARED = Path(__file__).parents[1].parent / "shared"
CPU = torch.device("cpu")
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def portraits(number: int, size: int) -> torch.Tensor:
    images = []
    for path in sorted((SHARED / "data" / "portraits").glob("*.jpg"))[:: 436 // number][:number]:
        photo = PILImage.open(path).convert("RGB")
        side = photo.width
        square = photo.crop((0, 0, side, side)).resize((size, size), PILImage.Resampling.LANCZOS)
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
    return torch.stack(images)


@needs_shared
def test_taef2_rebuilds_portraits_as_measured():
    store = WeightStore(SHARED / "weights")
    network = models.load("autoencoder", "taef2", store=store, device=CPU)
    image = portraits(4, 256)
    with torch.no_grad():
        error = (network.reconstruct(image) - image).square().mean((1, 2, 3))
    psnr = -10 * error.log10()
    assert psnr.mean() >= 33


def lfw(names: list[str]) -> list[torch.Tensor]:
    with tarfile.open(SHARED / "data" / "lfw-deepfunneled.tar") as archive:
        contents = {}
        for member in archive:  # one pass, not one for each name
            short = Path(member.name).stem
            if short in names:
                contents[short] = archive.extractfile(member).read()
            if len(contents) == len(names):
                break
    photos = [PILImage.open(io.BytesIO(contents[name])).convert("RGB") for name in names]
    return [torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255 for photo in photos]


def middle_landmarks(image: torch.Tensor) -> torch.Tensor:
    """Landmarks of the face nearest to the middle, straight from facenet-pytorch."""
    from facenet_pytorch import MTCNN

    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    boxes, scores, points = MTCNN(min_face_size=60).detect(pixels, landmarks=True)
    faces = [
        Face(box=tuple(box), landmarks=marks, score=float(score))
        for box, score, marks in zip(boxes.astype(float), scores, points.astype(float), strict=True)
    ]
    middle = np.array([125.0, 125.0])
    nearest = min(faces, key=lambda face: np.linalg.norm(face.landmarks.mean(0) - middle))
    return torch.from_numpy(nearest.landmarks).float()[None]


@needs_shared
def test_mobilefacenet_tells_people_apart():
    store = WeightStore(SHARED / "weights")
    network = models.load("recognizer", "mobilefacenet", store=store, device=CPU)
    people = ["Aaron_Peirsol", "Abdullah_Gul", "Adrien_Brody"]
    names = [f"{person}_000{index}" for person in people for index in (1, 2)]
    embeddings = []
    with torch.no_grad():
        for image in lfw(names):
            matrix = network.matrix(middle_landmarks(image), image)
            embeddings.append(network(image, matrix))
    similarity = torch.cat(embeddings) @ torch.cat(embeddings).T
    assert network.threshold == 0.205
    for row in range(len(names)):
        for column in range(row):
            same = row // 2 == column // 2
            assert (similarity[row, column] > network.threshold) == same, (row, column)
