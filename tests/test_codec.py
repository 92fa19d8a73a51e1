"""JPEG and resampling against the real codec and Pillow; what is soft is the gradient alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from torch.nn import functional

from shields import codec
from shields.codec import carry, real_jpeg, soft_jpeg
from shields.transforms import CompressResize, Crop, Jpeg, Resize, resize
from tests.tiny import faces_image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photo(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth images with some noise, levels k / 255: codecs find something to do."""
    noise = torch.randn(batch, 3, height, width, generator=generator(seed)) * 0.03
    smooth = faces_image(batch, height, seed, width=width)
    return ((smooth + noise).clamp(0, 1) * 255).round() / 255


def to_pixels(image: torch.Tensor) -> list[np.ndarray]:
    return list((image * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def from_pixels(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def astronaut() -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    return from_pixels(data.astronaut())


def decibels(image: torch.Tensor, other: torch.Tensor) -> float:
    """PSNR of what would be saved: the image rounded to 8 bits."""
    rounded = (image * 255).round() / 255
    return float(-10 * torch.log10((rounded - other).square().mean()))


# --- JPEG ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [60, 75, 90])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("size", [(64, 48), (37, 53)])
def test_jpeg_is_the_codec_bit_for_bit(quality, subsampling, size) -> None:
    image = photo(3, *size) + 0.3 / 255  # off the 8-bit grid: rounding is part of it
    expected = []
    for pixels in to_pixels(image):
        file = io.BytesIO()
        PillowImage.fromarray(pixels).save(
            file, "JPEG", quality=quality, subsampling=0 if subsampling == "4:4:4" else 2
        )
        expected.append(from_pixels(np.asarray(PillowImage.open(file))))
    for gradient in ("straight", "soft"):
        transform = Jpeg(subsampling=subsampling, gradient=gradient)
        result = transform.apply(image.requires_grad_(True), quality=quality)
        assert torch.equal(result.detach(), torch.cat(expected))


# torchvision hands its codecs over to another package; while it has them they must agree.
@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize("quality", [60, 75, 90])
def test_jpeg_equals_torchvision(quality: int) -> None:
    io_module = pytest.importorskip("torchvision.io")
    image = photo(1, 45, 61)
    stream = io_module.encode_jpeg((image[0] * 255).round().to(torch.uint8), quality=quality)
    expected = io_module.decode_jpeg(stream).float()[None] / 255
    assert torch.equal(Jpeg().apply(image, quality=quality), expected)


def test_straight_gradient_is_that_of_the_identity() -> None:
    image = photo(2, 32, 32).requires_grad_(True)
    weights = torch.randn(image.shape, generator=generator())
    result = Jpeg(gradient="straight").apply(image, quality=50)
    (gradient,) = torch.autograd.grad((result * weights).sum(), image)
    assert torch.equal(gradient, weights)


def test_soft_gradient_is_kornias() -> None:
    enhance = pytest.importorskip("kornia.enhance")
    image = photo(2, 40, 32).requires_grad_(True)
    weights = torch.randn(image.shape, generator=generator())
    result = Jpeg(gradient="soft").apply(image, quality=75)
    (gradient,) = torch.autograd.grad((result * weights).sum(), image)
    soft = enhance.jpeg_codec_differentiable(image, torch.tensor([75.0]))
    (expected,) = torch.autograd.grad((soft * weights).sum(), image)
    assert torch.equal(gradient, expected)
    assert float((gradient != 0).float().mean()) > 0.95


def test_soft_jpeg_without_subsampling_is_near_the_codec(astronaut) -> None:
    image = astronaut[..., 100:229, 150:281]
    gap = (soft_jpeg(image, 75, "4:4:4") - real_jpeg(image, 75, "4:4:4")).abs().mean() * 255
    change = (image - real_jpeg(image, 75, "4:4:4")).abs().mean() * 255
    assert float(gap) < 1.3 < float(change)


def test_soft_jpeg_without_subsampling_derives_correctly() -> None:
    image = (0.2 + 0.6 * torch.rand(1, 3, 8, 8, generator=generator())).double()
    image.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda view: soft_jpeg(view, 98, "4:4:4"), (image,), eps=1e-7, atol=1e-3
    )


def test_whole_qualities_are_drawn_up_to_both_ends() -> None:
    rng = generator()
    drawn = [Jpeg(quality=(60, 63)).draw(rng)["quality"] for _ in range(200)]
    assert set(drawn) == {60, 61, 62, 63}


def test_carry_keeps_the_bits() -> None:
    value = torch.rand(1000, generator=generator())
    carrier = torch.rand(1000, generator=generator(1)).requires_grad_(True)
    result = carry(value, carrier * 3)
    assert torch.equal(result.detach(), value)
    (gradient,) = torch.autograd.grad(result.sum(), carrier)
    assert torch.equal(gradient, torch.full_like(value, 3))


@pytest.mark.parametrize(
    ("quality", "expected"),
    [(95, 38.28), (90, 36.69), (75, 34.00), (60, 32.71), (30, 30.54), (10, 26.84)],
)
def test_jpeg_on_astronaut(astronaut, quality: int, expected: float) -> None:
    assert decibels(Jpeg().apply(astronaut, quality=quality), astronaut) == pytest.approx(
        expected, abs=0.05
    )


# --- resampling ----------------------------------------------------------------------------------


def rounded(image: torch.Tensor) -> torch.Tensor:
    return (image.clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize("size", [(48, 64), (64, 96), (37, 53), (150, 210)])
def test_lanczos_is_pillows_to_one_level(size) -> None:
    image = photo(1, 97, 131)
    expected = PillowImage.fromarray(to_pixels(image)[0]).resize(
        size[::-1], PillowImage.Resampling.LANCZOS
    )
    across = rounded(resize(image, (97, size[1])))
    result = rounded(resize(across, size))
    assert float((result - from_pixels(np.asarray(expected))).abs().max()) * 255 < 1.01


@pytest.mark.parametrize("size", [(20, 40), (97, 60), (120, 150)])
def test_lanczos_matrices_equal_torchs_own(size) -> None:
    if not codec._has_lanczos("cpu"):
        pytest.skip("this torch has no Lanczos of its own")
    image = photo(2, 61, 97).requires_grad_(True)
    weights = torch.randn(2, 3, *size, generator=generator())
    expected = functional.interpolate(image, size=size, mode="lanczos", antialias=True)
    result = resize(image, size)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)
    (gradient,) = torch.autograd.grad((result * weights).sum(), image)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), image)
    # torch's own backward pass is the less exact one: 5e-5 from float64, the matrices 1e-6.
    torch.testing.assert_close(gradient, wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "lanczos"])
