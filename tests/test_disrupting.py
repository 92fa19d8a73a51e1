"""Disrupting Deepfakes: its walks, its turns over conditions and blurs, and what they buy."""

import math

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from shields.errors import ConfigError, ImageError, UnknownName
from shields.models.hisd import HiSDModel
from shields.models.hisd_network import HisdGenerator
from shields.models.manipulation import wrap
from shields.models.relgan import RelGANModel
from shields.models.relgan_network import RelganGenerator
from shields.models.talking_heads import talking_head
from shields.protectors.disrupting import SPREAD, Disrupting, DisruptingConfig, MeanBlur, _turn
from shields.protectors.manipulation import chosen_conditions, forgeries
from shields.transforms import GaussianBlur
from shields.types import Step
from tests import tiny
from tests.climbing import generator

SIZE = 32
LEVELS = 6.375
PRESETS = DisruptingConfig.presets()


@pytest.fixture(scope="module")
def image():
    return tiny.faces_image(1, SIZE)


@pytest.fixture(scope="module")
def network():
    return tiny.manipulator()


def protect(image, network, seed=0, **settings):
    few = {"levels": LEVELS, "step": 1.275, "steps": 10}
    config = DisruptingConfig(**(few | settings))
    return image + Disrupting(config, manipulator=network)(image, rng=generator(seed))


def distance(network, image, protected, condition, blur=None):
    """Mean squared distance, in [-1, 1], of two forgeries; the protected photo may be blurred."""
    with torch.no_grad():
        seen = protected if blur is None else blur(protected, generator())
        gap = network(seen, condition) * 2 - network(image, condition) * 2
    return float(gap.square().mean())


def everywhere(network, image, protected):
    return np.mean([distance(network, image, protected, name) for name in network.conditions])


def noisy(image, levels=LEVELS):
    signs = (torch.rand(image.shape, generator=generator(9)) - 0.5).sign()
    return (image + signs * levels / 255).clamp(0, 1)


