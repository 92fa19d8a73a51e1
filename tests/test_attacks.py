"""Attacks: one contract for all, the text that names them, and real codecs called by hand."""

import importlib.util
import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image as PillowImage

from robustness.attacks import ATTACKS, Attack, Chain, Jpeg, Nothing, Resize, families, parse
from robustness.platforms import _QUALITIES, Platform
from shields.errors import ConfigError, ImageError, MissingPackage, UnknownName
from tests.photos import NOISE, smooth

LANCZOS = PillowImage.Resampling.LANCZOS
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
#: every registered attack, and some with settings
TEXTS = [
    *ATTACKS,
    "jpeg:30,subsampling=4:4:4",
    "resize:512",
    "resize:1.5,kernel=hamming,restore=true",
    "cr:60,restore=true",
    "blur:0,window=7",
    "contrast:0.35,about=black",
    "drop:0.5,fill=black",
    "crop:0.5,restore=true",
    "screenshot:2,quality=0",
    "facebook:20,quality=92",
    "jpeg:75+resize:0.5+rotate:5",
]
RUNNABLE = [text for text in TEXTS if HAS_HEIF or text != "heic"]


def picture(height: int = 37, width: int = 53) -> np.ndarray:
    """A smooth picture with some grain, so that codecs and filters have something to lose."""
    grain = np.random.default_rng(1).integers(-20, 21, (height, width, 3))
    return (smooth(height, width) + grain).clip(0, 255).astype(np.uint8)


def by_hand(pixels: np.ndarray, codec: str, **options: object) -> np.ndarray:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, codec, **options)
    return np.asarray(PillowImage.open(file).convert("RGB"))


def halved(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return np.asarray(PillowImage.fromarray(pixels).resize((width // 2, height // 2), LANCZOS))


# --- contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", RUNNABLE)
@pytest.mark.parametrize("size", [(48, 64), (37, 53)])
def test_contract(text: str, size: tuple[int, int]) -> None:
    attack, pixels = parse(text), picture(*size)
    assert isinstance(attack, Attack)
    kept, state = pixels.copy(), np.random.get_state()[1].copy()  # noqa: NPY002  it must not move
    results = [attack.apply(pixels, seed=seed) for seed in (0, 0, 7)]
    for result in results:
        assert result.dtype == np.uint8
        assert result.ndim == 3
        assert result.shape[2] == 3
        assert result.flags.c_contiguous
        assert not np.shares_memory(result, pixels)
    assert np.array_equal(results[0], results[1]), "one seed, two results"
    assert np.array_equal(pixels, kept), "the input was changed"
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.parametrize("text", RUNNABLE)
def test_read_only_pixels_will_do(text: str) -> None:
    pixels = picture()
    pixels.flags.writeable = False
    assert parse(text).apply(pixels).flags.writeable


@pytest.mark.parametrize("text", [text for text in RUNNABLE if text not in {"none", "x"}])
def test_an_attack_changes_the_photo(text: str) -> None:
    pixels = picture()
    assert not np.array_equal(parse(text).apply(pixels), pixels)


@pytest.mark.parametrize("text", ["rotate", "crop", "jitter", "drop", "screenshot", "osn"])
def test_what_is_drawn_depends_on_the_seed(text: str) -> None:
    results = [parse(text).apply(picture(), seed=seed).tobytes() for seed in range(6)]
    assert len(set(results)) > 2


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        "photo.png",
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_what_is_no_photo_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"must be \(H, W, 3\) uint8"):
        Nothing().apply(pixels)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_attack_are_one(text: str) -> None:
    attack = parse(text)
    assert parse(str(attack)) == attack
    assert str(parse(str(attack))) == str(attack)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_entry_carries_its_name_and_says_what_it_does(name: str) -> None:
    kind = ATTACKS[name]
    assert kind.name == name
    assert issubclass(kind, Attack)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("jpeg", "jpeg:75"),
        ("jpeg:60:4:4:4", "jpeg:60,subsampling=4:4:4"),
        ("jpeg:subsampling=4:2:2", "jpeg:75,subsampling=4:2:2"),
        ("resize:0.5:bicubic:true", "resize:0.5,kernel=bicubic,restore=true"),
        (" jpeg:75 + resize:0.50 ", "jpeg:75+resize:0.5"),
        ("resize:512", "resize:512"),
        ("none", "none"),
    ],
)
def test_short_forms_are_written_out(text: str, same: str) -> None:
    assert str(parse(text)) == same


def test_a_chain_is_written_as_it_is_read() -> None:
    chain = parse("jpeg:75+resize:0.5")
    assert chain == Chain((Jpeg(quality=75), Resize(size=0.5)))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("jpg:75", "did you mean jpeg"),
        ("jpeg:75+resise:0.5", "did you mean resize"),
        ("jpeg:qualty=75", "did you mean quality"),
        ("jpeg:75,4:4:4", "which setting is '4:4:4'"),
        ("jpeg:75,quality=60", "twice"),
        ("jpeg:high", "must be a whole number, got 'high'"),
        ("jpeg:0", r"must lie in \[1, 100\], got 0"),
        ("jpeg:75:4:1:1", "cannot be '4:1:1'; did you mean 4:4:4 or 4:2:2"),
        ("resize:0.5,kernel=lanczo", "did you mean lanczos"),
        ("resize:nan", "must lie in"),
        ("resize:0.5,restore=yes", "must be true or false"),
        ("none:1", "it has none"),
        ("osn:quality=80", "it has none"),
        ("blur:1.5,window=4", "must be odd"),
        ("", "is missing"),
        ("jpeg:75++resize", "is missing"),
    ],
)
def test_a_mistake_is_named_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=hint):
        parse(text)


