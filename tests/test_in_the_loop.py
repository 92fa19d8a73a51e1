"""Purifiers in a protector's loop: their values, their gradients, and what a defender gains."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from robustness.purifiers import Purifier
from robustness.purifiers.classical import Gaussian, GaussianConfig, NoiseUpscale, RoundTrip
from robustness.purifiers.in_the_loop import PurifierTransform, against
from robustness.purifiers.tip_rsr import TipRsr, TipRsrConfig
from shields.budget import Budget
from shields.errors import ConfigError
from shields.pgd import PgdConfig, pgd
from shields.transforms import ROBUST, OneOf
from tests import tiny
from tests.test_super_resolution import Finder, face, restorer


class Posterise(Purifier):
    """Sixteen values a colour: nothing that a gradient could pass."""

    def _purify(self, image, rng):
        return (image * 15).round().detach() / 15


def tip_rsr():
    return TipRsr(TipRsrConfig(), general=restorer(), face=restorer(2, 1),
                  finder=Finder([face(48)]))  # fmt: skip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gradient", ["straight", "real"])
@pytest.mark.parametrize("make", [Gaussian, NoiseUpscale, tip_rsr], ids=lambda kind: kind.__name__)
def test_the_value_is_the_purifiers_own(make, gradient) -> None:
    purifier, image = make(), tiny.faces_image(1, 48).requires_grad_(True)
    transform = PurifierTransform(purifier=purifier, gradient=gradient)
    with torch.no_grad():
        expected = purifier.purify(image.detach(), seed=5)
    gap = (transform.apply(image, seed=5).detach() - expected).abs()
    # With a gradient Lanczos is computed another way, and a rounding to levels may fall otherwise.
    assert float(gap.max()) < 1.5 / 255
    assert float(gap.mean()) < 1e-5
    with torch.no_grad():
        assert torch.equal(transform.apply(image, seed=5), expected)


def test_straight_hands_the_gradient_on_as_it_is() -> None:
    image = tiny.faces_image(2, 24).requires_grad_(True)
    weights = torch.rand(image.shape, generator=rng())
    made = PurifierTransform(purifier=Posterise(), gradient="straight").apply(image)
    (gradient,) = torch.autograd.grad((made * weights).sum(), image)
    assert torch.equal(gradient, weights)


def test_real_is_the_gradient_of_the_purifier() -> None:
    image = tiny.faces_image(1, 32).requires_grad_(True)
    purifier = RoundTrip(tiny.autoencoder())
    made = PurifierTransform(purifier=purifier).apply(image)
    gradients = [
        torch.autograd.grad(value.square().sum(), image)[0]
        for value in (made, purifier.autoencoder.reconstruct(image))
    ]
    torch.testing.assert_close(*gradients)


def test_the_gradient_through_tip_rsr_agrees_with_differences() -> None:
    # Only what lies outside the face: in it the codec's gradient is the identity's, by design.
    purifier = TipRsr(TipRsrConfig(), general=restorer(), face=restorer(2, 1), finder=Finder([]))
    image, towards = tiny.faces_image(1, 32), tiny.faces_image(1, 32, seed=3) - 0.5
    transform = PurifierTransform(purifier=purifier)
    start = image.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(transform.apply(start).square().sum(), start)
    with torch.no_grad():
        ends = [
            transform.apply(image + step * towards).double().square().sum()
            for step in (-1e-2, 1e-2)
        ]
    measured = float(ends[1] - ends[0]) / 2e-2
    assert float((gradient * towards).sum()) == pytest.approx(measured, rel=0.02)


def test_a_purifier_without_gradient_is_refused_with_advice() -> None:
    image = tiny.faces_image(1, 24).requires_grad_(True)
    with pytest.raises(ConfigError, match=r"through Posterise.*straight"):
        PurifierTransform(purifier=Posterise()).apply(image)
    with pytest.raises(ConfigError, match="gradient"):
        PurifierTransform(purifier=Posterise(), gradient="checkpointed")


def test_what_a_purifier_draws_is_drawn_anew_from_the_loops_generator() -> None:
    image, draws = tiny.faces_image(1, 24), rng()
    transform = PurifierTransform(purifier=NoiseUpscale())
    first, second = transform(image, draws), transform(image, draws)
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.equal(first, transform(image, rng()))


def test_rounding_errors_beyond_the_range_are_no_mistake() -> None:
    image = torch.full((1, 3, 16, 16), 1.0) + 2e-7
    assert float(PurifierTransform(purifier=Gaussian()).apply(image).max()) == pytest.approx(1)


def test_a_defender_who_knows_the_purifier_keeps_more_through_it() -> None:
    """Climb a random direction of fine and coarse detail; the blur leaves only the coarse one."""
    image = torch.full((1, 3, 32, 32), 0.5)
    fine = torch.randn(image.shape, generator=rng(1))
    coarse = functional.interpolate(fine[..., :4, :4], (32, 32), mode="bilinear")
    # The fine part is worth more to who does not know what will become of it.
    wanted = 2 * fine + coarse
    purifier = Gaussian(GaussianConfig(sigma=2.0))

    def gain(view, step=None):
        return (view * wanted).flatten(1).sum(dim=1)

    def protected(transform):
        config = PgdConfig(steps=20, step=1.0, start="zero")
        found = pgd(image, gain, Budget(levels=8.0), config, mask=torch.ones_like(image[:, :1]),
                    rng=rng(), transform=transform)  # fmt: skip
        return image + found

    reached = {
        name: float(gain(purifier.purify(protected(transform)) - image))
        for name, transform in {
            "unaware": None,
            "aware": PurifierTransform(purifier=purifier),
            "straight": PurifierTransform(purifier=purifier, gradient="straight"),
        }.items()
    }
    assert reached["aware"] > 1.2 * reached["unaware"]
    # A linear filter has the same gradient everywhere, and the identity's is the unaware one's.
    assert reached["straight"] == pytest.approx(reached["unaware"], rel=1e-3)


def test_against_mixes_purifiers_with_everyday_handling() -> None:
    purifiers = Gaussian(), NoiseUpscale()
    mixed = against(*purifiers, gradient="straight", share=0.4)
    assert isinstance(mixed, OneOf)
    shares = dict(zip(mixed.members, mixed.weights, strict=True))
    assert sum(mixed.weights) == pytest.approx(1)
    assert [shares[member] for member in ROBUST.members] == pytest.approx(
        [0.6 * weight for weight in ROBUST.weights]
    )
    assert mixed.weights[-2:] == pytest.approx((0.2, 0.2))
    assert [member.purifier for member in mixed.members[-2:]] == list(purifiers)
    view = mixed(tiny.faces_image(2, 24).requires_grad_(True), rng())
    assert view.shape == (2, 3, 24, 24)


@pytest.mark.parametrize(("purifiers", "share"), [((), 0.5), ((Gaussian(),), 1.5)])
def test_against_nothing_or_more_than_always_is_refused(purifiers, share) -> None:
    with pytest.raises(ConfigError, match="share"):
        against(*purifiers, share=share)
