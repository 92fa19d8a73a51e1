"""Distortions against SciPy, OpenCV, published values and closed forms."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness.attacks import parse
from tests.test_attacks import by_hand, picture


@pytest.fixture(scope="module")
def astronaut() -> np.ndarray:
    return pytest.importorskip("skimage.data").astronaut()


def decibels(pixels: np.ndarray, reference: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(pixels.astype(float) - reference).mean())


# The published values have one decimal, and were measured with other implementations.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("jpeg:90", 36.69),
        ("jpeg:75", 34.00),
        ("jpeg:30", 30.54),
        ("blur:0,window=5", 31.1),
        ("blur:0,window=9", 26.8),
        ("blur:0,window=21", 22.0),
        ("downscale:2", 27.9),
        ("downscale:6", 21.8),
        ("saturation:0.6", 25.8),
        ("saturation:0", 17.9),
        ("contrast:0.85", 26.4),
        ("contrast:0.35", 13.7),
        ("contrast:0.85,about=black", 21.7),
        ("contrast:0.35,about=black", 8.9),
    ],
)
def test_decibels_on_astronaut(astronaut: np.ndarray, text: str, expected: float) -> None:
    assert decibels(parse(text).apply(astronaut), astronaut) == pytest.approx(expected, abs=0.1)


# --- blur ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "window"), [(1.5, 5), (0.5, 3), (3.5, 21)])
def test_blur_is_scipys_and_opencvs(sigma: float, window: int) -> None:
    scipy, pixels = pytest.importorskip("scipy.ndimage"), picture(48, 64)
    result = parse(f"blur:{sigma},window={window}").apply(pixels)
    radius = (window // 2, window // 2, 0)
    exact = scipy.gaussian_filter(
        pixels.astype(float), (sigma, sigma, 0), mode="mirror", radius=radius
    )
    assert float(np.abs(result - exact).max()) < 0.501
    cv2 = pytest.importorskip("cv2")
    theirs = cv2.GaussianBlur(pixels, (window, window), sigma)
    assert int(np.abs(result.astype(int) - theirs).max()) <= 1


def test_blur_of_an_impulse_is_the_window() -> None:
    pixels = np.zeros((9, 9, 3), np.uint8)
    pixels[4, 4] = 255
    line = np.exp(-0.5 * (np.arange(-2, 3) / 1.5) ** 2)
    square = np.outer(line, line) / line.sum() ** 2
    result = parse("blur").apply(pixels)
    assert np.array_equal(result[2:7, 2:7, 1], (255 * square).round())
    assert result.astype(int).sum() == result[2:7, 2:7].astype(int).sum()


def test_blur_wider_than_the_photo_still_averages() -> None:
    assert parse("blur:30,window=61").apply(picture(8, 5)).std() < picture(8, 5).std()


# --- geometry ------------------------------------------------------------------------------------


def test_rotation_is_pillows_at_the_drawn_angle() -> None:
    pixels = picture(48, 64)
    angles = [np.random.default_rng(seed).uniform(-10, 10) for seed in range(20)]
    assert min(angles) < -5
    assert max(angles) > 5
    bilinear = PillowImage.Resampling.BILINEAR
    for seed in range(3):
        expected = PillowImage.fromarray(pixels).rotate(angles[seed], bilinear)
        assert np.array_equal(parse("rotate").apply(pixels, seed=seed), np.asarray(expected))


def test_rotation_leaves_the_centre_and_blackens_a_corner() -> None:
    result = parse("rotate:10").apply(np.full((65, 65, 3), 200, np.uint8), seed=0)
    assert (result[20:45, 20:45] == 200).all()
    assert (result[0, 0] == 0).all()


def test_a_crop_is_a_window_of_the_photo_and_reaches_every_corner() -> None:
    pixels = np.zeros((20, 20, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.mgrid[0:20, 0:20]
    corners = set()
    for seed in range(200):
        window = parse("crop:0.85").apply(pixels, seed=seed)
        top, left = (int(place) for place in window[0, 0, :2])
        assert np.array_equal(window, pixels[top : top + 17, left : left + 17])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(4) for left in range(4)}


def test_a_whole_crop_changes_nothing() -> None:
    assert np.array_equal(parse("crop:1,restore=true").apply(picture()), picture())


def test_downscale_by_two_averages_and_spreads() -> None:
    pixels = picture(64, 64)
    small = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    for size in ((32, 32), (64, 64)):
        small = torch.nn.functional.interpolate(small, size, mode="bilinear", antialias=True)
        small = small.round()
    result = parse("downscale:2").apply(pixels)
    gap = np.abs(result - small[0].permute(1, 2, 0).numpy())
    # Pillow rounds after each of its two passes as well.
    assert float(gap.max()) <= 2
    assert float(gap.mean()) < 0.5


def test_a_screenshot_at_full_size_is_off_the_grid_by_part_of_a_pixel() -> None:
    columns = np.tile(np.arange(100, dtype=np.uint8)[None, :, None] * 2, (40, 1, 3))
    for seed in range(5):
        shot = parse("screenshot:1,quality=0").apply(columns, seed=seed)
        assert shot.shape == (39, 99, 3)
        offset = np.random.default_rng(seed).uniform(0, 1, 2)[0]
        middle = shot[20, 10:80, 0].astype(float)
        assert np.abs(middle - 2 * (np.arange(10, 80) + offset)).max() <= 1


def test_a_screenshot_on_a_phone_is_the_larger_one_as_jpeg() -> None:
    pixels = picture(40, 60)
    plain = parse("screenshot:1.5,quality=0").apply(pixels, seed=3)
    assert plain.shape == (59, 89, 3)
    expected = by_hand(plain, "JPEG", quality=90)
    assert np.array_equal(parse("screenshot-phone").apply(pixels, seed=3), expected)
    desktop = parse("screenshot-desktop").apply(pixels, seed=3)
    assert np.array_equal(by_hand(desktop, "JPEG", quality=90), parse("screenshot").apply(
        pixels, seed=3))  # fmt: skip


# --- colour --------------------------------------------------------------------------------------


def test_saturation_keeps_the_luma_and_scales_the_chroma() -> None:
    luma = np.asarray(PillowImage.fromarray(picture()).convert("L")).astype(int)
    grey = parse("saturation:0").apply(picture()).astype(int)
    assert np.ptp(grey, axis=2).max() == 0
    assert np.abs(grey[..., 0] - luma).max() <= 1
    assert np.array_equal(parse("saturation:1").apply(picture()), picture())
    cv2 = pytest.importorskip("cv2")
    pale = parse("saturation:0.4").apply(picture()).astype(np.float32)
    ours = cv2.cvtColor(pale, cv2.COLOR_RGB2YCrCb)
    theirs = cv2.cvtColor(picture().astype(np.float32), cv2.COLOR_RGB2YCrCb)
    # OpenCV centres the chroma of floats on a half.
    chroma = 0.4 * (theirs[..., 1:] - 0.5) + 0.5
    assert np.abs(ours[..., 1:] - chroma).max() < 0.75
    assert np.abs(ours[..., 0] - theirs[..., 0]).max() < 0.51


def test_contrast_has_its_closed_form_and_clips_instead_of_wrapping() -> None:
    pixels = np.array([[[0, 60, 120], [180, 240, 240]]], np.uint8)
    assert parse("contrast:0.5").apply(pixels).ravel().tolist() == [70, 100, 130, 160, 190, 190]
    assert parse("contrast:3").apply(pixels).ravel().tolist() == [0, 0, 80, 255, 255, 255]
    darker = parse("contrast:0.5,about=black").apply(pixels)
    assert darker.ravel().tolist() == [0, 30, 60, 90, 120, 120]


@pytest.mark.parametrize("seed", range(3))
def test_jitter_by_hand_at_the_drawn_strengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    factors, hue = [rng.uniform(0.8, 1.2) for _ in range(3)], rng.uniform(-0.05, 0.05)
    luma = np.array([0.299, 0.587, 0.114])
    values = (picture() * factors[0]).clip(0, 255)
    mean = (values @ luma).mean()
    values = (mean + factors[1] * (values - mean)).clip(0, 255)
    grey = (values @ luma)[..., None]
    values = (grey + factors[2] * (values - grey)).clip(0, 255)
    expected = np.empty_like(values)
    for place in np.ndindex(values.shape[:2]):
        turn, *rest = colorsys.rgb_to_hsv(*values[place] / 255)
        expected[place] = np.multiply(colorsys.hsv_to_rgb((turn + hue) % 1, *rest), 255)
    gap = np.abs(parse("jitter").apply(picture(), seed=seed) - expected)
    # Pillow rounds after every step, and its hue has 256 values.
    assert float(gap.mean()) < 2
    assert float(gap.max()) < 10


def test_jitter_of_nothing_is_nothing() -> None:
    text = "jitter:0,contrast=0,saturation=0,hue=0"
    assert np.array_equal(parse(text).apply(picture()), picture())


# --- lost pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.95])
def test_dropped_positions_lose_all_colours_at_the_ratio_asked_for(ratio: float) -> None:
    pixels = np.full((64, 64, 3), 9, np.uint8)
    result = parse(f"drop:{ratio},fill=black").apply(pixels)
    assert (result.min(axis=2) == result.max(axis=2)).all()
    assert (result[..., 0] == 0).mean() == pytest.approx(ratio, abs=0.03)


def test_holes_get_the_median_of_their_kept_neighbours() -> None:
    pixels = picture(30, 40)
    lost = np.random.default_rng(4).random((30, 40)) < 0.4
    result = parse("drop:0.4").apply(pixels, seed=4)
    assert np.array_equal(result[~lost], pixels[~lost])
    for row, column in zip(*np.nonzero(lost), strict=True):
        rows, columns = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        kept = pixels[rows, columns][~lost[rows, columns]]
        if len(kept):
            assert np.array_equal(result[row, column], np.median(kept, axis=0).round())


def test_a_constant_photo_survives_drops_unchanged() -> None:
    pixels = np.full((32, 32, 3), (10, 200, 77), np.uint8)
    assert np.array_equal(parse("drop:0.95").apply(pixels), pixels)