class TestDisruption:
    """The forgery of the protected photo is another one."""

    @pytest.mark.parametrize("preset", ["fgsm", "ifgsm", "paper", "joint"])
    def test_each_walk_disrupts_twice_as_much_as_noise_of_its_budget(self, preset, image, network):
        config = PRESETS[preset]()
        protector = Disrupting(config, manipulator=network)
        perturbation = protector(image, rng=generator())
        assert perturbation.abs().max() <= config.budget.epsilon + 1e-7
        gain = everywhere(network, image, image + perturbation)
        assert gain > 2 * everywhere(network, image, noisy(image))
        assert gain > 0.05, "what the paper counts as disrupted"

    def test_equal_seeds_give_equal_bits_and_others_do_not(self, image, network):
        first, again, other = (protect(image, network, seed=seed, steps=2) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_nullifying_brings_the_forgery_to_the_photo(self, image, network):
        protected = protect(image, network, aim="nullify", classes="joint")
        for name in network.conditions:
            before, after = ((network(view, name) - image).square().mean()
                             for view in (image, protected))  # fmt: skip
            assert after < before

    def test_aiming_at_white_brightens_every_forgery(self, image, network):
        protected = protect(image, network, aim="white", classes="joint")
        for name in network.conditions:
            assert network(protected, name).mean() > network(image, name).mean()

    def test_any_function_can_be_the_manipulator(self, image):
        network = wrap(tiny.autoencoder().reconstruct, native_range="unit")
        protected = protect(image, network)
        noise = distance(network, image, noisy(image), "")
        assert distance(network, image, protected, "") > 2 * noise

    def test_a_size_that_the_network_cannot_take_is_refused(self, network):
        with pytest.raises(ImageError, match="multiples of 4"):
            protect(torch.rand(1, 3, 30, 32, generator=generator()), network)


class TestConditions:
    """Which conditions count, and when."""

    @pytest.mark.parametrize("classes", ["iterative", "joint"])
    def test_several_conditions_protect_better_against_those_that_a_single_one_has_not_seen(
        self, classes, network
    ):
        image = tiny.faces_image(2, SIZE)
        seen, *unseen = network.conditions
        single = protect(image, network, conditions=seen, steps=12)
        transferable = protect(image, network, classes=classes, steps=12)
        ours, theirs = (
            np.mean([distance(network, image, protected, name) for name in unseen])
            for protected in (transferable, single)
        )
        assert ours > 1.1 * theirs

    def test_joint_conditions_transfer_to_one_that_none_of_them_is(self, network):
        image = tiny.faces_image(2, SIZE)
        *seen, unseen = network.conditions
        single = protect(image, network, conditions=seen[0], steps=12)
        several = protect(image, network, conditions=",".join(seen), classes="joint", steps=12)
        assert distance(network, image, several, unseen) > distance(network, image, single, unseen)

    def test_iterative_steps_ask_for_one_condition_after_the_other_and_joint_ones_for_all(
        self, image, network
    ):
        protected = noisy(image)
        expected = [distance(network, image, protected, name) for name in network.conditions]
        mask = torch.ones_like(image[:, :1])
        for classes in ("iterative", "joint"):
            protector = Disrupting(DisruptingConfig(classes=classes), manipulator=network)
            objective = protector.objective(image, mask, landmarks=None, rng=generator())
            for index in range(6):
                step = Step(index=index, total=6, rng=generator())
                goal = np.mean(expected) if classes == "joint" else expected[index % 4]
                assert float(objective(protected, step)) == pytest.approx(goal, rel=1e-4)
            judged = protector.evaluate(image, protected, mask)
            assert float(judged) == pytest.approx(np.mean(expected), rel=1e-4)

    def test_conditions_are_chosen_by_name_in_order_and_once(self, network):
        chosen = chosen_conditions(network, "smiling, black_hair,smiling")
        assert [condition.name for condition in chosen] == ["smiling", "black_hair"]
        assert chosen[0].value.tolist() == [[0, 0, 1]]
        everything = chosen_conditions(network, "")
        assert tuple(condition.name for condition in everything) == network.conditions

    def test_conditions_that_are_no_fixed_names_are_understood(self, tmp_path):
        with tiny.seeded(0):
            relgan = RelGANModel(RelganGenerator(2, width=4, blocks=2), ("Smiling", "Male"), 1)
            hisd = HiSDModel(
                HisdGenerator((2,), 4, 4, 2, 8, 4, 8, (4, 8)), {"smiling": ("with", "without")}
            )
        (half,) = chosen_conditions(relgan, "smiling:0.5")
        assert half.value.tolist() == [[0.5, 0.0]]
        pixels = np.full((32, 32, 3), 200, np.uint8)
        PILImage.fromarray(pixels).save(tmp_path / "reference.png")
        (styled,) = chosen_conditions(hisd, f"smiling={tmp_path / 'reference.png'}")
        reference = hisd.reference("smiling", torch.full((1, 3, 32, 32), 200 / 255))
        assert torch.allclose(styled.value, reference.value)

    def test_a_talking_head_is_no_manipulator_to_climb_against(self):
        head = talking_head(lambda image, audio, seed: image)
        with pytest.raises(ConfigError, match="no gradient"):
            chosen_conditions(head, "")

    def test_an_unknown_condition_is_refused_with_its_neighbour(self, image, network):
        with pytest.raises(UnknownName, match="did you mean blond_hair"):
            protect(image, network, conditions="black_hair,blonde_hair")

    def test_clean_forgeries_are_those_of_the_network_and_carry_no_graph(self, image, network):
        conditions = chosen_conditions(network, "blond_hair,smiling")
        forged = forgeries(network, image.clone().requires_grad_(True), conditions)
        for made, condition in zip(forged, conditions, strict=True):
            assert not made.requires_grad
            assert torch.equal(made, network(image, condition.name))


def window_of(blur):
    """The blur's window from its definition: (K, K), float64."""
    if isinstance(blur, MeanBlur):
        return np.full((blur.window, blur.window), 1 / blur.window**2)
    row = np.array([math.exp(-((place - 5) ** 2) / (2 * blur.sigma**2)) for place in range(11)])
    window = np.outer(row, row)
    return window / window.sum()


class TestBlurs:
    """The spread-spectrum bank, and what it buys."""

    def test_the_bank_has_the_nine_blurs_of_the_paper(self):
        gaussians = [blur.sigma for blur in SPREAD if isinstance(blur, GaussianBlur)]
        means = [blur.window for blur in SPREAD if isinstance(blur, MeanBlur)]
        assert gaussians == [1, 1.5, 2, 2.5, 3]
        assert means == [3, 5, 7, 9]
        image = torch.rand(1, 3, SIZE, SIZE, generator=generator())
        views = [blur(image, generator()) for blur in SPREAD]
        assert len(views) == 9
        for index, view in enumerate(views):
            assert all((view - other).abs().max() > 1 / 255 for other in views[:index])

    @pytest.mark.parametrize("blur", SPREAD, ids=str)
    def test_a_blur_is_its_window_over_the_reflected_image(self, blur):
        image = torch.rand(2, 3, 24, 28, generator=generator())
        window = window_of(blur)
        radius = len(window) // 2
        padded = np.pad(
            image.double().numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), "reflect"
        )
        patches = np.lib.stride_tricks.sliding_window_view(padded, window.shape, axis=(2, 3))
        expected = (patches * window).sum(axis=(4, 5))
        assert np.abs(blur(image, generator()).numpy() - expected).max() < 1e-6

    @pytest.mark.parametrize(("blur", "steps"), [("spread", 18), ("eot", 4)])
    def test_the_bank_protects_through_every_blur_and_a_plain_walk_does_not(
        self, blur, steps, image, network
    ):
        plain = protect(image, network, conditions="smiling")
        spread = protect(image, network, conditions="smiling", blur=blur, steps=steps)
        for seen in SPREAD:
            base = distance(network, image, image, "smiling", seen)
            ours, theirs = (
                distance(network, image, protected, "smiling", seen) - base
                for protected in (spread, plain)
            )
            assert ours > 2 * theirs, str(seen)

    def test_a_known_blur_is_met_best_by_itself(self, image, network):
        known = GaussianBlur(sigma=1.5, window=11)
        fixed, spread = (
            protect(image, network, conditions="smiling", blur=blur) for blur in ("fixed", "spread")
        )
        ours, theirs = (
            distance(network, image, protected, "smiling", known) for protected in (fixed, spread)
        )
        assert ours > theirs

    @pytest.mark.parametrize(("blurs", "conditions"), [(9, 5), (9, 3), (9, 6), (1, 4), (9, 1)])
    def test_all_pairs_come_up_once_a_round_and_both_change_every_step(self, blurs, conditions):
        turns = [_turn(index, blurs, conditions) for index in range(2 * blurs * conditions)]
        half = len(turns) // 2
        assert len(set(turns[:half])) == half
        assert turns[half:] == turns[:half]
        assert [blur for blur, _ in turns[:blurs]] == list(range(blurs))
        assert {condition for _, condition in turns[:conditions]} == set(range(conditions))

    def test_computing_forgeries_again_changes_no_bit(self, image, network):
        settings = {"steps": 2, "blur": "eot", "conditions": "smiling,blond_hair"}
        kept, again = (
            protect(image, network, checkpoint=checkpoint, **settings)
            for checkpoint in (False, True)
        )
        assert torch.equal(kept, again)


