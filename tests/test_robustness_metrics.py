"""Metrics by name, and those of images: closed forms, what is absent, what is remembered."""

import math

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness.metrics import METRICS, PAIRS, Measure, Scene, better, load
from robustness.metrics.images import Psnr
from robustness.metrics.memory import Memory
from shields.errors import ConfigError, ImageError, UnknownName, WeightsError
from shields.weights import WeightStore
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A store without any weights but the shipped ones."""
    for variable in ("HF_HOME", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    return WeightStore(tmp_path)


def built(text, store=None):
    measure, _ = load(text, store=store or WeightStore(), device=CPU)
    return measure


def flat(*values, size=32):
    return torch.stack([torch.full((3, size, size), float(value)) for value in values])


def scene(clean, **known):
    return Scene(clean=clean, **known)


# --- names, pairs, directions --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("psnr", ConfigError, "Write psnr@edits"),
        ("psnr@edit", ConfigError, "did you mean edits"),
        ("pnsr@photo", UnknownName, "did you mean psnr"),
        ("psnr:3@photo", ConfigError, "it has none"),
        ("lpips:alexnet@photo", ConfigError, "did you mean alex"),
        ("sr@photo", ConfigError, "measured on edits or fair, not on photo"),
        ("lpisp:alex@photo", UnknownName, "did you mean lpips"),
    ],
)
def test_a_name_that_makes_no_sense_is_explained(text, error, says):
    with pytest.raises(error, match=says):
        built(text)


def test_every_pair_has_its_direction():
    assert [better(pair, alike=True) for pair in PAIRS] == [True, False, False, False, None]
    assert [better(pair, alike=False) for pair in PAIRS] == [False, True, True, True, None]


@pytest.mark.parametrize("name", ["psnr", "ssim", "mse", "features", "sr", "sr-mask", "detected"])
def test_facts_bound_the_values_and_say_what_they_are(name):
    measure = built(f"{name}@{METRICS[name].pairs[0]}")
    clean, forged, protected = (tiny.faces_image(2, 48, seed) for seed in range(3))
    values = measure.measure(protected, forged, scene(clean, landmarks=tiny.landmarks(2, 48)))
    for pair in measure.pairs:
        facts = measure.facts(pair)
        assert facts.low <= float(values.min())
        assert float(values.max()) <= facts.high
        assert facts.summary.endswith(".")


class Darkness(Measure):
    """A metric of somebody else's."""

    def facts(self, pair):
        raise NotImplementedError

    def _measure(self, image, other, scene):
        return 1 - image.mean(dim=(1, 2, 3))


def no_metric():
    return tiny.recognizer()


def test_a_plug_in_is_loaded_by_its_address():
    measure, pair = load("tests.test_robustness_metrics:Darkness@source", store=None, device=CPU)
    assert pair == "source"
    dark = measure.measure(flat(0.25, 1), flat(0, 0), scene(flat(0, 0)))
    assert dark.tolist() == pytest.approx([0.75, 0])
    with pytest.raises(ConfigError, match="returned a TinyRecognizer"):
        built("tests.test_robustness_metrics:no_metric@edits")


# --- images against closed forms -----------------------------------------------------------------


def test_distances_of_flat_images_have_closed_forms():
    image, other = flat(0.5, 0.2), flat(0.4, 0.2)
    where = scene(other)
    assert built("mse@edits").measure(image, other, where).tolist() == pytest.approx([0.04, 0])
    psnr = built("psnr@photo").measure(image, other, where)
    assert float(psnr[0]) == pytest.approx(20, abs=1e-4)
    assert float(psnr[1]) == math.inf
    assert float(built("ssim@photo").measure(image, other, where)[1]) == pytest.approx(1)


def test_a_forgery_is_disrupted_above_a_fiftieth_of_the_signed_range():
    """0.05 in [-1, 1] is 0.0125 in [0, 1]: a difference of 0.1118."""
    image, other = flat(0.511, 0.513), flat(0.4, 0.4)
    assert built("sr@edits").measure(image, other, scene(other)).tolist() == [0, 1]


