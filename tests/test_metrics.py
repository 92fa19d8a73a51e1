"""Metrics against published values, independent implementations and hand-made examples."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from shields.errors import ImageError, MissingPackage, UnknownName, WeightsError
from shields.metrics import (
    METRICS,
    Metric,
    flip,
    identity,
    lpips,
    max_levels,
    mean_psnr,
    mse,
    photo_psnr,
    photo_ssim,
    psnr,
    ssim,
)
from tests import tiny


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth photo with noise, (height, width, 3) uint8."""
    smooth = tiny.faces_image(1, height, seed, width=width)[0].permute(1, 2, 0).numpy()
    noise = np.random.default_rng(seed).normal(0, 0.03, smooth.shape)
    return ((smooth + noise).clip(0, 1) * 255).round().astype(np.uint8)


def moved(photo: np.ndarray, levels: int, seed: int = 1) -> np.ndarray:
    step = np.random.default_rng(seed).integers(-levels, levels + 1, photo.shape)
    return (photo.astype(int) + step).clip(0, 255).astype(np.uint8)


def image(*photos: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def astronaut() -> tuple[np.ndarray, np.ndarray]:
    """The photo and its JPEG at quality 30."""
    data = pytest.importorskip("skimage.data")
    photo, file = np.array(data.astronaut()), io.BytesIO()
    PillowImage.fromarray(photo).save(file, "JPEG", quality=30)
    return photo, np.array(PillowImage.open(file))


# --- published and independent values ------------------------------------------------------------


def test_values_published_for_astronaut(astronaut) -> None:
    photo, coded = astronaut
    assert float(psnr(image(coded), image(photo))) == pytest.approx(30.54, abs=0.005)
    assert float(ssim(image(coded), image(photo))) == pytest.approx(0.8930, abs=5e-5)
    assert photo_psnr(photo, coded) == pytest.approx(30.54, abs=0.005)
    assert photo_ssim(photo, coded) == pytest.approx(0.8930, abs=5e-5)


def reference_ssim_map(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The published formula in float64 with SciPy's own filter, (H, W, 3)."""
    ndimage = pytest.importorskip("scipy.ndimage")

    def smooth(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5, mode="mirror")

    x, y = first / 255.0, second / 255.0
    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    both = smooth(x * y) - mean_x * mean_y
    return ((2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)) / (
        (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
    )


@pytest.mark.parametrize("size", [(61, 83), (11, 40), (130, 12)])
def test_ssim_equals_an_independent_computation(size) -> None:
    photo = pixels(*size)
    other = moved(photo, 12)
    expected = reference_ssim_map(photo, other).mean()
    assert float(ssim(image(photo), image(other))) == pytest.approx(expected, abs=2e-6)
    assert photo_ssim(photo, other) == pytest.approx(expected, abs=1e-8)


def test_ssim_inside_the_border_is_scikit_images(astronaut) -> None:
    skimage_metrics = pytest.importorskip("skimage.metrics")
    photo, coded = (array[:90, :120] for array in astronaut)
    expected = skimage_metrics.structural_similarity(
        photo, coded, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        channel_axis=2, data_range=255,
    )  # fmt: skip
    inside = reference_ssim_map(photo, coded)[5:-5, 5:-5].mean()
    assert inside == pytest.approx(expected, abs=1e-6)
    # With the border, which scikit-image leaves out, the value is close and not the same.
    assert float(ssim(image(photo), image(coded))) == pytest.approx(expected, abs=0.01)


def test_psnr_equals_scikit_images() -> None:
    skimage_metrics = pytest.importorskip("skimage.metrics")
    photo = pixels(37, 53)
    other = moved(photo, 9)
    expected = skimage_metrics.peak_signal_noise_ratio(photo, other, data_range=255)
    assert float(psnr(image(photo), image(other))) == pytest.approx(expected, abs=1e-4)
    assert photo_psnr(photo, other) == pytest.approx(expected, abs=1e-9)


def test_hand_made_differences() -> None:
    first = torch.zeros(2, 3, 4, 4)
    second = first.clone()
    second[0, 1, 2, 3] = 12 / 255
    second[1] = 3 / 255
    torch.testing.assert_close(mse(first, second), torch.tensor([144 / 48, 9.0]))
    torch.testing.assert_close(max_levels(first, second), torch.tensor([12.0, 3.0]))


def test_psnr_is_averaged_over_photos_and_never_pooled() -> None:
    clean = torch.full((2, 3, 16, 16), 0.5)
    other = clean + torch.tensor([0.1, 0.001]).view(2, 1, 1, 1)
    values = psnr(clean, other)
    torch.testing.assert_close(values, torch.tensor([20.0, 60.0]), atol=1e-3, rtol=0)
    assert mean_psnr(values) == (pytest.approx(40.0, abs=1e-3), 0)


def test_equal_photos_have_infinite_psnr_that_is_counted_apart() -> None:
    photo = pixels(20, 20)
    same = psnr(image(photo), image(photo))
    assert same.tolist() == [math.inf]
    assert photo_psnr(photo, photo) == math.inf
    assert mean_psnr(torch.cat([same, torch.tensor([30.0])])) == (30.0, 1)
    mean, endless = mean_psnr(same)
    assert math.isnan(mean)
    assert endless == 1


def test_nan_is_not_hidden_by_the_mean() -> None:
    mean, endless = mean_psnr(torch.tensor([30.0, math.nan, math.inf]))
    assert math.isnan(mean)
    assert endless == 1


# --- whole photos --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(301, 77), (64, 65), (65, 64), (128, 40), (67, 31)])
def test_banded_measures_equal_unbanded_ones(size) -> None:
    photo = pixels(*size)
    other = moved(photo, 8)
    whole = float(ssim(image(photo), image(other)))
    assert photo_ssim(photo, other) == pytest.approx(whole, abs=1e-6)
    assert photo_psnr(photo, other) == pytest.approx(
        float(psnr(image(photo), image(other))), abs=1e-4
    )


def test_a_change_counts_the_same_wherever_a_band_begins() -> None:
    photo = np.full((200, 40, 3), 120, dtype=np.uint8)
    values = set()
    for row in (60, 63, 64, 65, 127, 128):
        other = photo.copy()
        other[row, 20] += 30
        values.add(round(photo_ssim(photo, other), 9))
    assert len(values) == 1
    assert values.pop() < 1


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (np.zeros((20, 20, 3)), np.zeros((20, 20, 3)), "uint8"),
        (np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8), "uint8"),
        (np.zeros((20, 20, 3), np.uint8), np.zeros((20, 21, 3), np.uint8), "one size"),
    ],
)
@pytest.mark.parametrize("measure", [photo_psnr, photo_ssim])
def test_unfit_photos_are_refused(measure, first, second, words) -> None:
    with pytest.raises(ImageError, match=words):
        measure(first, second)