class TestSettings:
    """Presets, and what is refused."""

    def test_presets_carry_the_papers_budget_in_levels(self):
        for name in ("paper", "ifgsm", "joint", "spread", "eot"):
            config = PRESETS[name]()
            assert (config.levels, config.step, config.steps) == (LEVELS, 1.275, 10)
        assert LEVELS == 0.05 * 255 / 2
        assert (PRESETS["fgsm"]().steps, PRESETS["ars"]().levels) == (1, 12.75)
        assert (PRESETS["ifgsm"]().start, PRESETS["paper"]().start) == ("zero", "uniform")

    @pytest.mark.parametrize("setting", ["aim", "classes", "blur"])
    def test_an_unknown_choice_is_refused(self, setting):
        with pytest.raises(ConfigError, match=setting):
            DisruptingConfig(**{setting: "other"})

    def test_steps_that_ask_for_different_things_are_not_compared(self):
        for settings in ({"keep": "best"}, {"patience": 3}):
            with pytest.raises(ConfigError, match="joint"):
                DisruptingConfig(**settings)
            with pytest.raises(ConfigError, match="spread"):
                DisruptingConfig(classes="joint", blur="spread", **settings)
            DisruptingConfig(classes="joint", blur="eot", **settings)

    @pytest.mark.parametrize("window", [0, 4, 2.5])
    def test_a_mean_filter_has_a_centre(self, window):
        with pytest.raises(ConfigError, match="odd"):
            MeanBlur(window=window)