def test_the_masked_rate_looks_where_the_edit_was():
    clean = flat(0.5, 0.5, 0.5)
    forged = clean.clone()
    forged[:2, :, :4] += 0.1  # summed over three channels, in [-1, 1]: 0.6
    forged[2, :, :4] += 0.08  # 0.48: too little to count as edited
    image = forged.clone()
    image[0, :, 4:] -= 0.5  # disrupted where nothing was edited
    image[1, :, :4] -= 0.2  # 0.16 in the mask
    rate = built("sr-mask@edits").measure(image, forged, scene(clean))
    assert rate.tolist()[:2] == [0, 1]
    assert math.isnan(rate[2])
    full = built("sr@edits").measure(image, forged, scene(clean))
    assert full.tolist() == [1, 0, 0]


@pytest.mark.parametrize("kernel", ["LANCZOS", "BILINEAR"])
def test_sizes_are_brought_to_the_clean_photo_by_lanczos(kernel):
    rng = np.random.default_rng(0)
    small, clean = (rng.integers(80, 176, (side, side, 3), dtype=np.uint8) for side in (24, 48))
    enlarged = PillowImage.fromarray(small).resize((48, 48), PillowImage.Resampling[kernel])
    image, other, expected = (
        torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255
        for pixels in (small, clean, enlarged)
    )
    measure = built("psnr@handled")
    gap = measure.measure(image, other, scene(other)) - measure.measure(
        expected, other, scene(other)
    )
    assert (abs(float(gap)) < 0.01) == (kernel == "LANCZOS")


@pytest.mark.parametrize("name", ["psnr", "ssim", "mse", "features:face-embedder"])
def test_a_batch_equals_its_singles(name):
    measure = built(f"{name}@photo")
    image, other = tiny.faces_image(3, 48, 1), tiny.faces_image(3, 48, 2)
    whole = measure.measure(image, other, scene(other))
    parts = [image[row : row + 1] for row in range(3)], [other[row : row + 1] for row in range(3)]
    singles = [measure.measure(i, o, scene(o)) for i, o in zip(*parts, strict=True)]
    assert torch.allclose(whole, torch.cat(singles), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.full((1, 3, 32, 32), 2.0), torch.zeros(2, 3, 32, 32)])
def test_images_that_do_not_fit_are_refused(bad):
    good = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ImageError):
        Psnr().measure(bad, good, scene(good))


def test_lpips_without_its_backbone_is_absent(empty):
    with pytest.raises(WeightsError, match="alexnet"):
        built("lpips:alex@photo", empty)


# --- features are computed once ------------------------------------------------------------------


def test_features_of_a_reference_come_from_memory():
    """Shown by a lie: another image under a known digest is not looked at."""
    image, first, second = (tiny.faces_image(2, 48, seed) for seed in range(3))
    measure = built("features:face-embedder@photo")
    honest = measure.measure(image, first, scene(first, keys=("a", "b")))
    kept = measure.measure(image, second, scene(first, keys=("a", "b")))
    mixed = measure.measure(image, second, scene(first, keys=("c", "b")))
    without = measure.measure(image, second, scene(first))
    assert torch.allclose(kept, honest, atol=1e-6)
    assert not torch.allclose(honest, without, atol=1e-3)
    assert torch.allclose(mixed, torch.stack([without[0], honest[1]]), atol=1e-6)


def test_memory_forgets_what_was_used_least_lately_and_stays_within_its_limit():
    memory = Memory(limit=2 * 4 * 8)  # two entries of eight float32

    def ask(key, value):
        return float(memory([key], 1, lambda rows: (torch.full((1, 8), value),))[0][0, 0])

    assert [ask("a", 1.0), ask("b", 2.0), ask("a", 9.0)] == [1, 2, 1]
    assert ask("c", 3.0) == 3  # pushes b out
    assert [ask("a", 9.0), ask("c", 9.0), ask("b", 7.0)] == [1, 3, 7]
    asked = []
    (twice,) = memory(["d", "e", "d"], 3, lambda rows: (asked.append(rows) or torch.eye(3)[rows],))
    assert asked == [[0, 1]]
    assert torch.equal(twice, torch.eye(3)[[0, 1, 0]])
    with pytest.raises(ImageError, match="2 images need as many keys"):
        memory(["a"], 2, lambda rows: (torch.zeros(2, 1),))
