"""FaceShield: each term by itself, and the shaping of the steps."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import fft, ndimage
from skimage import data
from torch.nn import functional

from shields.errors import ConfigError
from shields.models.detectors import MtcnnDetector
from shields.protectors.faceshield import FaceShield, FaceShieldConfig, low_pass, soften
from tests import tiny
from tests.prompting import adapter

SIZE = 32
ALONE = {"identity_weight": 0.0, "detector_weight": 0.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def detector():
    return MtcnnDetector()


@pytest.fixture(scope="module")
def portrait():
    """A real face of some 90 pixels, 104 x 104 at half size: (1, 3, 104, 104)."""
    pixels = data.astronaut()[0:208, 120:328].copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    return (functional.avg_pool2d(image, 2) * 255).round() / 255


@pytest.fixture
def image():
    return tiny.faces_image(2, SIZE)


@pytest.fixture
def marks():
    return tiny.landmarks(2, SIZE)


@pytest.fixture(scope="module")
def diffusion():
    return tiny.diffusion()


@pytest.fixture(scope="module")
def prompter(diffusion):
    return adapter(diffusion.unet)[0]


class TestTerms:
    def test_identity_alone_lowers_the_similarity(self, image, marks):
        eyes = tiny.recognizer()
        config = FaceShieldConfig(steps=16, detector_weight=0.0)
        perturbation = FaceShield(config, recognizer=eyes)(image, rng=generator(), landmarks=marks)
        matrix = eyes.matrix(marks, image)
        noise = (torch.rand(image.shape, generator=generator(1)) * 2 - 1) * 8 / 255
        ours, random = (
            (eyes((image + change).clamp(0, 1), matrix) * eyes(image, matrix)).sum(dim=1)
            for change in (perturbation, noise)
        )
        assert (1 - ours > 2 * (1 - random)).all()
        assert (perturbation.abs() <= 8 / 255 + 1e-7).all()

    def test_further_recognizers_count_each_with_its_own_reference(self, image, marks):
        first, second = tiny.recognizer(), tiny.recognizer(1)
        config = FaceShieldConfig(detector_weight=0.0)
        protector = FaceShield(config, recognizer=first, further=[second])
        view = (image + 0.02 * torch.rand(image.shape, generator=generator())).clamp(0, 1)
        found = protector.evaluate(image, view, torch.ones_like(image[:, :1]), landmarks=marks)
        expected = 0.0
        for eyes in (first, second):
            matrix = eyes.matrix(marks, image)
            cosine = functional.cosine_similarity(eyes(view, matrix), eyes(image, matrix))
            expected = expected + 4 * (1 - cosine)
        assert torch.allclose(found, expected, atol=1e-5)

    def test_the_detector_alone_lowers_the_face_probability(self, portrait, detector):
        config = FaceShieldConfig(steps=10, identity_weight=0.0)
        protector = FaceShield(config, detector=detector)
        perturbation = protector(portrait, rng=generator())
        noise = (torch.rand(portrait.shape, generator=generator(1)) * 2 - 1) * 8 / 255
        coarse = detector.proposals.sizes(*portrait.shape[2:])[-3:]
        sure = {}
        for name, change in (("clean", 0), ("noise", noise), ("ours", perturbation)):
            view = (portrait + change).clamp(0, 1)
            places = [detector.proposals(view, size) for size in coarse]
            sure[name] = sum(int((place > 0.6).sum()) for place in places)
        assert sure["clean"] >= 10
        assert sure["noise"] >= 10
        assert sure["ours"] <= sure["clean"] / 2

    def test_the_detector_term_is_the_formula(self, portrait, detector):
        protector = FaceShield(FaceShieldConfig(identity_weight=0.0), detector=detector)
        found = protector.evaluate(portrait, portrait, torch.ones_like(portrait[:, :1]))
        network, expected = detector._network.pnet, 0.0
        scale, scales = 12 / 20, []
        while 104 * scale >= 12:
            scales.append(scale)
            scale *= 0.709
        for weight, scale in zip((20, 10, 8), scales[::-1], strict=False):
            side = int(104 * scale + 1)
            for mode in ("bilinear", "area"):
                small = functional.interpolate(portrait * 255, size=(side, side), mode=mode)
                probability = network((small - 127.5) / 128)[1]
                wanted = probability.clone()
                sure = probability[:, 1] > 0.6
                wanted[:, 1][sure], wanted[:, 0][sure] = 0.4, 0.6
                expected -= 9 * weight * float(functional.mse_loss(probability, wanted))
        assert expected < -1
        assert found.item() == pytest.approx(expected, rel=1e-4)

    def test_all_levels_of_the_pyramid_can_count(self, portrait, detector):
        config = FaceShieldConfig(identity_weight=0.0, detector_levels=0)
        rest = torch.ones_like(portrait[:, :1])
        every = FaceShield(config, detector=detector).evaluate(portrait, portrait, rest)
        three = dataclasses.replace(config, detector_levels=3)
        coarse = FaceShield(three, detector=detector).evaluate(portrait, portrait, rest)
        assert (every < coarse).all()

    def test_an_image_too_small_for_the_pyramid_has_no_sure_place(self, detector):
        small = tiny.faces_image(1, 16)
        protector = FaceShield(FaceShieldConfig(identity_weight=0.0), detector=detector)
        assert protector.evaluate(small, small, torch.ones_like(small[:, :1])).item() == 0

    def test_the_prompt_alone_moves_the_embedding(self, image, prompter):
        config = FaceShieldConfig(steps=8, **ALONE, prompt_weight=1.0)
        protector = FaceShield(config, adapter=prompter)
        perturbation = protector(image, rng=generator())
        noise = (torch.rand(image.shape, generator=generator(1)) * 2 - 1) * 8 / 255
        clean = prompter.embed(image)
        ours, random = (
            (prompter.embed((image + change).clamp(0, 1)) - clean).abs().mean(dim=1)
            for change in (perturbation, noise)
        )
        assert (ours > 1.5 * random).all()

    def test_the_attention_alone_falls_towards_its_reference(self, image, prompter, diffusion):
        config = FaceShieldConfig(steps=8, step=2.0, **ALONE, attention_weight=1.0)
        protector = FaceShield(config, adapter=prompter, diffusion=diffusion)
        rest = torch.ones_like(image[:, :1])
        perturbation = protector(image, rng=generator())
        before = protector.evaluate(image, image, rest)
        assert (before < 0).all()
        assert (protector.evaluate(image, image + perturbation, rest) > before).all()

    def test_uneven_attention_is_evened_and_the_rest_kept(self):
        protector = FaceShield(FaceShieldConfig(detector_weight=0.0), recognizer=tiny.recognizer())
        layer = torch.tensor([[0.97, 0.01, 0.01, 0.01], [0.3, 0.25, 0.25, 0.2]])[None, None]
        expected = torch.tensor([[0.25] * 4, [0.3, 0.25, 0.25, 0.2]])[None, None]
        assert torch.equal(protector._evened(layer), expected)

    @pytest.mark.parametrize(
        ("weights", "roles"),
        [
            ({}, {"recognizer", "detector"}),
            ({"detector_weight": 0.0}, {"recognizer"}),
            ({"identity_weight": 0.0}, {"detector"}),
            ({**ALONE, "prompt_weight": 1.0}, {"adapter"}),
            ({**ALONE, "attention_weight": 1.0}, {"adapter", "diffusion"}),
            ({"prompt_weight": 1.0, "attention_weight": 1.0},
             {"recognizer", "detector", "adapter", "diffusion"}),
        ],
        ids=str,
    )  # fmt: skip
    def test_a_term_without_weight_needs_and_runs_no_network(
        self, weights, roles, image, marks, detector, prompter, diffusion
    ):
        config = FaceShieldConfig(steps=1, **weights)
        assert set(FaceShield.roles(config)) == roles
        known = {"recognizer": tiny.recognizer(), "detector": detector, "adapter": prompter,
                 "diffusion": diffusion}  # fmt: skip
        protector = FaceShield(config, **{role: known[role] for role in roles})
        value = protector.evaluate(image, image, torch.ones_like(image[:, :1]), landmarks=marks)
        assert value.shape == (2,)
        for role in roles:
            with pytest.raises(ConfigError, match=role):
                FaceShield(config, **{name: known[name] for name in roles - {role}})


def expected_low_pass(channel):
    """Block by block with scipy's cosine transform; the sides are multiples of 8."""
    kept = np.zeros((8, 8))
    for row, count in enumerate((6, 5, 5, 4, 3, 2, 0, 0)):
        kept[row, :count] = 1
    result = np.empty_like(channel)
    for top in range(0, channel.shape[0], 8):
        for left in range(0, channel.shape[1], 8):
            place = (slice(top, top + 8), slice(left, left + 8))
            result[place] = fft.idctn(fft.dctn(channel[place], norm="ortho") * kept, norm="ortho")
    return result


