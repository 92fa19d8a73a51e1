"""The face detector on real photos: none, one and two faces, singly and in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data

from shields.errors import ConfigError, ImageError
from shields.models.base import Detector
from shields.models.detectors import MtcnnDetector

_BOX = (181, 62, 268, 172)


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def detector() -> MtcnnDetector:
    return MtcnnDetector.load(device="cpu")


@pytest.fixture(scope="module")
def portrait() -> torch.Tensor:
    return _tensor(data.astronaut())


@pytest.fixture(scope="module")
def nobody() -> torch.Tensor:
    return _tensor(np.repeat(data.brick()[..., None], 3, axis=2))


@pytest.fixture(scope="module")
def couple() -> torch.Tensor:
    half = data.astronaut()[:, 96:352]
    return _tensor(np.concatenate([half, half], axis=1))


def test_one_face(detector: MtcnnDetector, portrait: torch.Tensor) -> None:
    assert isinstance(detector, Detector)
    (face,) = detector(portrait)
    assert face.box == pytest.approx(_BOX, abs=1.5)
    assert face.score > 0.99
    assert face.landmarks.shape == (5, 2)
    assert face.landmarks.dtype == np.float32
    left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_mouth[0] < right_mouth[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(left_mouth[1], right_mouth[1])
    assert all(type(value) is float for value in (*face.box, face.score))


def test_no_face_is_an_empty_list(detector: MtcnnDetector, nobody: torch.Tensor) -> None:
    assert detector(nobody) == []
    assert detector(torch.zeros(1, 3, 64, 64)) == []


def test_two_faces_side_by_side(detector: MtcnnDetector, couple: torch.Tensor) -> None:
    left, right = sorted(detector(couple), key=lambda face: face.box[0])
    assert left.box[0] == pytest.approx(_BOX[0] - 96, abs=8)
    assert np.subtract(right.box, left.box) == pytest.approx([256, 0, 256, 0], abs=8)


def test_largest_comes_first(detector: MtcnnDetector) -> None:
    pixels = data.astronaut()
    small = pixels[::2, ::2]
    both = np.concatenate([np.zeros_like(pixels[:, :256]), pixels[:, :400]], axis=1)
    both[:256, :256] = small
    faces = detector(_tensor(both))
    widths = [face.box[2] - face.box[0] for face in faces]
    assert len(widths) == 2
    assert widths[0] > 1.5 * widths[1]


def test_a_mixed_batch_equals_its_singles(
    detector: MtcnnDetector, portrait: torch.Tensor, nobody: torch.Tensor, couple: torch.Tensor
) -> None:
    found = detector.detect_batch(torch.cat([nobody, couple, portrait, nobody]))
    assert [len(faces) for faces in found] == [0, 2, 1, 0]
    singles = [*detector(couple), *detector(portrait)]
    for face, single in zip([*found[1], *found[2]], singles, strict=True):
        assert face.box == pytest.approx(single.box, abs=0.5)
        np.testing.assert_allclose(face.landmarks, single.landmarks, atol=0.5)


def test_large_photos_give_boxes_in_their_own_pixels(
    detector: MtcnnDetector, portrait: torch.Tensor
) -> None:
    (small,) = detector(portrait)
    large = torch.nn.functional.interpolate(portrait, (2048, 1792), mode="bilinear")
    (face,) = detector(large)
    scale = np.array([3.5, 4.0])
    assert face.box == pytest.approx(np.multiply(_BOX, np.tile(scale, 2)), abs=25)
    expected = (small.landmarks + 0.5) * scale - 0.5
    np.testing.assert_allclose(face.landmarks, expected, atol=14)


def test_a_face_too_small_for_the_first_look_is_found_by_the_second(
    detector: MtcnnDetector,
) -> None:
    pixels = np.full((2048, 2048, 3), 128, dtype=np.uint8)
    head = _tensor(data.astronaut()[:320, 64:384])
    head = torch.nn.functional.interpolate(head, (80, 80), mode="bilinear", antialias=True)
    pixels[700:780, 900:980] = (head[0].permute(1, 2, 0) * 255).round().byte().numpy()
    image = _tensor(pixels)
    half = torch.nn.functional.interpolate(image, (1024, 1024), mode="bilinear", antialias=True)
    assert detector(half) == []  # what the first look sees
    (face,) = detector(image)
    assert 900 < face.box[0] < face.box[2] < 980
    assert 700 < face.box[1] < face.box[3] < 780


@pytest.mark.parametrize("size", [(8, 8), (16, 400), (19, 19), (20, 20), (24, 3000)])
def test_photos_too_small_for_a_face(detector: MtcnnDetector, size: tuple[int, int]) -> None:
    assert detector(torch.full((1, 3, *size), 0.5)) == []


def test_the_threshold_is_obeyed(portrait: torch.Tensor) -> None:
    assert MtcnnDetector(threshold=1.0)(portrait) == []
    assert len(MtcnnDetector(threshold=0.0)(portrait)) >= 1
    with pytest.raises(ConfigError, match="threshold"):
        MtcnnDetector(threshold=1.5)


def test_global_random_state_and_the_input_stay_as_they_were(portrait: torch.Tensor) -> None:
    state, copy = torch.random.get_rng_state(), portrait.clone()
    MtcnnDetector()(portrait)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(portrait, copy)


def test_images_out_of_range_are_refused(detector: MtcnnDetector, portrait: torch.Tensor) -> None:
    with pytest.raises(ImageError, match=r"must lie in \[0, 1\]"):
        detector(portrait * 255)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_changes_nothing(detector: MtcnnDetector, portrait: torch.Tensor) -> None:
    (face,) = MtcnnDetector.load(device="cuda")(portrait)
    assert face.box == pytest.approx(detector(portrait)[0].box, abs=0.5)


def test_the_first_network_scores_a_level_as_the_detector_does(
    detector: MtcnnDetector, portrait: torch.Tensor
) -> None:
    pnet = detector._network.pnet
    sizes = detector.proposals.sizes(512, 512)
    assert sizes[0] == (308, 308)
    assert sizes[-1] == (14, 14)
    for size in sizes[3:]:
        small = torch.nn.functional.interpolate(portrait * 255, size=size, mode="area")
        expected = pnet((small - 127.5) * 0.0078125)[1][:, 1]
        assert torch.allclose(detector.proposals(portrait, size), expected, atol=1e-5)


def test_a_gradient_goes_from_the_first_network_to_the_image_alone(
    detector: MtcnnDetector, portrait: torch.Tensor
) -> None:
    image = portrait.clone().requires_grad_(True)
    detector.proposals(image, (40, 40), "bilinear").max().backward()
    assert image.grad is not None
    assert (image.grad != 0).any()
    assert not any(parameter.requires_grad for parameter in detector.proposals.parameters())


def test_a_tiny_image_has_no_levels(detector: MtcnnDetector) -> None:
    assert detector.proposals.sizes(19, 300) == []
    assert detector.proposals.sizes(20, 300) == [(13, 181)]
