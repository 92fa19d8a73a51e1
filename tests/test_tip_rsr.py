"""TIP-RSR: closed forms, its parts at the ends of every mixture, and the code's steps by Pillow."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors.torch import save_file
from torch import nn

from robustness.attacks import parse
from robustness.purifiers.super_resolution import compressed, enlarged
from robustness.purifiers.tip_rsr import TipRsr, TipRsrConfig, face_mask
from robustness.settings import read_settings
from shields.codec import resize
from shields.errors import ConfigError, WeightsError
from shields.masks import components
from shields.models.parsing import Parser
from shields.models.super_resolution import FaceRestorer
from shields.types import Photo
from shields.weights import WeightStore
from tests import tiny
from tests.cards import write_card
from tests.test_super_resolution import Finder, compact, face, face_restorer, identity, restorer

CPU = torch.device("cpu")
SIZE = 64
#: Pillow rounds between its two passes, and Lanczos back again makes more of it
ROUNDED = 2 / 255
#: so large that the hull about its landmarks covers the whole photo
EVERYWHERE = face(SIZE, stretch=4.0)
BESIDE = face(SIZE, stretch=0.6)


class RedIsSkin(Parser):
    """Calls skin what is red enough, and all else hair."""

    size = 32

    def __init__(self):
        super().__init__((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.layer = nn.Conv2d(3, 19, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.constant_(self.layer.bias, -100.0)
        self.layer.bias.data[17] = 0.5
        self.layer.bias.data[1], self.layer.weight.data[1, 0] = 0.0, 1.0
        self.freeze()

    def _parse(self, image):
        return self.layer(image)


def purifier(finder=None, **settings):
    """TIP-RSR whose networks change nothing."""
    finder = finder or Finder([EVERYWHERE], [EVERYWHERE])
    return TipRsr(TipRsrConfig(**settings), general=identity(), face=identity(), finder=finder)


def photo(count=1, height=SIZE, width=SIZE):
    image = tiny.faces_image(count, height, width=width)
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    return ((image + 0.1 * noise).clamp(0, 1) * 255).round() / 255


def small_and_back(image):
    """The photo after C&R and Lanczos, by the attacks' own code."""
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).numpy()
    half = Photo(pixels=parse("cr:75").apply(pixels)).image()
    return resize(half, tuple(image.shape[2:])).clamp(0, 1)


# --- closed forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("reading", ["transformed", "protected", "printed"])
def test_the_face_is_equation_6_in_each_of_its_readings(reading, blend) -> None:
    image = photo()
    low = small_and_back(image)
    expected = {
        "transformed": low,
        "protected": (1 - blend) * low + blend * image,
        "printed": (low + blend * image).clamp(max=1),
    }[reading]
    made = purifier(reading=reading, blend=blend).parts(image)
    torch.testing.assert_close(made.face, expected, rtol=0, atol=ROUNDED)
    assert float((made.face - expected).abs().mean()) < 0.3 / 255


def test_the_rest_is_equation_7() -> None:
    image, general = photo(2), restorer(4)
    method = TipRsr(general=general, face=identity(), finder=Finder([], []))
    with torch.no_grad():
        expected = resize(compact(4)(image).clamp(0, 1), (SIZE, SIZE)).clamp(0, 1)
        torch.testing.assert_close(method.parts(image).general, expected, rtol=0, atol=1e-5)


def test_equation_8_takes_the_face_by_the_mask() -> None:
    image = photo(2)
    method = purifier(Finder([BESIDE], [BESIDE]), feather=0.05)
    made = method.parts(image)
    assert 0.1 < float(made.mask.mean()) < 0.9
    assert ((made.mask > 0) & (made.mask < 1)).any(), "no soft edge"
    expected = made.mask * made.face + (1 - made.mask) * made.general
    assert torch.equal(method.purify(image), expected.clamp(0, 1))


def test_where_everything_is_face_only_the_face_branch_counts() -> None:
    image = photo()
    method = purifier(feather=0.0)
    assert torch.equal(method.purify(image), method.parts(image).face)
    assert float(method.parts(image).mask.min()) == 1


@pytest.mark.parametrize("variant", ["full", "fused", "general"])
def test_a_photo_without_a_face_is_the_general_branch(variant) -> None:
    image = photo()
    method = purifier(Finder([]), variant=variant)
    assert float(method.parts(image).mask.max()) == 0
    assert torch.equal(method.purify(image), image)


def test_variants_are_the_rows_of_the_papers_ablation() -> None:
    image = photo()
    settings = {"reading": "protected", "blend": 0.5, "feather": 0.0}
    made = {
        name: purifier(Finder([BESIDE]), variant=name, **settings).purify(image)
        for name in ("full", "general", "face", "fused")
    }
    low = small_and_back(image)
    mask = components(torch.tensor(BESIDE.landmarks)[None], (SIZE, SIZE))
    expected = {
        "general": image,
        "face": low,
        "fused": mask * low + (1 - mask) * image,
        "full": mask * (low + image) / 2 + (1 - mask) * image,
    }
    for name, image_of_it in expected.items():
        torch.testing.assert_close(made[name], image_of_it, rtol=0, atol=ROUNDED)


