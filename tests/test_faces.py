"""Face geometry against closed forms and an independent implementation of affine sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from shields.errors import ConfigError, ImageError
from shields.faces import (
    Placement,
    alignment,
    crop,
    landmarks_in,
    paste,
    place,
    similarity,
    warp,
)
from shields.types import Face, Photo, check_image, check_mask

_TEMPLATE = torch.tensor([[8.0, 11.0], [17.0, 11.0], [12.5, 16.0], [9.0, 22.0], [16.0, 22.0]])
_IDENTITY = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
_LEVEL = 1 / 255


def _image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _photo(height: int, width: int, seed: int = 0) -> Photo:
    rng = np.random.default_rng(seed)
    return Photo(pixels=rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _face(left: float, top: float, right: float, bottom: float) -> Face:
    x, y = np.array([0.3, 0.7, 0.5, 0.35, 0.65]), np.array([0.4, 0.4, 0.6, 0.8, 0.8])
    points = np.stack([left + x * (right - left), top + y * (bottom - top)], axis=1)
    return Face(box=(left, top, right, bottom), landmarks=points.astype(np.float32), score=1.0)


def _matrix(angle: float, scale: float, shift: tuple[float, float]) -> torch.Tensor:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return torch.tensor(np.column_stack([turn, shift]))


def _apply(matrix: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return points @ matrix[:, :2].T + matrix[:, 2]


# --- similarity and alignment ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_similarity_recovers_rotation_scale_and_shift(dtype: torch.dtype) -> None:
    known = [_matrix(0.3, 0.5, (4, -7)), _matrix(-2.8, 3.0, (100, 20)), _matrix(0, 1, (0, 0))]
    target = _TEMPLATE.double()
    sources = [_apply(torch.linalg.inv(_square(m))[:2], target) for m in known]
    found = similarity(torch.stack(sources).to(dtype), target.to(dtype))
    assert found.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), torch.stack(known), atol=tolerance, rtol=tolerance)


def _square(matrix: torch.Tensor) -> torch.Tensor:
    return torch.cat([matrix, torch.tensor([[0.0, 0, 1]], dtype=matrix.dtype)])


def test_similarity_is_the_least_squares_optimum() -> None:
    source = _image(1, 5, 2, seed=1).double() * 50
    target = _image(5, 2, seed=2).double() * 30
    # independently: a, b, shift x, shift y from the normal equations of [[a, -b], [b, a]]
    x, y = source[0].T
    one, zero = torch.ones(5).double(), torch.zeros(5).double()
    system = torch.cat(
        [torch.stack([x, -y, one, zero], dim=1), torch.stack([y, x, zero, one], dim=1)]
    )
    a, b, c, d = torch.linalg.lstsq(system, target.T.flatten()[:, None]).solution[:, 0]
    expected = torch.stack([torch.stack([a, -b, c]), torch.stack([b, a, d])])
    torch.testing.assert_close(similarity(source, target)[0], expected)


def test_similarity_never_reflects() -> None:
    mirrored = _TEMPLATE * torch.tensor([-1.0, 1.0])
    matrix = similarity(mirrored[None], _TEMPLATE)[0]
    assert float(torch.linalg.det(matrix[:, :2])) > 0


def test_points_that_coincide_are_refused() -> None:
    with pytest.raises(ImageError, match="coincide"):
        similarity(torch.full((1, 5, 2), 3.0), _TEMPLATE)


def test_alignment_brings_landmarks_to_the_template() -> None:
    image = _image(2, 3, 64, 80)
    landmarks = torch.stack([_TEMPLATE * 2 + 5, _TEMPLATE * 1.5 + 9])
    matrices = alignment(landmarks, image, _TEMPLATE, (32, 24))
    for matrix, points in zip(matrices, landmarks, strict=True):
        torch.testing.assert_close(_apply(matrix, points), _TEMPLATE, atol=1e-4, rtol=0)


def test_alignment_squeezes_images_without_landmarks() -> None:
    image = _image(3, 3, 64, 48)
    squeezed = alignment(None, image, _TEMPLATE, (32, 24))
    # the outer edges of the image meet the outer edges of the crop
    corners = torch.tensor([[-0.5, -0.5], [47.5, 63.5]])
    for matrix in squeezed:
        torch.testing.assert_close(
            _apply(matrix, corners), torch.tensor([[-0.5, -0.5], [23.5, 31.5]])
        )
    landmarks = torch.stack([_TEMPLATE * 2, torch.full((5, 2), torch.nan), _TEMPLATE + 3])
    landmarks[2, 4, 1] = torch.nan
    mixed = alignment(landmarks, image, _TEMPLATE, (32, 24))
    torch.testing.assert_close(mixed[1:], squeezed[1:])
    torch.testing.assert_close(
        mixed[0], alignment(landmarks[:1], image[:1], _TEMPLATE, (32, 24))[0]
    )


# --- warp ---------------------------------------------------------------------------------------


def test_warp_by_the_identity_is_the_identity() -> None:
    image = _image(2, 3, 17, 30)
    torch.testing.assert_close(
        warp(image, _IDENTITY.repeat(2, 1, 1), (17, 30)), image, atol=2e-5, rtol=0
    )


def test_whole_pixel_shifts_are_exact_and_outside_is_zero() -> None:
    image = _image(1, 3, 20, 20)
    matrix = torch.tensor([[[1.0, 0, 3], [0, 1, -2]]])
    result = warp(image, matrix, (20, 20))
    torch.testing.assert_close(result[..., :18, 3:], image[..., 2:, :17], atol=2e-5, rtol=0)
    assert float(result[..., :3].abs().max()) < 2e-5
    assert float(result[..., 18:, :].abs().max()) < 2e-5


@pytest.mark.parametrize(
    ("angle", "scale", "shift"),
    [(0.4, 1.0, (5, -3)), (-1.2, 0.7, (10, 12)), (2.0, 1.6, (40, -5)), (0.0, 0.55, (1.5, 2.5))],
)
def test_warp_agrees_with_scipy(angle: float, scale: float, shift: tuple[float, float]) -> None:
    image = _image(1, 3, 40, 48).double()
    matrix = _matrix(angle, scale, shift)
    result = warp(image, matrix[None], (32, 28))[0].numpy()
    # scipy maps row, column of the output to row, column of the input
    inverse = torch.linalg.inv(_square(matrix)).numpy()[:2]
    linear, offset = inverse[::-1, 1::-1], inverse[::-1, 2]
    for channel, expected in zip(result, image[0].numpy(), strict=True):
        reference = ndimage.affine_transform(
            expected, linear, offset, output_shape=(32, 28), order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(channel, reference, atol=1e-9)


def test_a_batch_equals_its_singles_whatever_the_scales() -> None:
    image = _image(4, 3, 96, 96)
    matrices = torch.stack([_matrix(0.1, scale, (3, 4)).float() for scale in (1.2, 0.4, 0.15, 0.4)])
    batch = warp(image, matrices, (24, 20))
    singles = [warp(image[i : i + 1], matrices[i : i + 1], (24, 20)) for i in range(4)]
    assert torch.equal(batch, torch.cat(singles))


def test_strong_shrinking_averages_instead_of_skipping() -> None:
    image = _image(1, 3, 128, 128)
    result = warp(image, alignment(None, image, _TEMPLATE, (16, 16)), (16, 16))
    # bilinear sampling alone averages four of 64 values, which leaves 0.14
    assert float(result[..., 1:-1, 1:-1].std()) < 0.05
    assert float(result.mean()) == pytest.approx(0.5, abs=0.02)


def test_shrinking_keeps_positions() -> None:
    ramp = torch.arange(160.0).expand(1, 3, 96, 160) / 160
    matrix = torch.tensor([[[0.2, 0, 0.3], [0, 0.25, 0]]])
    result = warp(ramp, matrix, (24, 32))
    x = (torch.arange(32.0) - 0.3) / 0.2 / 160
    torch.testing.assert_close(result[0, 0, 12, 3:-3], x[3:-3], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.8, 0.2])
def test_a_gradient_reaches_the_image_and_is_right(scale: float) -> None:
    image = _image(1, 3, 12, 12).double().requires_grad_(True)
    matrix = _matrix(0.3, scale, (2, 1))[None]
    assert torch.autograd.gradcheck(lambda view: warp(view, matrix, (4, 5)), image)


def test_autocast_does_not_blur_coordinates() -> None:
    image = _image(1, 3, 200, 200)
    points = _image(1, 5, 2, seed=3) * 180
    plain = warp(image, similarity(points, _TEMPLATE), (32, 24))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = warp(image, similarity(points, _TEMPLATE), (32, 24))
    torch.testing.assert_close(cast.float(), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_networks_give_under_autocast_is_looked_at_in_the_same_places(
    dtype: torch.dtype,
) -> None:
    half = _image(1, 3, 200, 200).to(dtype)
    matrix = similarity(_image(1, 5, 2, seed=3) * 180, _TEMPLATE)
    assert torch.equal(warp(half, matrix, (32, 24)), warp(half.float(), matrix, (32, 24)))


# --- place, crop, paste ---------------------------------------------------------------------------


def test_a_face_in_the_middle_gets_a_square_twice_its_size_in_whole_blocks() -> None:
    placement = place(_face(400, 300, 500, 420), _photo(800, 900))
    assert placement == Placement(328, 240, 248, 240, size=(240, 248))
    assert all(type(value) is int for value in (placement.left, *placement.size))


def test_a_small_rectangle_ends_at_the_last_whole_block_of_the_photo() -> None:
    placement = place(_face(180, 100, 240, 160), _photo(250, 251))
    assert placement == Placement(144, 64, 104, 128, size=(128, 104))


def test_margin_and_size_are_obeyed() -> None:
    placement = place(_face(400, 300, 500, 400), _photo(800, 900), margin=3.0, size=128)
    assert placement == Placement(300, 200, 300, 300, size=(128, 128))


@pytest.mark.parametrize(
    "box", [(-10, -20, 90, 100), (820, 10, 890, 90), (5, 700, 80, 810), (300, 300, 301, 302)]
)
def test_a_face_at_the_border_stays_inside_the_photo(box: tuple[float, ...]) -> None:
    photo = _photo(800, 900)
    placement = place(_face(*box), photo)
    rows, columns = placement.region
    assert 0 <= rows.start < rows.stop <= 800
    assert 0 <= columns.start < columns.stop <= 900
    assert photo.pixels[placement.region].shape == (placement.height, placement.width, 3)
    image, mask = crop(photo, placement)
    assert image.shape[2:] == mask.shape[2:] == placement.size
    # what can be seen of the face lies inside
    assert placement.left <= max(box[0], 0)
    assert placement.top <= max(box[1], 0)
    assert placement.left + placement.width >= min(box[2], 900)
    assert placement.top + placement.height >= min(box[3], 800)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (3000, 4000, (192, 256)),
        (4000, 3000, (256, 192)),
        (256, 256, (256, 256)),
        (100, 200, (96, 200)),
        (16, 16, (64, 64)),
        (2000, 200, (256, 64)),
    ],
)
def test_the_whole_photo_keeps_its_aspect(height: int, width: int, size: tuple[int, int]) -> None:
    photo = Photo(pixels=np.broadcast_to(np.uint8(7), (height, width, 3)))
    assert place(None, photo) == Placement(0, 0, width, height, size=size)


def test_working_sides_are_legal_for_any_region() -> None:
    for side in range(16, 700, 7):
        photo = Photo(pixels=np.broadcast_to(np.uint8(7), (side, 333, 3)))
        for working, region in zip(place(None, photo).size, (side, 333), strict=True):
            assert working % 8 == 0
            assert 64 <= working <= max(64, min(256, -(-region // 8) * 8))


@pytest.mark.parametrize(("margin", "size"), [(0, 256), (float("nan"), 256), (2, 100), (2, 56)])
def test_impossible_margins_and_sizes(margin: float, size: int) -> None:
    with pytest.raises(ConfigError):
        place(None, _photo(99, 99), margin=margin, size=size)


def test_a_face_outside_the_photo_is_refused() -> None:
    with pytest.raises(ImageError, match="outside the photo"):
        place(_face(500, 500, 520, 520), _photo(100, 100))


def test_crop_at_the_same_size_is_the_photo_and_paste_its_inverse() -> None:
    photo = _photo(64, 72)
    placement = place(None, photo)
    image, mask = crop(photo, placement)
    assert torch.equal(image, photo.image())
    assert torch.equal(paste(image, placement), image)
    assert bool((mask == 1).all())


def test_crop_satisfies_the_contracts_of_images_and_masks() -> None:
    photo = _photo(300, 400)
    image, mask = crop(photo, place(_face(100, 100, 220, 230), photo, size=128))
    check_image(image)
    check_mask(mask, image)
    assert torch.equal(image, (image * 255).round() / 255)


def test_crop_shows_the_right_part_of_the_photo() -> None:
    pixels = np.zeros((300, 400, 3), dtype=np.uint8)
    pixels[150:, 200:] = 200
    image, _ = crop(Photo(pixels=pixels), Placement(100, 50, 200, 200, size=(100, 100)))
    # the resampling kernel reaches three pixels to either side and rings a little
    assert float(image[..., :46, :].max()) == float(image[..., :, :46].max()) == 0
    assert float(image[..., 54:, 54:].min()) == pytest.approx(200 / 255)


def test_the_mask_is_full_at_photo_borders_and_fades_inside() -> None:
    _, mask = crop(_photo(300, 400), Placement(0, 50, 256, 250, size=(256, 256)))
    left, right = mask[0, 0, 128, 0], mask[0, 0, 128, -1]
    top, bottom = mask[0, 0, 0, 128], mask[0, 0, -1, 128]
    assert left == bottom == 1
    assert max(right, top) < 0.01
    row = mask[0, 0, 128]
    assert bool((row[: 256 - 16] == 1).all())
    assert bool((row[256 - 16 :].diff() < 0).all())


@pytest.mark.parametrize("side", [64, 100, 127, 300, 1000])
@pytest.mark.parametrize("pattern", ["board", "random"])
def test_paste_never_exceeds_the_perturbation(side: int, pattern: str) -> None:
    if pattern == "board":
        board = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2) * 2 - 1
        perturbation = (board * 8 * _LEVEL).expand(1, 3, 128, 128).float()
    else:
        perturbation = (_image(1, 3, 128, 128) * 2 - 1) * 8 * _LEVEL
    result = paste(perturbation, Placement(3, 4, side, side + 9, size=(128, 128)))
    assert result.shape == (1, 3, side + 9, side)
    assert float(result.abs().max()) <= float(perturbation.abs().max())


@pytest.mark.parametrize("side", [50, 128, 333])
def test_paste_keeps_constants_and_positions(side: int) -> None:
    placement = Placement(0, 0, side, side, size=(128, 128))
    constant = torch.full((1, 3, 128, 128), 5 * _LEVEL)
    result = paste(constant, placement)
    torch.testing.assert_close(result, torch.full_like(result, 5 * _LEVEL))
    ramp = ((torch.arange(128.0) + 0.5) / 128).expand(1, 3, 128, 128) * 8 * _LEVEL
    expected = (torch.arange(side) + 0.5) / side * 8 * _LEVEL
    inner = slice(4, -4)
    torch.testing.assert_close(paste(ramp, placement)[0, 0, 0, inner], expected[inner])


def test_paste_does_not_touch_its_input() -> None:
    perturbation = (_image(1, 3, 64, 64) - 0.5) / 10
    before = perturbation.clone()
    paste(perturbation, Placement(0, 0, 200, 30, size=(64, 64)))
    assert torch.equal(perturbation, before)


def test_landmarks_follow_the_pixels_into_the_crop() -> None:
    pixels = np.zeros((400, 400, 3), dtype=np.uint8)
    face = _face(120, 120, 280, 280)
    centres = face.landmarks.round().astype(int)
    for x, y in centres:
        pixels[y - 6 : y + 7, x - 6 : x + 7] = 255
    placement = Placement(90, 80, 240, 260, size=(128, 104))
    image, _ = crop(Photo(pixels=pixels), placement)
    found = landmarks_in(face, placement)
    assert found.shape == (1, 5, 2)
    assert found.dtype == torch.float32
    for x, y in found[0].tolist():
        # the centre of mass of the dot around each landmark
        rows = torch.arange(round(y) - 7, round(y) + 8)
        columns = torch.arange(round(x) - 7, round(x) + 8)
        weight = image[0, 0, rows][:, columns]
        assert float((weight.sum(dim=1) * rows).sum() / weight.sum()) == pytest.approx(y, abs=0.3)
        assert float((weight.sum(dim=0) * columns).sum() / weight.sum()) == pytest.approx(
            x, abs=0.3
        )


def test_landmarks_at_the_same_size_only_move() -> None:
    face = _face(100, 100, 200, 200)
    moved = landmarks_in(face, Placement(40, 30, 256, 256, size=(256, 256)))
    torch.testing.assert_close(
        moved[0], torch.from_numpy(face.landmarks) - torch.tensor([40.0, 30.0])
    )


def test_landmarks_count_from_pixel_centres() -> None:
    # at half the size, working pixel 0 covers photo pixels 10 and 11, so its centre is 10.5
    points = np.array([[10.5, 20.5], [12.5, 22.5], [11, 21], [209.5, 119.5], [10, 20]])
    face = Face(box=(10, 20, 200, 110), landmarks=points.astype(np.float32), score=1.0)
    expected = torch.tensor([[0, 0], [1, 1], [0.25, 0.25], [99.5, 49.5], [-0.25, -0.25]])
    found = landmarks_in(face, Placement(10, 20, 200, 100, size=(50, 100)))
    torch.testing.assert_close(found[0], expected)