@pytest.mark.parametrize(
    "settings",
    [{"quality": 75.5}, {"quality": True}, {"quality": "75"}, {"quality": 101}],
    ids=str,
)
def test_settings_are_checked_in_code_too(settings: dict) -> None:
    with pytest.raises(ConfigError, match="quality"):
        Jpeg(**settings)


def test_a_chain_needs_a_member() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Chain(())


# --- codecs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4"])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_is_pillows(quality: int, subsampling: str) -> None:
    expected = by_hand(NOISE, "JPEG", quality=quality, subsampling=subsampling)
    result = parse(f"jpeg:{quality}:{subsampling}").apply(NOISE)
    assert np.array_equal(result, expected)


def test_jpeg_is_opencvs() -> None:
    cv2 = pytest.importorskip("cv2")
    file = cv2.imencode(".jpg", picture()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    expected = cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(parse("jpeg").apply(picture()), expected)


def test_webp_and_avif_are_pillows() -> None:
    pixels = picture(64, 48)
    assert np.array_equal(parse("webp:60").apply(pixels), by_hand(pixels, "WEBP", quality=60))
    assert np.array_equal(parse("avif:60").apply(pixels), by_hand(pixels, "AVIF", quality=60))


@pytest.mark.parametrize("codec", ["jpeg", "webp", "avif"])
def test_a_lower_quality_loses_more(codec: str) -> None:
    pixels = picture(64, 64)
    losses = [
        float(np.square(parse(f"{codec}:{quality}").apply(pixels).astype(float) - pixels).mean())
        for quality in (95, 60, 20)
    ]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.skipif(HAS_HEIF, reason="pillow-heif is installed")
def test_heic_without_its_package_says_what_to_install() -> None:
    with pytest.raises(MissingPackage, match=r"'heic' needs .* pip install 'shields\[heic\]'"):
        parse("heic").apply(picture())


@pytest.mark.skipif(not HAS_HEIF, reason="pillow-heif is not installed")
def test_heic_loses_a_little() -> None:
    pixels = picture(64, 64)
    gap = np.abs(parse("heic:75").apply(pixels).astype(float) - pixels)
    assert 0 < gap.mean() < 12


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["lanczos", "bicubic", "bilinear", "hamming", "box", "nearest"])
def test_resize_is_pillows_and_restores_by_the_same_kernel(kernel: str) -> None:
    pixels = picture(40, 64)
    way = PillowImage.Resampling[kernel.upper()]
    small = PillowImage.fromarray(pixels).resize((32, 20), way)
    assert np.array_equal(parse(f"resize:0.5:{kernel}").apply(pixels), np.asarray(small))
    back = np.asarray(small.resize((64, 40), way))
    assert np.array_equal(parse(f"resize:0.5:{kernel}:true").apply(pixels), back)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("resize:0.5", (100, 66)),
        ("resize:0.333333333333", (67, 44)),
        ("resize:2", (402, 266)),
        ("resize:100", (100, 66)),
        ("resize:402", (402, 266)),
        ("resize:0.01", (16, 16)),
        ("resize:0.5,restore=true", (201, 133)),
        ("cr", (100, 66)),
        ("cr:restore=true", (201, 133)),
        ("crop:0.5", (100, 66)),
        ("crop:0.5,restore=true", (201, 133)),
        ("downscale:3", (201, 133)),
        ("rotate:45", (201, 133)),
        ("screenshot:0.5", (99, 65)),
    ],
)
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse(text).apply(np.zeros((201, 133, 3), np.uint8)).shape[:2] == size