def test_resampling_keeps_a_flat_image(kernel) -> None:
    image = torch.full((1, 3, 33, 47), 0.3)
    result = Resize(kernel=kernel).apply(image, scale=0.5)
    torch.testing.assert_close(result, image, atol=1e-6, rtol=0)


def test_sizes_are_rounded_down_to_no_less_than_16_pixels() -> None:
    half = Resize(restore=False)
    assert half.apply(torch.zeros(1, 3, 65, 97), scale=0.5).shape[2:] == (32, 48)
    assert half.apply(torch.zeros(1, 3, 99, 20), scale=1 / 3).shape[2:] == (33, 16)
    assert half.apply(torch.zeros(1, 3, 10, 64), scale=0.5).shape[2:] == (10, 32)


def test_cr_is_jpeg_then_half_size() -> None:
    image = photo(1, 75, 99)
    coded, small = Jpeg().apply(image, quality=75), (37, 49)
    expected = resize(coded, small).clamp(0, 1)
    half = CompressResize(restore=False).apply(image, quality=75, scale=0.5)
    assert torch.equal(half, expected)
    other = Jpeg().apply(resize(image, small).clamp(0, 1), quality=75)
    assert float((half - other).abs().mean()) * 255 > 0.5
    back = CompressResize()(image, generator())
    assert torch.equal(back, resize(half, (75, 99)).clamp(0, 1))


def test_crop_cuts_where_it_is_told() -> None:
    image = photo(1, 64, 96)
    result = Crop().apply(image, share=0.5, left=1.0, top=0.0)
    expected = functional.interpolate(image[..., :32, 48:], size=(64, 96), mode="bilinear")
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert torch.equal(Crop().apply(image, share=1.0), image)