def test_photos_smaller_than_the_window_are_refused() -> None:
    with pytest.raises(ImageError, match="11 pixels"):
        photo_ssim(pixels(10, 40), pixels(10, 40))
    with pytest.raises(ImageError, match="11 pixels"):
        ssim(image(pixels(10, 40)), image(pixels(10, 40)))


# --- metrics that need something -----------------------------------------------------------------


def test_flip_is_the_packages_on_each_photo() -> None:
    package = pytest.importorskip("flip_evaluator")
    photos = [pixels(40, 48, seed) for seed in (0, 1)]
    others = [moved(photos[0], 3), moved(photos[1], 20)]
    values = flip(image(*others), image(*photos))
    for value, photo, other in zip(values, photos, others, strict=True):
        reference, test = (array.astype(np.float32) / 255 for array in (photo, other))
        _, expected, _ = package.evaluate(reference, test, "LDR", applyMagma=False)
        assert float(value) == pytest.approx(expected, abs=1e-6)
    assert 0 < values[0] < values[1] < 1
    assert float(flip(image(photos[0]), image(photos[0]))) == 0


def test_a_missing_package_is_named_with_the_line_that_helps(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "flip_evaluator", None)
    photo = image(pixels(20, 20))
    with pytest.raises(MissingPackage, match=r"pip install 'shields\[metrics\]'"):
        flip(photo, photo)


def test_lpips_is_the_packages_value_for_images_in_the_unit_range() -> None:
    pytest.importorskip("lpips")
    from shields.models.perceptual import LpipsModel

    model = LpipsModel.untrained("squeeze")
    photos = [pixels(48, 40, seed) for seed in (0, 1)]
    first, second = image(*photos), image(*(moved(photo, 20) for photo in photos))
    values = lpips(first, second, model)
    expected = model.network(first, second, normalize=True).flatten()
    torch.testing.assert_close(values, expected.detach(), atol=1e-6, rtol=1e-4)
    assert lpips(first, first, model).tolist() == [0, 0]


