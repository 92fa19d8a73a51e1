"""DF-RAP: the platforms' table, what stands between photo and manipulator, and what survives it."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

from shields.codec import real_jpeg
from shields.errors import ConfigError, UnknownName
from shields.models.manipulation import wrap
from shields.protectors.dfrap import (
    PLATFORM_QUALITIES,
    DfRap,
    DfRapConfig,
    load_simulator,
    platform_quality,
)
from shields.types import Step
from tests import tiny

SIZE = 32
#: one condition is enough, and a quarter of the time
ONE = {"conditions": "smiling", "steps": 12, "step": 2.0}
BARE = {"compression": "none", "least_scale": 1.0, "draws": 1}


class Softener(nn.Module):
    """A trained-looking stand-in for ComGAN: takes [-1, 1], returns it blurred, no clamp."""

    def __init__(self) -> None:
        super().__init__()
        self.blur = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        nn.init.constant_(self.blur.weight, 1 / 9)

    def forward(self, image):
        return self.blur(image)


def comgan():
    """What a user's factory looks like."""
    return wrap(Softener(), native_range="signed")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def image():
    return (tiny.faces_image(1, SIZE) * 255).round() / 255


@pytest.fixture(scope="module")
def manipulator():
    return tiny.manipulator()


@torch.no_grad()
def spoiled(manipulator, image, view, condition="smiling"):
    """How far the forgery of a saved photo is from that of the clean one, in [-1, 1]."""
    gap = 2 * (manipulator(view, condition) - manipulator(image, condition))
    return float(gap.square().mean())


def looked(protector, image, view, seed):
    """The objective with its draws from a seed, and the quality that these are."""
    rest = torch.ones_like(image[:, :1])
    objective = protector.objective(image, rest, landmarks=None, rng=generator())
    value = objective(view, Step(index=0, total=1, rng=generator(seed)))
    share = torch.rand((), generator=generator(seed), dtype=torch.float64)
    return value.item(), platform_quality(float(share))


def after_jpeg(manipulator, image, perturbation):
    """The disruption that is left behind a real codec, averaged over the table's usual values."""
    saved = ((image + perturbation) * 255).round() / 255
    left = [spoiled(manipulator, image, real_jpeg(saved, quality)) for quality in (80, 85, 92)]
    return sum(left) / len(left)


class TestTable:
    def test_it_is_what_was_published(self):
        assert len(PLATFORM_QUALITIES) == 15
        assert sum(PLATFORM_QUALITIES.values()) == pytest.approx(1, abs=1e-4)
        assert [min(PLATFORM_QUALITIES), max(PLATFORM_QUALITIES)] == [71, 100]
        three = sorted(PLATFORM_QUALITIES, key=PLATFORM_QUALITIES.__getitem__)[-3:]
        assert sorted(three) == [80, 85, 92]
        assert list(PLATFORM_QUALITIES) == sorted(PLATFORM_QUALITIES)

    def test_nobody_can_change_it(self):
        with pytest.raises(TypeError):
            PLATFORM_QUALITIES[75] = 1.0

    def test_shares_are_drawn_as_often_as_it_says(self):
        count = 20_000
        found = Counter(platform_quality(place / count) for place in range(count))
        assert found.keys() == PLATFORM_QUALITIES.keys()
        for quality, share in PLATFORM_QUALITIES.items():
            assert found[quality] / count == pytest.approx(share, abs=2e-4)

    def test_both_ends_are_in_the_table(self):
        assert platform_quality(0.0) == 71
        assert platform_quality(1 - 2**-53) == 100