def test_cr_is_jpeg_then_half_and_the_order_matters() -> None:
    pixels = picture(64, 48)
    expected = halved(by_hand(pixels, "JPEG", quality=75))
    assert np.array_equal(parse("cr").apply(pixels), expected)
    assert np.array_equal(parse("jpeg:75+resize:0.5").apply(pixels), expected)
    other = by_hand(halved(pixels), "JPEG", quality=75)
    assert np.array_equal(parse("resize:0.5+jpeg:75").apply(pixels), other)
    assert not np.array_equal(other, expected)


def test_members_of_a_chain_draw_for_themselves() -> None:
    pixels = np.full((64, 64, 3), 200, np.uint8)
    lost = [
        parse("drop:0.5,fill=black" + "+drop:0.5,fill=black" * more).apply(pixels)[..., 0] == 0
        for more in (0, 1)
    ]
    assert lost[0].mean() == pytest.approx(0.5, abs=0.05)
    assert lost[1].mean() == pytest.approx(0.75, abs=0.05)


# --- families ------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["own", "deeperforensics"])
def test_families_have_five_levels_that_hurt_more_and_more(levels: str) -> None:
    table = families(levels)
    assert list(table) == ["saturation", "contrast", "drop", "blur", "downscale", "jpeg"]
    pixels = picture(96, 96)
    for attacks in table.values():
        assert len(attacks) == 5
        gaps = [
            float(np.square(attack.apply(pixels).astype(float) - pixels).mean())
            for attack in attacks
        ]
        assert all(weak < strong for weak, strong in pairwise(gaps))
        assert [parse(str(attack)) for attack in attacks] == list(attacks)


def test_families_of_nobody_are_refused() -> None:
    with pytest.raises(ConfigError, match="own, deeperforensics"):
        families("paper")


# --- platforms -----------------------------------------------------------------------------------

PLATFORMS = [name for name in ATTACKS if issubclass(ATTACKS[name], Platform)]


@pytest.mark.parametrize("name", PLATFORMS)
@pytest.mark.parametrize("size", [(30, 50), (50, 30)])
def test_a_platform_bounds_its_side_and_keeps_the_shape(name: str, size: tuple[int, int]) -> None:
    attack = parse(f"{name}:40,spared=0")
    height, width = attack.apply(picture(*size)).shape[:2]
    if attack.limited == "width":
        assert width == min(size[1], 40)
    else:
        assert max(height, width) == 40
    assert height / width == pytest.approx(size[0] / size[1], rel=0.05)


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_platform_is_pillow_by_hand(name: str) -> None:
    attack = parse(f"{name}:64,spared=0")
    pixels = picture(64, 128)
    small = np.asarray(PillowImage.fromarray(pixels).resize((64, 32), LANCZOS))
    options = {"quality": attack.quality, "subsampling": attack.subsampling}
    assert np.array_equal(attack.apply(pixels), by_hand(small, "JPEG", **options))
    kept = by_hand(pixels[:, :64], "JPEG", **options)
    assert np.array_equal(attack.apply(pixels[:, :64]), kept), "below the limit nothing shrinks"


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_preset_says_that_it_is_a_report(name: str) -> None:
    words = str(ATTACKS[name].__doc__)
    assert "as reported" in words or "commonly stated" in words
    assert str(ATTACKS[name]().quality) in words
    assert ATTACKS[name]().side > 0
    assert str(ATTACKS[name]().side) in words


def test_x_leaves_small_photos_alone() -> None:
    small, large = picture(900, 8), picture(901, 8)
    assert np.array_equal(parse("x").apply(small), small)
    assert np.array_equal(parse("x").apply(large), by_hand(large, "JPEG", quality=85))


def test_osn_draws_the_published_qualities() -> None:
    assert sum(_QUALITIES.values()) == pytest.approx(1, abs=1e-9)
    pixels = picture(16, 16)
    known = {by_hand(pixels, "JPEG", quality=q).tobytes(): q for q in _QUALITIES}
    assert len(known) == len(_QUALITIES), "too small a picture to tell qualities apart"
    draws = 300
    seen = [known[parse("osn").apply(pixels, seed=seed).tobytes()] for seed in range(draws)]
    for quality in (80, 85, 92, 100):
        share = _QUALITIES[quality]
        spread = (share * (1 - share) / draws) ** 0.5
        assert abs(seen.count(quality) / draws - share) < 4 * spread