def test_identity_and_a_full_blend_are_compress_and_resize() -> None:
    image = photo(1, 70, 51)
    result = purifier(blend=1.0, variant="full", reading="transformed").parts(image).face
    torch.testing.assert_close(result, small_and_back(image), rtol=0, atol=ROUNDED)


@pytest.mark.parametrize("size", [(3, 5), (16, 200)])
def test_the_smallest_photos_and_strips_keep_their_size(size) -> None:
    image = photo(1, *size)
    method = TipRsr(general=restorer(), face=restorer(4), finder=tiny.detector())
    assert method.purify(image).shape == image.shape


# --- face restorers, masks -----------------------------------------------------------------------


def test_a_face_restorer_sees_the_small_photo_and_its_surroundings_are_enlarged() -> None:
    image, found = photo(), face(SIZE, stretch=0.3)
    settings = TipRsrConfig(variant="face")
    method = TipRsr(settings, general=identity(), face=face_restorer(), finder=Finder([found]))
    result, low = method.purify(image), small_and_back(image)
    torch.testing.assert_close(result[..., 0], low[..., 0], rtol=0, atol=ROUNDED)
    x, y = found.landmarks[2].round().astype(int)
    torch.testing.assert_close(result[..., y, x], 1 - low[..., y, x], rtol=0, atol=0.1)
    background = restorer(2)
    method = TipRsr(settings, general=identity(), face=face_restorer(), background=background,
                    finder=Finder([found]))  # fmt: skip
    expected = enlarged(background, compressed(image, 75, (SIZE // 2, SIZE // 2)), (SIZE, SIZE))
    torch.testing.assert_close(method.purify(image)[..., 0], expected[..., 0])


def test_a_parser_decides_what_belongs_to_a_face_it_is_shown() -> None:
    image = torch.full((2, 3, 96, 96), 0.2)
    image[:, 0, :, :48] = 0.9
    found = face(96, stretch=0.5)
    mask = face_mask(image, [[found], []], RedIsSkin(), radius=0.0)
    assert float(mask[1].max()) == 0
    left, top, right, bottom = found.box
    reach = max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    rows = slice(int(y - reach) + 1, int(y + reach) - 1)
    assert float(mask[0, 0, rows, int(x - reach) + 1 : 46].min()) == 1
    assert float(mask[0, 0, :, 50:].max()) == 0
    assert float(mask[0, 0, : int(y - reach) - 2].abs().sum()) == 0, "beyond what it was shown"


def test_the_hull_of_several_faces_is_the_union_of_their_hulls() -> None:
    image = photo(1, 128, 128)
    found = [face(128, stretch=0.3, shift=shift) for shift in ((-30.0, -30.0), (30.0, 25.0))]
    mask = face_mask(image, [found], None, radius=0.0)
    points = torch.tensor(np.stack([one.landmarks for one in found]))
    expected = components(points, (128, 128)).amax(0, keepdim=True)
    assert torch.equal(mask, expected)
    soft = face_mask(image, [found], None, radius=4.0)
    assert ((soft > 0) & (soft < 1)).any()
    assert float((soft - mask).abs().max()) <= 0.51


def test_a_face_at_the_border_does_not_leave_the_photo() -> None:
    found = face(SIZE, shift=(SIZE * 0.45, -SIZE * 0.4))
    mask = face_mask(photo(), [[found]], RedIsSkin(), radius=1.0)
    assert mask.shape == (1, 1, SIZE, SIZE)


def test_the_shipped_detector_finds_the_face_and_no_other() -> None:
    data = pytest.importorskip("skimage.data")
    pixels = np.ascontiguousarray(data.astronaut()[:256, 96:352])
    image = torch.cat([Photo(pixels=pixels).image(), tiny.faces_image(1, 256)])
    method = purifier(tiny.detector())
    made = method.parts(image)
    assert float(made.mask[0, 0, 110, 128]) == 1
    assert 0.03 < float(made.mask[0].mean()) < 0.3
    assert float(made.mask[1].max()) == 0
    assert torch.equal(method.purify(image)[1], image[1])


# --- what the authors' code does -----------------------------------------------------------------


def through_jpeg(pixels, quality):
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(PillowImage.open(file))


def lanczos(pixels, side):
    return np.asarray(PillowImage.fromarray(pixels).resize((side, side), PillowImage.LANCZOS))


def test_the_code_preset_takes_the_codes_steps() -> None:
    smooth = tiny.faces_image(1, 96, width=64)
    pixels = (smooth[0] * 255).round().byte().permute(1, 2, 0).numpy()
    small = through_jpeg(lanczos(through_jpeg(pixels, 75), 512), 95)
    again = lanczos(small, 1024)
    merged = np.floor(0.8 * through_jpeg(again, 95).astype(float) + 0.2 * again)
    expected = through_jpeg(through_jpeg(merged.astype(np.uint8), 75), 75)
    method = purifier(Finder([face(1024, stretch=4.0)]), preset="code")
    fused = method.purify(smooth)
    assert fused.shape == smooth.shape
    wanted = PillowImage.fromarray(expected).resize((64, 96), PillowImage.LANCZOS)
    gap = fused[0].permute(1, 2, 0).numpy() * 255 - np.asarray(wanted).astype(float)
    # Pillow's rounding between its passes decides for a codec now and then, either way.
    assert np.abs(gap).mean() < 0.8
    assert abs(gap.mean()) < 0.05


def test_the_code_preset_has_a_hard_edge_and_its_own_y() -> None:
    config = TipRsrConfig(preset="code")
    assert (config.reading, config.feather) == ("transformed", 0.0)
    assert TipRsrConfig(preset="paper").reading == "protected"
    assert TipRsrConfig(preset="paper", reading="printed").reading == "printed"
    for named in (TipRsrConfig.paper(), TipRsrConfig.code(), TipRsrConfig()):
        assert TipRsrConfig(**named.to_dict()) == named


# --- contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"preset": "paper"}, {"tile": 128, "batch": 1}])
@pytest.mark.parametrize("kind", ["whole", "aligned"])
def test_contract(settings, kind) -> None:
    found = [face(96, seed=seed, stretch=0.6) for seed in range(2)]
    both = restorer() if kind == "whole" else face_restorer()
    width = 150 if "tile" in settings else 97
    image = photo(2, 96, width)
    config = TipRsrConfig(**settings)

    general = restorer(2, 1)

    def method(*faces):
        return TipRsr(config, general=general, face=both, finder=Finder(*faces))

    together, state = method([found[0]], [found[1]]), torch.get_rng_state()
    with torch.no_grad():
        result = together.purify(image)
        assert torch.equal(result, together.purify(image, seed=9))
        singles = [method([own]).purify(image[index, None]) for index, own in enumerate(found)]
    assert result.shape == image.shape
    assert 0 <= float(result.min()) <= float(result.max()) <= 1
    assert not torch.allclose(result, image, atol=0.01)
    torch.testing.assert_close(result, torch.cat(singles), rtol=0, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_a_gradient_reaches_the_photo_through_both_branches(preset) -> None:
    image = photo().requires_grad_(True)
    method = TipRsr(TipRsrConfig(preset=preset), general=restorer(), face=restorer(2, 1),
                    finder=Finder([BESIDE]))  # fmt: skip
    result = method.purify(image)
    mask = method.parts(image.detach()).mask.expand_as(result)
    for inside in (mask == 1, mask == 0):
        (gradient,) = torch.autograd.grad(result[inside].sum(), image, retain_graph=True)
        assert float(gradient.abs().max()) > 0.1


def test_text_names_preset_and_networks() -> None:
    config = read_settings(TipRsrConfig, "code,quality=60,general=x,face=y,parser=none", "tip-rsr")
    assert config == TipRsrConfig(
        preset="code", quality=60, general="x", face="y", parser="none", feather=0.0
    )
    assert config == read_settings(
        TipRsrConfig, "preset=code,quality=60,general=x,face=y,parser=none", "tip-rsr"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("preset=offical", "preset"),
        ("blend=1.2", "must lie in"),
        ("reading=literal", "reading"),
        ("strength=3", "no setting 'strength'"),
    ],
)
def test_a_mistake_in_a_setting_is_named(text, words) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        read_settings(TipRsrConfig, text, "tip-rsr")
    assert "\n" not in str(raised.value)


def test_it_is_loaded_by_names_and_says_which_parser_it_took(tmp_path) -> None:
    save_file(compact().state_dict(), tmp_path / "sr.safetensors")
    write_card(tmp_path, "small-sr", "purifier", "spandrel", file="sr.safetensors")
    store = WeightStore(tmp_path)
    config = TipRsrConfig(general="small-sr", face="small-sr", parser="none")
    method = TipRsr.load(config, store=store, device=CPU)
    assert method.general is method.face
    assert method.config.parser == "none"
    assert not isinstance(method.face, FaceRestorer)
    image = photo(1, 40, 48)
    assert method.purify(image).shape == image.shape
    automatic = TipRsr.load(dataclasses.replace(config, parser="auto"), store=store, device=CPU)
    assert automatic.config.parser in {"none", "bisenet-celebamask", "segformer-face-parsing"}


def test_absent_weights_are_named(tmp_path) -> None:
    write_card(tmp_path, "gone", "purifier", "spandrel", file="gone.safetensors")
    config = TipRsrConfig(general="gone", face="gone")
    with pytest.raises(WeightsError, match="'gone' are not on this machine"):
        TipRsr.load(config, store=WeightStore(tmp_path), device=CPU)
