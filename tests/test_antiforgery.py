"""Anti-Forgery: the way to Lab and back, its two bounds, and the walk on the a and b axes."""

import numpy as np
import pytest
import torch
from skimage import color

from shields.errors import ConfigError
from shields.models.manipulation import wrap
from shields.protectors.antiforgery import AntiForgery, AntiForgeryConfig, from_lab, to_lab
from shields.protectors.disrupting import Disrupting, DisruptingConfig
from tests import tiny
from tests.climbing import generator

SIZE = 32
#: a unit of a or b, in levels of their axes
UNIT = 255 / 220


@pytest.fixture(scope="module")
def image():
    """A face with black, white and pure colours in its corners."""
    image = tiny.faces_image(1, SIZE)
    image[..., :4, :4], image[..., -4:, -4:] = 0, 1
    image[..., :4, -4:] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    image[..., -4:, :4] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    return image


@pytest.fixture(scope="module")
def face():
    """A face whose colours have room on all sides."""
    return 0.25 + 0.5 * tiny.faces_image(1, SIZE)


@pytest.fixture(scope="module")
def network():
    return tiny.manipulator()


def run(image, network, mask=None, seed=0, **settings):
    config = AntiForgeryConfig(**({"steps": 8, "step": 2.0} | settings))
    return AntiForgery(config, manipulator=network)(image, mask, rng=generator(seed))


def disruption(image, network, protected):
    protector = Disrupting(manipulator=network)
    return float(protector.evaluate(image, protected, torch.ones_like(image[:, :1])))


def lightness(image, protected):
    return (to_lab(protected) - to_lab(image))[:, 0].abs()


def colours(count=4096):
    """Random colours, the corners of the cube, greys, and all about the bends of the curves."""
    bends = torch.tensor([0.0, 1e-6, 0.0031308, 0.008856, 0.04044, 0.04045, 0.04046, 0.2, 1.0])
    cube = torch.cartesian_prod(bends, bends, bends)
    return torch.cat([torch.rand(count, 3, generator=generator()), cube]).T[None, :, :, None]