class TestObjective:
    def test_without_compression_it_is_the_distance_of_the_forgeries(self, image, manipulator):
        protector = DfRap(DfRapConfig(**BARE), manipulator=manipulator)
        view = (image + 0.02).clamp(0, 1)
        found = protector.evaluate(image, view, torch.ones_like(image[:, :1]))
        names = manipulator.conditions
        expected = sum(spoiled(manipulator, image, view, name) for name in names) / len(names)
        assert found.shape == (1,)
        assert found.item() == pytest.approx(expected, rel=1e-4)

    def test_behind_the_codec_it_is_the_distance_after_a_quality_of_the_table(
        self, image, manipulator
    ):
        config = DfRapConfig(conditions="smiling", least_scale=1.0)
        protector = DfRap(config, manipulator=manipulator)
        view = ((image + 0.02).clamp(0, 1) * 255).round() / 255
        known = {
            quality: spoiled(manipulator, image, real_jpeg(view, quality))
            for quality in PLATFORM_QUALITIES
            if quality < 100
        }
        known[100] = spoiled(manipulator, image, view)
        objective = protector.objective(
            image, torch.ones_like(image[:, :1]), landmarks=None, rng=generator()
        )
        rng, seen = generator(3), set()
        for index in range(12):
            value = float(objective(view, Step(index=index, total=12, rng=rng)))
            quality = min(known, key=lambda name: abs(known[name] - value))
            assert value == pytest.approx(known[quality], rel=1e-4)
            seen.add(quality)
        assert len(seen) > 2

    def test_balance_mixes_the_forgeries_before_and_behind_the_codec(self, image, manipulator):
        view = ((image + 0.02).clamp(0, 1) * 255).round() / 255
        found = {}
        for balance in (0.0, 0.3, 1.0):
            config = DfRapConfig(conditions="smiling", least_scale=1.0, balance=balance)
            protector = DfRap(config, manipulator=manipulator)
            found[balance], quality = looked(protector, image, view, seed=3)
        assert quality < 100
        coded = real_jpeg(view, quality)
        mixed = 0.3 * manipulator(coded, "smiling") + 0.7 * manipulator(view, "smiling")
        gap = 2 * (mixed - manipulator(image, "smiling"))
        assert found[0.0] == pytest.approx(spoiled(manipulator, image, view), rel=1e-4)
        assert found[1.0] == pytest.approx(spoiled(manipulator, image, coded), rel=1e-4)
        assert found[0.3] == pytest.approx(float(gap.square().mean()), rel=1e-4)

    def test_a_quality_of_100_is_no_compression(self, image, manipulator):
        protector = DfRap(
            DfRapConfig(conditions="smiling", least_scale=1.0), manipulator=manipulator
        )
        view = ((image + 0.02).clamp(0, 1) * 255).round() / 255
        value, quality = looked(protector, image, view, seed=0)
        assert quality == 100
        assert value == pytest.approx(spoiled(manipulator, image, view), rel=1e-4)

    def test_the_reported_value_averages_over_draws(self, image, manipulator):
        protector = DfRap(
            DfRapConfig(conditions="smiling", least_scale=1.0), manipulator=manipulator
        )
        view, rng = ((image + 0.02).clamp(0, 1) * 255).round() / 255, generator()
        found = protector.evaluate(image, view, torch.ones_like(image[:, :1]))
        values = []
        for _ in range(8):
            share = torch.rand((), generator=rng, dtype=torch.float64)
            quality = platform_quality(float(share))
            sent = view if quality == 100 else real_jpeg(view, quality)
            values.append(spoiled(manipulator, image, sent))
        assert found.item() == pytest.approx(sum(values) / 8, rel=1e-4)

    def test_conditions_are_chosen_by_name(self, image, manipulator):
        with pytest.raises(UnknownName, match="bald"):
            DfRap(DfRapConfig(conditions="bald"), manipulator=manipulator)(image, rng=generator())


@pytest.fixture(scope="module")
def results(manipulator):
    """Protect one photo with the codec in the loop and without: image and perturbations."""
    image = (tiny.faces_image(1, SIZE) * 255).round() / 255
    behind = DfRap(DfRapConfig(**ONE, least_scale=1.0), manipulator=manipulator)
    bare = DfRap(DfRapConfig(**ONE, **BARE), manipulator=manipulator)
    return image, behind(image, rng=generator()), bare(image, rng=generator())


class TestProtection:
    def test_the_objective_rises_over_clean_and_over_noise(self, results, manipulator):
        image, perturbation, _ = results
        protector = DfRap(DfRapConfig(**ONE, least_scale=1.0), manipulator=manipulator)
        rest = torch.ones_like(image[:, :1])
        noise = (torch.rand(image.shape, generator=generator(1)) * 2 - 1) * 8 / 255
        clean, noisy, ours = (
            protector.evaluate(image, (image + change).clamp(0, 1), rest).item()
            for change in (torch.zeros_like(image), noise, perturbation)
        )
        assert ours > 1.5 * max(clean, noisy)
        assert perturbation.abs().max() <= 8 / 255 + 1e-7

    def test_more_is_left_behind_a_real_codec_than_without_one_in_the_loop(
        self, results, manipulator
    ):
        image, behind, bare = results
        ours = after_jpeg(manipulator, image, behind)
        assert ours > 1.3 * after_jpeg(manipulator, image, bare)

    def test_without_compression_it_is_the_stronger_one_before_the_codec(
        self, results, manipulator
    ):
        """The price of the codec in the loop, or the comparison above would prove little."""
        image, behind, bare = results
        assert spoiled(manipulator, image, image + bare) > spoiled(
            manipulator, image, image + behind
        )

    def test_equal_seeds_give_equal_bits_and_others_not(self, results, manipulator):
        image, perturbation, _ = results
        protector = DfRap(DfRapConfig(**ONE, least_scale=1.0), manipulator=manipulator)
        assert torch.equal(protector(image, rng=generator()), perturbation)
        assert not torch.equal(protector(image, rng=generator(9)), perturbation)

    @pytest.mark.parametrize("gradient", ["soft", "straight"])
    def test_both_gradients_of_the_codec_climb(self, gradient, image, manipulator):
        config = DfRapConfig(**ONE | {"steps": 4}, gradient=gradient)
        protector = DfRap(config, manipulator=manipulator)
        perturbation = protector(image, rng=generator())
        rest = torch.ones_like(image[:, :1])
        before = protector.evaluate(image, image, rest)
        assert (protector.evaluate(image, image + perturbation, rest) > before).all()


