"""Classical purifiers: the contract, then each against SciPy, scikit-image, OpenCV or by hand."""

import numpy as np
import pytest
import torch
from torch import Tensor

from robustness.purifiers import PURIFIERS, Purifier, PurifierConfig, load
from robustness.purifiers.classical import (
    AdverseCleaner,
    Bilateral,
    BilateralConfig,
    CleanerConfig,
    Gaussian,
    GaussianConfig,
    Median,
    MedianConfig,
    NoiseUpscale,
    NoiseUpscaleConfig,
    RoundTrip,
    RoundTripConfig,
    TotalVariation,
    TotalVariationConfig,
)
from shields.errors import ConfigError, ImageError, UnknownName
from shields.weights import WeightStore
from tests import tiny

CASES: dict[str, Purifier] = {
    "median": Median(),
    "median of 5": Median(MedianConfig(window=5)),
    "bilateral": Bilateral(),
    "gaussian": Gaussian(),
    "adverse-cleaner": AdverseCleaner(CleanerConfig(smoothings=2, guidings=2)),
    "tv": TotalVariation(TotalVariationConfig(steps=10)),
    "noise-upscale": NoiseUpscale(),
    "vae": RoundTrip(tiny.autoencoder()),
}
CPU = torch.device("cpu")


def photos(count: int = 2, height: int = 24, width: int = 33) -> Tensor:
    """Smooth images with some noise, [0, 1]."""
    rng = torch.Generator().manual_seed(3)
    ramp = torch.linspace(0.2, 0.8, width).expand(count, 3, height, width)
    noise = 0.05 * torch.randn(count, 3, height, width, generator=rng)
    return (ramp + noise).clamp(0, 1)


