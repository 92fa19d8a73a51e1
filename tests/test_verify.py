"""The verdict on saved files, held against independent computations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import shields
from shields.budget import Budget
from shields.errors import ImageError
from shields.faces import Placement, crop
from shields.metrics import photo_ssim
from shields.photo import read
from shields.protectors.base import Protector, ProtectorConfig
from shields.shield import Region
from shields.types import Mask, Perturbation, Progress
from shields.verify import verify
from tests import tiny


class Brightness(Protector):
    """Its objective is the mean of the image under the mask."""

    Config = ProtectorConfig

    def perturb(
        self,
        image: torch.Tensor,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: torch.Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        return self.config.budget.epsilon * mask.expand_as(image)

    def evaluate(
        self,
        clean: torch.Tensor,
        protected: torch.Tensor,
        mask: Mask,
        *,
        landmarks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return protected.mean(dim=(1, 2, 3))


def saved(path: Path, pixels: np.ndarray) -> Path:
    """Save pixels, the format taken from the suffix."""
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pixels() -> np.ndarray:
    """A smooth photo of an odd size, 147 x 210."""
    image = tiny.faces_image(1, 147, seed=3, width=210)
    array = (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array)


@pytest.fixture
def changed(pixels: np.ndarray) -> np.ndarray:
    """The same with a change of up to 8 levels in a rectangle of 100 x 80 at (40, 30)."""
    result = pixels.astype(np.int16)
    noise = np.random.default_rng(0).integers(-8, 9, (80, 100, 3))
    result[30:110, 40:140] += noise
    return np.clip(result, 0, 255).astype(np.uint8)


REGION = Region(placement=Placement(40, 30, 100, 80, size=(80, 96)))


def test_a_good_result_is_called_good(
    tmp_path: Path, pixels: np.ndarray, changed: np.ndarray
) -> None:
    files = saved(tmp_path / "a.png", pixels), saved(tmp_path / "b.png", changed)
    report = verify(*files, Budget(levels=8), regions=[REGION])
    assert report.ok
    assert (report.largest_change, report.outside_change, report.allowed_change) == (8, 0, 8)
    assert report.psnr == pytest.approx(peak_signal_noise_ratio(pixels, changed))
    assert 0 < report.changed_share < 80 * 100 / (147 * 210) + 1e-9
    inner = peak_signal_noise_ratio(pixels[30:110, 40:140], changed[30:110, 40:140])
    assert report.regions[0].psnr == pytest.approx(inner)
    assert report.ssim == pytest.approx(photo_ssim(pixels, changed), abs=1e-6)
    assert report.regions[0].ssim is not None
    assert report.regions[0].ssim < report.ssim < 1
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("place", [(0, 0), (146, 209), (70, 100), (5, 204)])
def test_similarity_counts_a_change_wherever_it_is(
    tmp_path: Path, pixels: np.ndarray, place: tuple[int, int]
) -> None:
    other = pixels.copy()
    other[place] ^= 63
    files = saved(tmp_path / "a.png", pixels), saved(tmp_path / "b.png", other)
    similarity = verify(*files, Budget(levels=255)).ssim
    assert similarity is not None
    assert 1 - similarity == pytest.approx(1 - photo_ssim(pixels, other), rel=0.02)


@pytest.mark.parametrize(("levels", "good"), [(8.0, True), (7.99, False), (4.0, False)])
def test_one_level_over_the_budget_is_seen(
    tmp_path: Path, pixels: np.ndarray, changed: np.ndarray, levels: float, good: bool
) -> None:
    files = saved(tmp_path / "a.png", pixels), saved(tmp_path / "b.png", changed)
    report = verify(*files, Budget(levels=levels))
    assert report.ok is report.within_budget is good
    assert good or "moved by 8 levels" in report.problems[0]


def test_a_single_pixel_outside_the_regions_is_seen(
    tmp_path: Path, pixels: np.ndarray, changed: np.ndarray
) -> None:
    changed[146, 209, 1] ^= 1
    files = saved(tmp_path / "a.png", pixels), saved(tmp_path / "b.png", changed)
    report = verify(*files, Budget(), regions=[REGION])
    assert report.outside_change == 1
    assert not report.ok
    assert verify(*files, Budget()).outside_change is None


def test_equal_photos_have_no_psnr_and_full_similarity(tmp_path: Path, pixels: np.ndarray) -> None:
    path = saved(tmp_path / "a.png", pixels)
    report = verify(path, path, Budget(levels=0))
    assert report.ok
    assert (report.largest_change, report.psnr) == (0, None)
    assert report.ssim == pytest.approx(1)


def test_a_resized_photo_is_judged_bad(tmp_path: Path, pixels: np.ndarray) -> None:
    files = saved(tmp_path / "a.png", pixels), saved(tmp_path / "b.png", pixels[:-1])
    report = verify(*files, Budget(levels=255))
    assert not report.ok
    assert not report.same_size
    assert "210x147" in report.problems[0]
    assert "210x146" in report.problems[0]
    json.dumps(report.to_dict(), allow_nan=False)


def test_lost_transparency_is_seen(tmp_path: Path, pixels: np.ndarray) -> None:
    alpha = np.full(pixels.shape[:2], 255, dtype=np.uint8)
    alpha[:20] = 7
    original = saved(tmp_path / "a.png", np.dstack([pixels, alpha]))
    kept = saved(tmp_path / "b.png", np.dstack([pixels, alpha]))
    lost = saved(tmp_path / "c.png", pixels)
    assert verify(original, kept, Budget()).ok
    assert "transparency" in verify(original, lost, Budget()).problems[0]


def test_the_objective_is_measured_on_what_was_saved(
    tmp_path: Path, pixels: np.ndarray, changed: np.ndarray
) -> None:
    files = saved(tmp_path / "a.png", pixels), saved(tmp_path / "b.png", changed)
    report = verify(*files, Budget(), regions=[REGION], protector=Brightness())
    before, after = (float(crop(read(file), REGION.placement, "cpu")[0].mean()) for file in files)
    assert before != after
    assert report.objective_before == pytest.approx(before)
    assert report.objective_after == pytest.approx(after)


def test_a_perceptual_network_is_used_where_there_is_one(
    tmp_path: Path, pixels: np.ndarray, changed: np.ndarray
) -> None:
    files = saved(tmp_path / "a.png", pixels), saved(tmp_path / "b.png", changed)
    network = tiny.perceptual()
    report = verify(*files, Budget(), regions=[REGION], perceptual=network)
    crops = [crop(read(file), REGION.placement, "cpu")[0] for file in files]
    assert report.lpips == pytest.approx(float(network(*crops)))
    assert report.lpips > 0
    assert verify(*files, Budget(), regions=[REGION]).lpips_missing


def test_what_was_not_measured_has_a_reason(tmp_path: Path, pixels: np.ndarray) -> None:
    path = saved(tmp_path / "a.png", pixels)
    assert "regions" in str(verify(path, path, Budget()).objective_missing)
    unknown = verify(path, path, Budget(), regions=[REGION])
    assert "protector" in str(unknown.objective_missing)


@pytest.mark.parametrize(
    ("name", "options", "lossy"),
    [
        ("b.png", {}, False),
        ("b.webp", {"lossless": True}, False),
        ("b.webp", {"lossless": True, "icc_profile": b"x" * 13}, False),
        ("b.webp", {"quality": 90}, True),
        ("b.jpg", {"quality": 95}, True),
    ],
)
def test_lossy_formats_are_told_from_lossless_ones(
    tmp_path: Path, pixels: np.ndarray, name: str, options: dict[str, object], lossy: bool
) -> None:
    original = saved(tmp_path / "a.png", pixels)
    Image.fromarray(pixels).save(tmp_path / name, **options)
    report = verify(original, tmp_path / name, Budget(levels=0))
    assert report.lossy is lossy
    assert report.ok is not lossy
    if lossy:
        assert "PNG keeps them" in report.problems[0]


def test_an_unreadable_file_is_an_error(tmp_path: Path, pixels: np.ndarray) -> None:
    original = saved(tmp_path / "a.png", pixels)
    broken = tmp_path / "b.png"
    broken.write_bytes(original.read_bytes()[:200])
    with pytest.raises(ImageError):
        verify(original, broken, Budget())


def test_the_front_door_offers_the_function_not_its_module() -> None:
    assert shields.verify is verify