class TestLab:
    """The conversion."""

    def test_it_agrees_with_scikit_image(self):
        rgb = colours()
        reference = color.rgb2lab(rgb[0, :, :, 0].T.double().numpy())
        ours = to_lab(rgb)[0, :, :, 0].T.double().numpy()
        assert np.abs(ours - reference).max() < 0.02

    def test_the_way_there_and_back_is_the_identity(self):
        rgb = colours()
        assert (from_lab(to_lab(rgb)) - rgb).abs().max() < 1e-5

    def test_greys_have_no_colour(self):
        grey = torch.linspace(0, 1, 256).expand(1, 3, 1, 256)
        lab = to_lab(grey)
        assert lab[:, 1:].abs().max() < 1e-3
        assert lab[0, 0, 0, [0, -1]].tolist() == pytest.approx([0, 100], abs=1e-4)

    def test_gradients_are_finite_and_those_of_small_differences(self):
        rgb = colours(16).requires_grad_(True)
        to_lab(rgb).sum().backward()
        assert rgb.grad.isfinite().all()
        lab = to_lab(colours(16)).detach().requires_grad_(True)
        from_lab(lab).sum().backward()
        assert lab.grad.isfinite().all()
        few = torch.rand(1, 3, 2, 2, generator=generator(), dtype=torch.float64)
        assert torch.autograd.gradcheck(to_lab, (few.requires_grad_(True),))
        assert torch.autograd.gradcheck(from_lab, (to_lab(few).detach().requires_grad_(True),))

    def test_half_precision_around_it_does_not_reach_it(self):
        rgb = colours(64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = from_lab(to_lab(rgb))
        assert torch.equal(inside, from_lab(to_lab(rgb)))


class TestOurs:
    """Inside a budget of RGB levels as well as one of Lab."""

    @pytest.mark.parametrize("levels", [2.0, 8.0])
    def test_it_disrupts_twice_as_much_as_noise_of_its_budget(self, levels, face, network):
        change = run(face, network, levels=levels, steps=12)
        noise = (torch.rand(face.shape, generator=generator(9)) * 2 - 1) * levels / 255
        theirs = disruption(face, network, face + noise)
        assert disruption(face, network, face + change) > 2 * theirs

    @pytest.mark.parametrize("update", ["adam", "sign"])
    @pytest.mark.parametrize("levels", [0.5, 3.0, 8.0])
    def test_both_budgets_hold(self, levels, update, image, network):
        change = run(image, network, levels=levels, update=update, chroma=4.0)
        assert change.abs().max() <= levels / 255 + 1e-7
        assert change.abs().max() > 0.9 * levels / 255
        assert ((image + change) >= 0).all()
        assert ((image + change) <= 1).all()
        inner = image[..., 4:-4, 4:-4]
        moved = (to_lab(image + change)[..., 4:-4, 4:-4] - to_lab(inner))[:, 1:].abs()
        assert moved.max() < 4.01

    def test_lightness_moves_far_less_than_under_a_walk_in_rgb(self, image, network):
        change = run(image, network)
        config = DisruptingConfig(steps=8, step=2.0)
        plain = Disrupting(config, manipulator=network)(image, rng=generator())
        inner = (..., slice(4, -4), slice(4, -4))
        ours, theirs = (
            lightness(image[inner], (image + moved)[inner]) for moved in (change, plain)
        )
        assert ours.mean() < theirs.mean() / 10
        assert ours.max() < 0.3

    def test_a_euclidean_budget_holds(self, image, network):
        change = run(image, network, norm="l2", levels=100.0)
        assert 50 / 255 < change.norm() <= 100 / 255 * (1 + 1e-5)

    def test_a_mask_keeps_its_pixels(self, image, network):
        mask = torch.ones_like(image[:, :1])
        mask[..., :20] = 0
        change = run(image, network, mask)
        assert (change[..., :20] == 0).all()
        assert change[..., 20:].any()

    def test_no_budget_means_no_change(self, image, network):
        assert not run(image, network, levels=0.0).any()
        assert not run(image, network, levels=0.0, norm="none").any()

    def test_equal_seeds_give_equal_bits_and_others_do_not(self, image, network):
        first, again, other = (run(image, network, seed=seed, steps=2) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_it_runs_under_handling_and_in_half_precision(self, image, network):
        for settings in ({"robust": True, "draws": 2}, {"precision": "bfloat16"}):
            change = run(image, network, **settings)
            assert disruption(image, network, image + change) > 0

    def test_rounding_shows_the_manipulator_whole_levels(self, image):
        seen = []

        def watched(view):
            seen.append(view.detach() * 255)
            return (3 * view).sin()

        run(image, wrap(watched, native_range="unit"), rounding=True, steps=3)
        walked = seen[1:]  # the first is the clean photo
        assert len(walked) == 3
        assert all((view - view.round()).abs().max() < 1e-3 for view in walked)


class TestFaithful:
    """As the code has it: a and b alone, no bound in RGB."""

    def test_it_touches_the_colour_channels_alone(self, face, network):
        config = AntiForgeryConfig.faithful()
        settings = config.to_dict() | {"steps": 6, "step": UNIT}
        change = run(face, network, **settings)
        moved = to_lab(face + change) - to_lab(face)
        assert moved[:, 0].abs().max() < 1e-3
        assert 1 < moved[:, 1:].abs().max() < 5.5 + 1e-3
        assert disruption(face, network, face + change) > 0.01

    def test_offsets_are_bounded_in_lab(self, face, network):
        settings = AntiForgeryConfig.faithful().to_dict() | {"steps": 4, "step": 5 * UNIT}
        moved = to_lab(face + run(face, network, **settings)) - to_lab(face)
        assert moved[:, 1:].abs().max() == pytest.approx(5.5, abs=1e-3)

    def test_its_hundred_steps_get_to_a_fifth_of_the_bound_and_the_papers_to_all_of_it(self):
        code, paper = AntiForgeryConfig.faithful(), AntiForgeryConfig.paper()
        assert (code.steps * code.step / UNIT) / code.chroma == pytest.approx(0.2)
        assert (paper.steps * paper.step / UNIT) / paper.chroma == pytest.approx(1)
        assert code.chroma == pytest.approx(0.05 * 110)
        assert code.step / UNIT / 110 == pytest.approx(1e-4)

    def test_its_first_step_is_whole_although_only_rounding_errors_lead_it(self, face, network):
        settings = AntiForgeryConfig.faithful().to_dict() | {"steps": 1, "step": UNIT}
        moved = (to_lab(face + run(face, network, **settings)) - to_lab(face))[:, 1:].abs()
        # Adam's step has the length of the learning rate, however small the gradient.
        assert 0.9 < moved.max() < 1 + 1e-3


@pytest.mark.parametrize("chroma", [0.0, -1.0, 111.0, float("nan")])
def test_a_bound_that_makes_no_sense_is_refused(chroma):
    with pytest.raises(ConfigError, match="chroma"):
        AntiForgeryConfig(chroma=chroma)


def test_the_walk_is_in_lab_and_nowhere_else():
    with pytest.raises(ConfigError, match="space"):
        AntiForgeryConfig(space="tanh", update="adam")
