"""Transforms: one contract for all, published values, and what is peculiar to each."""

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from shields.errors import ConfigError, UnknownName
from shields.transforms import (
    ROBUST,
    TRANSFORMS,
    AffineJitter,
    ColorJitter,
    CompressResize,
    Contrast,
    Drop,
    GaussianBlur,
    Identity,
    Jpeg,
    Noise,
    OneOf,
    Resize,
    Rotate,
    Saturation,
    Sequence,
    Transform,
    parse,
)
from tests.test_codec import decibels, from_pixels, generator, photo, to_pixels
from tests.tiny import faces_image

CASES = {
    **{name: TRANSFORMS[name]() for name in TRANSFORMS},
    "robust": ROBUST,
    "sequence": Sequence(Noise(), Jpeg(quality=(50, 90)), GaussianBlur(sigma=(0.5, 2), window=0)),
    "soft jpeg": Jpeg(quality=(50, 90), gradient="soft"),
    "soft jpeg 4:4:4": Jpeg(gradient="soft", subsampling="4:4:4"),
    "drop, mean": Drop(ratio=0.6, fill="mean"),
    "drop, zero": Drop(fill="zero"),
    "enlarge": Resize(scale=(1.2, 1.8), kernel="bicubic"),
}


@pytest.fixture(scope="module")
def astronaut() -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    return from_pixels(data.astronaut())


# --- contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(2, 48, 64), (1, 37, 53)])
def test_contract(name: str, shape: tuple[int, int, int]) -> None:
    transform, image = CASES[name], photo(*shape)
    assert isinstance(transform, Transform)
    kept, state = image.clone(), torch.get_rng_state()
    for seed in range(3):
        result = transform(image, generator(seed))
        assert result.shape == image.shape
        assert result.dtype == torch.float32
        assert 0 <= float(result.min()) <= float(result.max()) <= 1
        again = transform(image, generator(seed))
        assert torch.equal(result, again), "one seed, two results"
        told = transform.apply(image, **transform.draw(generator(seed)))
        assert torch.equal(result, told), "apply with the drawn strengths differs from a call"
        singles = torch.cat([transform(one[None], generator(seed)) for one in image])
        torch.testing.assert_close(result, singles, atol=1e-6, rtol=0)
    assert torch.equal(image, kept), "the input was changed"
    assert torch.equal(torch.get_rng_state(), state), "global random state was used"


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_finite_and_reaches_every_image(name: str) -> None:
    image = photo(2, 37, 53)
    for seed in range(4):
        variable = image.clone().requires_grad_(True)
        result = CASES[name](variable, generator(seed))
        weights = torch.rand(result.shape, generator=generator(9)) - 0.3
        (gradient,) = torch.autograd.grad((result * weights).sum(), variable)
        assert gradient.isfinite().all()
        assert (gradient.abs().amax(dim=(1, 2, 3)) > 1e-3).all()
        torch.testing.assert_close(result.detach(), CASES[name](image, generator(seed)))


@pytest.mark.parametrize("name", CASES)
def test_range_is_kept_where_it_is_easily_left(name: str) -> None:
    corners = (torch.rand(1, 3, 32, 40, generator=generator()) > 0.5).float()
    for seed in range(3):
        result = CASES[name](corners, generator(seed))
        assert 0 <= float(result.min()) <= float(result.max()) <= 1


@pytest.mark.parametrize("name", [name for name in CASES if name != "identity"])
def test_transform_changes_a_photo(name: str) -> None:
    image = photo(1, 48, 64)
    assert any(not torch.equal(CASES[name](image, generator(seed)), image) for seed in range(5))


# --- published values ----------------------------------------------------------------------------