@pytest.mark.parametrize("backbone", ["alex", "vgg", "squeeze"])
def test_lpips_without_weights_says_what_is_missing(backbone, monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    for variable in ("TORCH_HOME", "SHIELDS_CHECKPOINTS", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    photo = image(pixels(40, 40))
    with pytest.raises(WeightsError) as caught:
        METRICS[f"lpips-{backbone}"].function(photo, photo)
    message = str(caught.value)
    assert f"https://download.pytorch.org/models/{backbone}"[:40] in message
    assert ".pth" in message
    assert str(tmp_path) in message
    assert not list(tmp_path.rglob("*.pth")), "something was downloaded"


def test_lpips_refuses_damaged_weights(monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path))
    (tmp_path / "squeezenet1_1-b8a52dc0.pth").write_bytes(b"not weights")
    photo = image(pixels(40, 40))
    with pytest.raises(WeightsError, match="squeezenet1_1"):
        lpips(photo, photo, "squeeze")


def test_lpips_names_its_backbones() -> None:
    pytest.importorskip("lpips")
    photo = image(pixels(40, 40))
    with pytest.raises(WeightsError, match="did you mean squeeze"):
        lpips(photo, photo, "squeezenet")


def test_identity_is_the_cosine_of_the_embeddings() -> None:
    recognizer = tiny.recognizer()
    first, second = tiny.faces_image(2, 64, 0), tiny.faces_image(2, 64, 1)
    here = torch.eye(2, 3).expand(2, 2, 3)
    there = here + torch.tensor([[0, 0, 4.0], [0, 0, 8.0]])
    values = identity(first, second, recognizer, here, there)
    embeddings = [recognizer(first, here), recognizer(second, there)]
    expected = torch.nn.functional.cosine_similarity(*embeddings)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(identity(first, first, recognizer, here), torch.ones(2))
    shared = identity(first, second, recognizer, here)
    torch.testing.assert_close(shared, identity(first, second, recognizer, here, here))
    assert not torch.allclose(shared, values)


# --- the table -----------------------------------------------------------------------------------

SELF_CONTAINED = [
    name
    for name, metric in METRICS.items()
    if "recognizer" not in metric.needs and "lpips" not in metric.needs
]


def measure(metric: Metric, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    for package in metric.needs:
        pytest.importorskip(package)
    return metric.function(first, second)


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_declared_facts_hold(name: str) -> None:
    metric = METRICS[name]
    photos = [pixels(48, 56, seed) for seed in (0, 1, 2)]
    clean = image(*photos)
    near, far = (image(*(moved(photo, levels) for photo in photos)) for levels in (2, 25))
    kept = near.clone()
    same, close, wide = (measure(metric, other, clean) for other in (clean, near, far))
    assert metric.name == name
    assert close.shape == (3,)
    assert close.dtype == torch.float32
    best = metric.high if metric.higher_is_better else metric.low
    assert same.tolist() == pytest.approx([best] * 3)
    for values in (same, close, wide):
        assert ((values >= metric.low) & (values <= metric.high)).all()
    better = close > wide if metric.higher_is_better else close < wide
    assert better.all()
    singles = [measure(metric, a[None], b[None]) for a, b in zip(near, clean, strict=True)]
    torch.testing.assert_close(close, torch.cat(singles), atol=1e-5, rtol=1e-5)
    assert torch.equal(near, kept)


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.pair])
def test_signed_and_unequal_images_are_refused(name: str) -> None:
    metric = METRICS[name]
    rest = (tiny.recognizer(), torch.eye(2, 3)[None]) if "recognizer" in metric.needs else ()
    photo = image(pixels(40, 40))
    with pytest.raises(ImageError, match=r"\[0, 1\]"):
        metric.function(photo * 2 - 1, photo, *rest)
    with pytest.raises(ImageError, match="one size"):
        metric.function(photo, photo[..., :39], *rest)


def test_an_unknown_metric_names_its_neighbours() -> None:
    with pytest.raises(UnknownName, match="did you mean psnr"):
        METRICS["pnsr"]