def expected_soften(update):
    """One sample (3, H, W), with scipy's filters."""
    scaled = (update - update.min()) / (update.max() - update.min())
    edges = np.zeros_like(update)
    for axis in (1, 2):
        responses = np.stack([np.abs(ndimage.sobel(c, axis - 1, mode="nearest")) for c in scaled])
        edges[responses == responses.max()] = 1
    edges = ndimage.maximum_filter(edges, size=(1, 9, 9), mode="constant")
    line = np.exp(-0.5 * (np.arange(-4, 5) / 5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    blurred = np.stack([ndimage.correlate(c, window, mode="nearest") for c in update])
    return np.where(edges == 1, blurred, update)


class TestShaping:
    def test_the_low_pass_keeps_25_frequencies_of_each_block(self):
        noise = torch.randn(2, 3, 16, 24, generator=generator())
        found = low_pass(noise)
        for sample in range(2):
            for channel in range(3):
                expected = expected_low_pass(noise[sample, channel].double().numpy())
                assert np.allclose(found[sample, channel].numpy(), expected, atol=1e-5)

    def test_the_low_pass_is_a_projection_and_leaves_a_flat_field_alone(self):
        noise = torch.randn(1, 3, 16, 16, generator=generator())
        once = low_pass(noise)
        assert torch.allclose(low_pass(once), once, atol=1e-5)
        flat = torch.full((1, 3, 21, 13), 0.3)
        assert torch.allclose(low_pass(flat), flat, atol=1e-5)

    def test_a_step_is_blurred_around_its_sharpest_edges_alone(self):
        signs = torch.randn(2, 3, 40, 32, generator=generator()).sign()
        signs[0] = functional.interpolate(signs[:1, :, :10, :8], size=(40, 32))[0]
        found = soften(signs / 255)
        for sample in range(2):
            expected = expected_soften(signs[sample].double().numpy()) / 255
            assert np.allclose(found[sample].numpy(), expected, atol=1e-6)
        assert not torch.equal(found, signs / 255)

    def test_a_distant_part_of_the_step_is_left_as_it_is(self):
        step = torch.zeros(1, 3, 32, 32)
        step[..., :, 28:] = 1 / 255
        found = soften(step)
        assert torch.equal(found[..., :20], step[..., :20])
        assert not torch.equal(found[..., 24:], step[..., 24:])

    def test_a_step_without_edges_comes_back(self):
        flat = torch.full((1, 3, 16, 16), 1 / 255)
        assert torch.allclose(soften(flat), flat)

    def test_samples_do_not_see_each_other(self):
        steps = torch.randn(2, 3, 24, 24, generator=generator()).sign()
        steps[1] *= 0.1
        assert torch.equal(soften(steps)[1:], soften(steps[1:]))

    def test_the_walk_is_blur_then_low_pass_then_bound(self, image, marks):
        """The same updates by hand, from the gradient on."""
        eyes, config = (
            tiny.recognizer(),
            FaceShieldConfig(levels=2, steps=3, start="zero", detector_weight=0.0),
        )
        found = FaceShield(config, recognizer=eyes)(image, rng=generator(), landmarks=marks)
        matrix = eyes.matrix(marks, image)
        clean, change = eyes(image, matrix).detach(), torch.zeros_like(image)
        for _ in range(3):
            variable = change.clone().requires_grad_(True)
            gain = 4 * (1 - (eyes(image + variable, matrix) * clean).sum(dim=1))
            (gradient,) = torch.autograd.grad(gain.sum(), variable)
            change = low_pass(change + soften(gradient.sign() / 255)).clamp(-2 / 255, 2 / 255)
            change = (image + change).clamp(0, 1) - image
        # The first gradient is rounding alone, as the cosine is at its peak: a sign may differ.
        assert ((found - change).abs() > 0.02 / 255).float().mean() < 0.02

    def test_less_of_it_is_high_frequency_than_without(self, image, marks):
        shares = []
        for shaped in (True, False):
            config = FaceShieldConfig(
                steps=6, detector_weight=0.0, softened=shaped, low_passed=shaped
            )
            protector = FaceShield(config, recognizer=tiny.recognizer())
            change = protector(image, rng=generator(), landmarks=marks)
            shares.append(float((change - low_pass(change)).norm() / change.norm()))
        assert shares[0] < 0.3 * shares[1]

    def test_other_walks_are_shaped_too_and_the_best_is_what_was_seen(self, image, marks):
        config = FaceShieldConfig(
            steps=4, detector_weight=0.0, update="adam", momentum=0.9, keep="best", draws=2
        )
        protector = FaceShield(config, recognizer=tiny.recognizer())
        change = protector(image, rng=generator(), landmarks=marks)
        assert (change.abs() <= 8 / 255 + 1e-7).all()
        assert float((change - low_pass(change)).norm() / change.norm()) < 0.3

    def test_equal_seeds_give_equal_bits(self, image, marks):
        config = FaceShieldConfig(steps=3, detector_weight=0.0, robust=True)
        protector = FaceShield(config, recognizer=tiny.recognizer())
        runs = [protector(image, rng=generator(4), landmarks=marks) for _ in range(2)]
        assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"identity_weight": -1.0}, "identity_weight"),
        (ALONE, "above 0"),
        ({"attention_threshold": 1.5}, "attention_threshold"),
        ({"detector_levels": -1}, "detector_levels"),
        ({"space": "tanh", "update": "adam"}, "softened=false"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FaceShieldConfig(**settings)


def test_the_presets_are_those_of_the_sheet():
    full, published = FaceShieldConfig.attention(), FaceShieldConfig.code()
    assert (full.levels, full.step, full.steps, full.start) == (12, 1, 30, "zero")
    assert (full.identity_weight, full.detector_weight) == (4, 9)
    assert (full.prompt_weight, full.attention_weight) == (1, 1)
    assert published.detector_weight == 0
    assert FaceShieldConfig().start == "uniform"
    assert FaceShieldConfig.paper().levels == 12