# The published values have one decimal, so half of one is added to the tolerance.
@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (GaussianBlur(sigma=3 / 6, window=3), 38.6),
        (GaussianBlur(sigma=5 / 6, window=5), 31.1),
        (GaussianBlur(sigma=7 / 6, window=7), 28.5),
        (GaussianBlur(sigma=9 / 6, window=9), 26.8),
        (GaussianBlur(sigma=13 / 6, window=13), 24.6),
        (GaussianBlur(sigma=17 / 6, window=17), 23.1),
        (GaussianBlur(sigma=21 / 6, window=21), 22.0),
        (Resize(scale=1 / 2, kernel="bilinear"), 27.9),
        (Resize(scale=1 / 3, kernel="bilinear"), 25.6),
        (Resize(scale=1 / 4, kernel="bilinear"), 23.9),
        (Resize(scale=1 / 6, kernel="bilinear"), 21.8),
        (Saturation(factor=0.6), 25.8),
        (Saturation(factor=0.4), 22.3),
        (Saturation(factor=0.2), 19.8),
        (Saturation(factor=0.0), 17.9),
        (Contrast(factor=0.85), 26.4),
        (Contrast(factor=0.35), 13.7),
    ],
    ids=repr,
)
def test_other_transforms_on_astronaut(astronaut, transform: Transform, expected: float) -> None:
    assert decibels(transform(astronaut, generator()), astronaut) == pytest.approx(
        expected, abs=0.1
    )


def test_weak_saturation_equals_pillows_chroma_scaled(astronaut) -> None:
    pixels = PillowImage.fromarray(to_pixels(astronaut)[0])
    luma, *chroma = pixels.convert("YCbCr").split()
    scaled = [plane.point([round(128 + 0.8 * (k - 128)) for k in range(256)]) for plane in chroma]
    expected = from_pixels(np.asarray(PillowImage.merge("YCbCr", [luma, *scaled]).convert("RGB")))
    # Three planes are rounded, twice: that is the difference, and why the table says 31.7 dB.
    gap = (Saturation().apply(astronaut, factor=0.8) - expected) * 255
    assert float(gap.abs().max()) < 4
    assert float(gap.square().mean()) < 2
    assert decibels(expected, astronaut) == pytest.approx(31.7, abs=0.1)


# --- the others ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "window"), [(1.5, 5), (0.7, 3), (3.5, 21)])
def test_blur_is_torchvisions(sigma: float, window: int) -> None:
    vision = pytest.importorskip("torchvision.transforms.functional")
    image = photo(2, 37, 53)
    result = GaussianBlur(window=window).apply(image, sigma=sigma)
    expected = vision.gaussian_blur(image, window, sigma)
    torch.testing.assert_close(result, expected, atol=3e-6, rtol=0)


def test_blur_takes_its_window_from_sigma_and_small_images() -> None:
    image = photo(1, 40, 40)
    wide = GaussianBlur(window=0)
    torch.testing.assert_close(
        wide.apply(image, sigma=2.0), GaussianBlur(window=13).apply(image, sigma=2.0)
    )
    assert wide.apply(photo(1, 4, 40), sigma=5.0).shape == (1, 3, 4, 40)


@pytest.mark.parametrize("degrees", [-10.0, 7.0, 90.0])
def test_rotation_is_torchvisions(degrees: float) -> None:
    vision = pytest.importorskip("torchvision.transforms.functional")
    image = photo(1, 40, 56)
    mode = vision.InterpolationMode.BILINEAR
    expected = vision.rotate(image, degrees, interpolation=mode)
    result = Rotate().apply(image, degrees=degrees)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_noise_has_the_strength_asked_for() -> None:
    image = torch.full((2, 3, 64, 64), 0.5)
    noise = (Noise().apply(image, levels=6.0, seed=3) - image) * 255
    assert float(noise.std()) == pytest.approx(6.0, rel=0.03)
    assert abs(float(noise.mean())) < 0.2
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, (Noise().apply(image, levels=6.0, seed=4) - image) * 255)