def planes(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) -> (H, W, 3) float."""
    return image[0].permute(1, 2, 0).numpy().astype(np.float64)


# --- contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(24, 33), (16, 16)])
def test_contract(name: str, size: tuple[int, int]) -> None:
    purifier, image = CASES[name], photos(2, *size)
    kept, state = image.clone(), torch.get_rng_state()
    result = purifier.purify(image, seed=5)
    assert result.shape == image.shape
    assert result.dtype == torch.float32
    assert 0 <= float(result.min()) <= float(result.max()) <= 1
    assert not torch.equal(result, image)
    assert torch.equal(result, purifier.purify(image, seed=5)), "one seed, two results"
    singles = torch.cat([purifier.purify(one[None], seed=5) for one in image])
    torch.testing.assert_close(result, singles, atol=1e-5, rtol=0)
    assert torch.equal(image, kept), "the input was changed"
    assert torch.equal(torch.get_rng_state(), state), "global random state was used"


@pytest.mark.parametrize("name", [name for name in CASES if name != "vae"])
def test_a_flat_image_stays_flat(name: str) -> None:
    flat = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(1, 3, 20, 24).contiguous()
    # Noise of 12.75 levels is averaged over some four pixels.
    reach = 0.2 if name == "noise-upscale" else 1e-5
    assert float((CASES[name].purify(flat) - flat).abs().max()) < reach


@pytest.mark.parametrize("name", [name for name in CASES if name != "vae"])
def test_noise_of_a_protection_gets_less(name: str) -> None:
    ramp = torch.linspace(0.2, 0.8, 48).expand(1, 3, 48, 48)
    rng = torch.Generator().manual_seed(0)
    image = ramp + 8 / 255 * torch.randn(1, 3, 48, 48, generator=rng).sign()
    purified = CASES[name].purify(image)
    # Adding noise first costs some of what shrinking averages away.
    left = float((purified - ramp).square().mean() / (image - ramp).square().mean())
    assert left < (1.5 if name == "noise-upscale" else 0.9)


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 8, 8), torch.full((1, 3, 8, 8), -0.1), torch.zeros(1, 4, 8, 8)]
)
def test_what_is_no_image_is_refused(image: Tensor) -> None:
    with pytest.raises(ImageError, match="`image` must"):
        Median().purify(image)


class Broken(Purifier):
    def _purify(self, image: Tensor, rng: torch.Generator) -> Tensor:
        return image / 0 * 0


def test_a_result_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ImageError, match="Broken gave values that are not finite"):
        Broken().purify(photos())


def test_pixels_in_pixels_out() -> None:
    pixels = (photos(1)[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    kept = pixels.copy()
    result = Median().apply(pixels)
    assert result.dtype == np.uint8
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    assert np.array_equal(result, (planes(Median().purify(tensor)) * 255).round())
    assert np.array_equal(pixels, kept)
    noisy = [NoiseUpscale().apply(pixels, seed=seed).tobytes() for seed in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2]


# --- names and settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "config"),
    [
        ("median", Median, MedianConfig()),
        ("median:5", Median, MedianConfig(window=5)),
        ("bilateral:7,sigma_colour=10", Bilateral, BilateralConfig(window=7, sigma_colour=10)),
        ("gaussian:0.7", Gaussian, GaussianConfig(sigma=0.7)),
        ("adverse-cleaner:8", AdverseCleaner, CleanerConfig(smoothings=8)),
        ("tv:0.1:50", TotalVariation, TotalVariationConfig(weight=0.1, steps=50)),
        ("noise-upscale:scale=0.25", NoiseUpscale, NoiseUpscaleConfig(scale=0.25)),
    ],
)
def test_a_purifier_is_loaded_from_text(
    tmp_path, text: str, kind: type[Purifier], config: PurifierConfig
) -> None:
    purifier = load(text, store=WeightStore(tmp_path), device=CPU)
    assert type(purifier) is kind
    assert purifier.config == config
    assert type(config)(**config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("medain", "did you mean median"),
        ("median:4", "must be odd"),
        ("bilateral:4", "must be odd"),
        ("median:size=5", "no setting 'size'"),
        ("tv:0", "must lie in"),
        ("tv:weight=much", "must be a number"),
        ("vae:no-such-network", "no autoencoder is called"),
    ],
)
def test_a_mistake_is_named_with_a_hint(tmp_path, text: str, hint: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=hint):
        load(text, store=WeightStore(tmp_path), device=CPU)


def test_the_table_lists_classical_purifiers_that_are_purifiers() -> None:
    names = ["median", "bilateral", "gaussian", "adverse-cleaner", "tv", "noise-upscale", "vae"]
    assert [name for name in PURIFIERS if name in names] == names
    for name in names:
        assert issubclass(PURIFIERS[name], Purifier)
        assert isinstance(PURIFIERS[name].Config(), PurifierConfig)


# --- each on its own -----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 5])
def test_median_is_scipys(window: int) -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    expected = scipy.median_filter(planes(photos(1)), (window, window, 1), mode="mirror")
    result = planes(Median(MedianConfig(window=window)).purify(photos(1)))
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_median_takes_a_lone_pixel_away() -> None:
    image = torch.zeros(1, 3, 9, 9)
    image[..., 4, 4] = 1
    assert float(Median().purify(image).abs().max()) == 0


def test_gaussian_is_scipys() -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    expected = scipy.gaussian_filter(
        planes(photos(1)), (1.0, 1.0, 0), mode="mirror", radius=(3, 3, 0)
    )
    np.testing.assert_allclose(planes(Gaussian().purify(photos(1))), expected, atol=1e-5)


@pytest.mark.parametrize(("colour", "space"), [(8.0, 8.0), (40.0, 2.0)])
def test_bilateral_is_opencvs(colour: float, space: float) -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = (planes(photos(1)) * 255).round().astype(np.uint8)
    expected = cv2.bilateralFilter(pixels, 5, colour, space, borderType=cv2.BORDER_REFLECT_101)
    config = BilateralConfig(window=5, sigma_colour=colour, sigma_space=space)
    result = Bilateral(config).apply(pixels)
    assert int(np.abs(result.astype(int) - expected).max()) <= 1


def test_bilateral_keeps_an_edge_that_a_gaussian_blurs() -> None:
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    torch.testing.assert_close(Bilateral().purify(image), image, atol=1e-6, rtol=0)
    assert float((Gaussian().purify(image) - image).abs().max()) > 0.2


def test_total_variation_is_scikit_images() -> None:
    restoration = pytest.importorskip("skimage.restoration")
    # There the first of the iterations does nothing yet.
    expected = restoration.denoise_tv_chambolle(
        planes(photos(1)), weight=0.1, eps=0, max_num_iter=31, channel_axis=-1
    )
    config = TotalVariationConfig(weight=0.1, steps=30)
    np.testing.assert_allclose(
        planes(TotalVariation(config).purify(photos(1))), expected, atol=1e-5
    )


def test_total_variation_of_a_step_has_a_closed_form() -> None:
    """In one dimension a step between two halves of n pixels shrinks by weight / n on each side."""
    image = torch.zeros(1, 3, 16, 16)
    image[..., :8], image[..., 8:] = 0.2, 0.8
    config = TotalVariationConfig(weight=0.4, steps=3000)
    result = TotalVariation(config).purify(image)
    torch.testing.assert_close(result[..., :8], torch.full((1, 3, 16, 8), 0.25), atol=2e-3, rtol=0)
    torch.testing.assert_close(result[..., 8:], torch.full((1, 3, 16, 8), 0.75), atol=2e-3, rtol=0)


def test_noise_upscale_without_noise_is_pillows_half_and_back() -> None:
    from robustness.attacks import parse

    pixels = (planes(photos(1, 32, 48)) * 255).round().astype(np.uint8)
    result = NoiseUpscale(NoiseUpscaleConfig(levels=0.0)).apply(pixels)
    expected = parse("resize:0.5,restore=true").apply(pixels)
    assert int(np.abs(result.astype(int) - expected).max()) <= 2


def test_noise_upscale_draws_noise_of_the_levels_asked_for() -> None:
    flat = torch.full((1, 3, 64, 64), 0.5)
    config = NoiseUpscaleConfig(levels=10.0, scale=1.0)
    noise = (NoiseUpscale(config).purify(flat, seed=2) - flat) * 255
    assert float(noise.std()) == pytest.approx(10, rel=0.05)


def test_cleaner_without_guiding_is_the_bilateral_filter_again_and_again() -> None:
    once = Bilateral(BilateralConfig(window=5, sigma_colour=8, sigma_space=8))
    expected = once.purify(once.purify(photos()))
    result = AdverseCleaner(CleanerConfig(smoothings=2, guidings=0)).purify(photos())
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_guided_filter_solves_a_ridge_regression_in_every_window() -> None:
    image = photos(1, 18, 18)
    smooth = planes(Bilateral(BilateralConfig(window=5, sigma_colour=8, sigma_space=8)).purify(
        image))  # fmt: skip
    guide, radius = planes(image), 4
    maps = np.zeros((18, 18, 4, 3))
    for row, column in np.ndindex(18, 18):
        if not (radius <= row < 18 - radius and radius <= column < 18 - radius):
            continue
        rows, columns = slice(row - radius, row + radius + 1), slice(column - 4, column + 5)
        known = guide[rows, columns].reshape(-1, 3)
        known_mean, wanted = known.mean(0), smooth[rows, columns].reshape(-1, 3)
        own = np.cov(known.T, bias=True) + 16 / 255**2 * np.eye(3)
        both = (known - known_mean).T @ (wanted - wanted.mean(0)) / len(known)
        slopes = np.linalg.solve(own, both)
        maps[row, column] = np.vstack([slopes, wanted.mean(0) - known_mean @ slopes])
    # Only the middle four pixels see windows that no border touches.
    result = planes(AdverseCleaner(CleanerConfig(smoothings=1, guidings=1)).purify(image))
    for row, column in ((8, 8), (8, 9), (9, 8), (9, 9)):
        averaged = maps[row - 4 : row + 5, column - 4 : column + 5].mean(axis=(0, 1))
        expected = np.append(guide[row, column], 1) @ averaged
        np.testing.assert_allclose(result[row, column], expected, atol=1e-5)


def test_round_trip_is_the_autoencoders() -> None:
    network = tiny.autoencoder(2)
    image = photos(2, 21, 30)
    assert torch.equal(RoundTrip(network).purify(image), network.reconstruct(image))


def test_round_trip_loads_any_registered_autoencoder(weights) -> None:
    purifier = load("vae:small-ae", store=WeightStore(weights), device=CPU)
    assert isinstance(purifier, RoundTrip)
    assert purifier.config == RoundTripConfig(autoencoder="small-ae")
    assert purifier.autoencoder.name == "small-ae"
    assert torch.equal(purifier.purify(photos()), RoundTrip(tiny.autoencoder(1)).purify(photos()))


def test_gradients_pass_where_a_protector_could_use_them() -> None:
    image = photos(1).requires_grad_(True)
    purified = RoundTrip(tiny.autoencoder()).purify(image)
    (gradient,) = torch.autograd.grad(purified.sum(), image)
    assert float(gradient.abs().max()) > 0