class TestSimulator:
    def test_any_network_takes_the_place_of_the_codec(self, image, manipulator):
        config = DfRapConfig(**ONE, **BARE | {"compression": "simulator"})
        protector = DfRap(config, manipulator=manipulator, simulator=Softener())
        view = (image + 0.02).clamp(0, 1)
        found = protector.evaluate(image, view, torch.ones_like(image[:, :1]))
        expected = spoiled(manipulator, image, Softener()(view).clamp(0, 1))
        assert found.item() == pytest.approx(expected, rel=1e-4)
        assert (protector(image, rng=generator()) != 0).any()

    def test_the_codec_may_follow_it(self, image, manipulator):
        view = (image + 0.02).clamp(0, 1)
        config = DfRapConfig(conditions="smiling", compression="both", least_scale=1.0)
        protector = DfRap(config, manipulator=manipulator, simulator=Softener())
        found, quality = looked(protector, image, view, seed=3)
        assert quality < 100
        coded = real_jpeg(Softener()(view).clamp(0, 1), quality)
        assert found == pytest.approx(spoiled(manipulator, image, coded), rel=1e-4)

    def test_it_is_imported_by_name(self, image, manipulator):
        """As a module of the user's would be: a factory, or the class itself."""
        config = DfRapConfig(
            **ONE | {"steps": 2}, compression="simulator", simulator=f"{__name__}:comgan"
        )
        config = DfRapConfig(**json.loads(json.dumps(config.to_dict())))
        perturbation = DfRap(config, manipulator=manipulator)(image, rng=generator())
        assert (perturbation != 0).any()
        assert isinstance(load_simulator(f"{__name__}:Softener"), Softener)

    def test_a_network_of_the_signed_range_is_wrapped(self, image):
        blurred = comgan()(image)
        expected = (Softener()(2 * image - 1) + 1) / 2
        assert torch.allclose(blurred, expected, atol=1e-6)

    def test_its_parameters_stay_as_they_were(self, image, manipulator):
        simulator = Softener()
        config = DfRapConfig(**ONE | {"steps": 2}, compression="simulator")
        DfRap(config, manipulator=manipulator, simulator=simulator)(image, rng=generator())
        assert simulator.blur.weight.requires_grad
        assert simulator.blur.weight.grad is None

    @pytest.mark.parametrize(
        "address", ["nothing", "no_such_module:x", f"{__name__}:no_such_name", "math:pi", ":x"]
    )
    def test_what_cannot_be_imported_is_explained(self, address):
        with pytest.raises(ConfigError, match="simulator"):
            load_simulator(address)

    def test_none_where_one_is_needed_is_explained(self, manipulator):
        with pytest.raises(ConfigError, match="simulator=module:name"):
            DfRap(DfRapConfig(compression="both"), manipulator=manipulator)

    def test_one_that_changes_the_size_is_refused(self, image, manipulator):
        config = DfRapConfig(compression="simulator")
        protector = DfRap(config, manipulator=manipulator, simulator=nn.AvgPool2d(2))
        with pytest.raises(ConfigError, match="size"):
            protector(image, rng=generator())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression": "zip"}, "compression"),
        ({"gradient": "none"}, "gradient"),
        ({"least_scale": 0.0}, "least_scale"),
        ({"balance": 1.5}, "balance"),
        ({"balance": float("nan")}, "balance"),
        ({"simulator": "my_module:net"}, "compression=simulator"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DfRapConfig(**settings)


def test_the_papers_walk_is_that_of_the_sheet():
    config = DfRapConfig.paper()
    assert (config.levels, config.step, config.steps) == (6.375, 1.275, 10)
    assert (config.start, config.decay, config.compression) == ("uniform", "constant", "jpeg")