def test_drop_loses_its_share_of_positions_in_all_channels() -> None:
    image = photo(1, 64, 64).clamp_min(0.05)
    black = Drop(fill="zero").apply(image, ratio=0.3, seed=1) == 0
    assert torch.equal(black.any(dim=1), black.all(dim=1))
    assert float(black.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(Drop().apply(image, ratio=0.0), image)


@pytest.mark.parametrize("fill", ["median", "mean"])
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_drop_fills_from_the_kept_neighbours(fill: str, ratio: float) -> None:
    image = photo(1, 24, 31).clamp_min(0.05)
    lost = (Drop(fill="zero").apply(image, ratio=ratio, seed=2) == 0)[0, 0].numpy()
    result = Drop(fill=fill).apply(image, ratio=ratio, seed=2)[0].numpy()
    source = image[0].numpy()
    for row, column in np.ndindex(24, 31):
        if not lost[row, column]:
            assert np.array_equal(result[:, row, column], source[:, row, column])
            continue
        window = (slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2))
        near = source[(slice(None), *window)][:, ~lost[window]]
        if near.size == 0:
            expected = source[:, ~lost].mean(axis=1)
        elif fill == "mean":
            expected = near.mean(axis=1)
        else:
            expected = np.sort(near, axis=1)[:, (near.shape[1] - 1) // 2]
        assert result[:, row, column] == pytest.approx(expected, abs=1e-5)


def test_drop_sends_no_gradient_to_lost_pixels() -> None:
    image = photo(1, 24, 24).clamp_min(0.05).requires_grad_(True)
    lost = Drop(fill="zero").apply(image.detach(), ratio=0.5, seed=2) == 0
    (gradient,) = torch.autograd.grad(Drop().apply(image, ratio=0.5, seed=2).sum(), image)
    assert (gradient[lost] == 0).all()
    assert (gradient[~lost] >= 1 - 1e-5).all()
    assert float(gradient.sum()) == pytest.approx(image.numel(), rel=1e-4)


def test_affine_jitter_grows_with_sigma_and_vanishes_at_zero() -> None:
    image = photo(1, 64, 64)
    still = AffineJitter().apply(image, sigma=0.0, seed=5)
    torch.testing.assert_close(still, image, atol=1e-5, rtol=0)
    gaps = [
        float((AffineJitter().apply(faces_image(1), sigma=s, seed=5) - faces_image(1)).abs().mean())
        for s in (0.01, 0.02, 0.05)
    ]
    assert 0 < gaps[0] < gaps[1] < gaps[2]


def test_neutral_colours_change_nothing() -> None:
    image = photo(2, 24, 24)
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    torch.testing.assert_close(ColorJitter().apply(image, **neutral), image, atol=1e-5, rtol=0)
    around = ColorJitter().apply(image, **{**neutral, "brightness": 0.5})
    torch.testing.assert_close(around, image / 2, atol=1e-5, rtol=0)


def test_hue_turns_colour_but_keeps_luma_and_grey() -> None:
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    image = 0.4 + 0.1 * faces_image(1)
    turned = ColorJitter().apply(image, **neutral, hue=0.2)
    assert float((turned - image).abs().max()) > 0.01
    torch.testing.assert_close((turned * weights).sum(1), (image * weights).sum(1))
    grey = torch.full((1, 3, 8, 8), 0.4)
    torch.testing.assert_close(ColorJitter().apply(grey, **neutral, hue=0.2), grey)
    back = ColorJitter().apply(turned, **neutral, hue=-0.2)
    torch.testing.assert_close(back, image, atol=1e-5, rtol=0)


# --- composition ---------------------------------------------------------------------------------


def test_sequence_applies_in_order() -> None:
    image = photo(1, 40, 40)
    both = Sequence(Jpeg(quality=60), GaussianBlur(sigma=1.0))
    expected = GaussianBlur().apply(Jpeg().apply(image, quality=60), sigma=1.0)
    assert torch.equal(both(image, generator()), expected)
    assert both.draw(generator()) == {"0.quality": 60, "1.sigma": 1.0}


def test_one_of_draws_by_weight() -> None:
    choice = OneOf(Identity(), Jpeg(), Noise(), weights=(1, 0, 3))
    rng = generator()
    drawn = [int(choice.draw(rng)["member"]) for _ in range(2000)]
    counts = [drawn.count(place) / 2000 for place in range(3)]
    assert counts[1] == 0
    assert counts[2] == pytest.approx(0.75, abs=0.04)


def test_stratified_draws_visit_members_as_often_as_their_weight() -> None:
    choice = OneOf(Identity(), Jpeg(), Noise(), weights=(0.25, 0.5, 0.25))
    for seed in range(20):
        drawn = choice.stratified(4, generator(seed))
        assert [type(member) for member in drawn] == [Identity, Jpeg, Jpeg, Noise]
    rng = generator()
    single = [choice.stratified(1, rng)[0] for _ in range(2000)]
    share = sum(isinstance(member, Jpeg) for member in single) / 2000
    assert share == pytest.approx(0.5, abs=0.04)


def test_robust_leaves_a_quarter_of_the_photos_alone() -> None:
    rng = generator()
    kinds = [type(ROBUST.members[int(ROBUST.draw(rng)["member"])]) for _ in range(2000)]
    assert kinds.count(Identity) / 2000 == pytest.approx(0.25, abs=0.04)
    assert kinds.count(CompressResize) / 2000 > 0.2
    assert set(kinds) == {Identity, Resize, Jpeg, CompressResize, GaussianBlur}


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("jpeg", Jpeg()),
        ("jpeg:75", Jpeg(quality=75)),
        ("jpeg:60..90,gradient=soft", Jpeg(quality=(60, 90), gradient="soft")),
        ("jpeg:80,subsampling=4:4:4", Jpeg(quality=80, subsampling="4:4:4")),
        ("rotate:-10..10", Rotate(degrees=(-10.0, 10.0))),
        ("resize:.5,kernel=bicubic,restore=false", Resize(kernel="bicubic", restore=False)),
        ("blur:1.5,window=7", GaussianBlur(sigma=1.5, window=7)),
        ("jpeg:75+resize:0.5", Sequence(Jpeg(quality=75), Resize(scale=0.5))),
    ],
)
def test_parse(text: str, expected: Transform) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("jpg:75", UnknownName, "did you mean jpeg"),
        ("", UnknownName, "there are: identity, jpeg"),
        ("resize:0.5,kernal=bicubic", ConfigError, "did you mean kernel"),
        ("identity:3", ConfigError, "identity has no setting"),
        ("jpeg:0", ConfigError, r"`quality` of Jpeg must be a number in \[1, 100\]"),
        ("jpeg:high", ConfigError, "got 'high'"),
        ("jpeg:90..60", ConfigError, "or a range"),
        ("jpeg:60..70..80", ConfigError, "or a range"),
        ("blur:nan", ConfigError, "`sigma`"),
        ("blur:1,window=4", ConfigError, "`window` must be 0 or odd"),
        ("resize:0.5,kernel=cubic", ConfigError, "'bicubic'"),
        ("resize:0.5,restore=perhaps", ConfigError, "`restore`"),
        ("jpeg:75+reszie:0.5", UnknownName, "did you mean resize"),
    ],
)
def test_parse_says_what_is_wrong(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(text)


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (2.0, -1.0)])
def test_impossible_weights_are_refused(weights) -> None:
    with pytest.raises(ConfigError, match="`weights` must be 2 numbers"):
        OneOf(Identity(), Jpeg(), weights=weights)
    with pytest.raises(ConfigError):
        OneOf()


def test_true_is_no_strength() -> None:
    with pytest.raises(ConfigError, match="`quality`"):
        Jpeg(quality=True)
