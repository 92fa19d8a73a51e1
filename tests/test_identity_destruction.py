"""The Identity Destruction Module's terms, worked out by hand, and their signs in training."""

import math

import pytest
import torch

from shields.errors import ConfigError
from shields.models.manipulation import wrap
from tests import tiny
from trainers.identity_destruction import (
    DestructionConfig,
    Terms,
    View,
    compare,
    feature_distance,
    gain,
    identity_similarity,
    look,
    masked_distance,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def half(size=4):
    """A mask of the left half."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2] = 1
    return mask


def test_a_masked_distance_counts_the_mask_in_signed_units():
    clean = torch.zeros(2, 3, 4, 4)
    moved = clean.clone()
    moved[1, :, :, :2] = 0.25  # inside
    moved[:, :, :, 2:] = 0.5  # outside: of no account
    found = masked_distance(clean, moved, half())
    # (2 * 0.25)^2 on half of the pixels.
    torch.testing.assert_close(found, torch.tensor([0.0, 0.125]))


def test_a_heat_map_weighs_before_squaring():
    mask = torch.full((1, 1, 4, 4), 0.5)
    found = masked_distance(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), mask)
    torch.testing.assert_close(found, torch.tensor([1.0]))


def test_embeddings_are_compared_by_their_angle():
    clean = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    other = torch.tensor([[3.0, 3.0], [0.0, 2.0]])
    torch.testing.assert_close(
        identity_similarity(clean, other), torch.tensor([math.sqrt(0.5), 0.0])
    )


def test_feature_maps_are_compared_at_every_place():
    clean = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    other = clean.clone()
    other[0, :, 0, 0] = torch.tensor([0.0, 5.0])  # one place of four at a right angle
    other[0, :, 1, 1] = torch.tensor([-7.0, 0.0])  # one turned round
    torch.testing.assert_close(identity_similarity(clean, other), torch.tensor([0.25]))


def test_feature_confusion_sees_the_resized_mask():
    clean, moved = torch.zeros(1, 5, 2, 2), torch.ones(1, 5, 2, 2)
    # Corners of the mask are the corners of the small one.
    torch.testing.assert_close(feature_distance(clean, moved, half()), torch.tensor([0.5]))
    torch.testing.assert_close(feature_distance(clean, 3 * moved, half()), torch.tensor([4.5]))


@pytest.mark.parametrize(("masks", "wanted"), [("sum", 2.0 + 1.0), ("product", 0.5)])
def test_masks_are_added_or_multiplied(masks, wanted):
    config = DestructionConfig(masks=masks)
    clean, moved = (View(forgery=torch.full((1, 3, 4, 4), value)) for value in (0.0, 1.0))
    heat = torch.full((1, 1, 4, 4), 0.5)
    terms = compare(clean, moved, half(), heat, config)
    # binary: 4 on half of the pixels; heat: 4 * 0.25; both: 4 * 0.25 on half of them.
    torch.testing.assert_close(terms.mask, torch.tensor([wanted]))
    torch.testing.assert_close(terms.heat, torch.tensor([1.0]))
    assert terms.identity.tolist() == terms.features.tolist() == [0]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (DestructionConfig.code(), 0.4 - 0.1 * 0.8 + 0.01 * 3.0),
        (DestructionConfig.paper(), 0.4 - 0.8 + 3.0),
    ],
)
def test_presets_weigh_as_they_say(config, wanted):
    values = {"mask": 0.4, "heat": 9.0, "identity": 0.8, "features": 3.0}
    terms = Terms(**{name: torch.tensor([value]) for name, value in values.items()})
    torch.testing.assert_close(gain(terms, config), torch.tensor([wanted]))


@pytest.mark.parametrize("compared", ["embedding", "map"])
def test_a_view_of_the_same_photo_has_no_distance_and_full_similarity(compared):
    config = DestructionConfig(compared=compared)
    image = torch.rand(2, 3, 32, 32, generator=rng())
    settings = {"recognizer": tiny.recognizer()}
    views = [look(tiny.manipulator(), image, "smiling", config, **settings) for _ in range(2)]
    mask = torch.ones(2, 1, 32, 32)
    terms = compare(*views, mask, mask, config)
    torch.testing.assert_close(terms.identity, torch.ones(2))
    assert terms.mask.tolist() == terms.features.tolist() == [0, 0]
    assert views[0].identity.ndim == (2 if compared == "embedding" else 4)


def test_what_does_not_count_is_not_computed():
    config = DestructionConfig(identity=0, features=0)
    view = look(tiny.manipulator(), torch.rand(1, 3, 16, 16, generator=rng()), "", config)
    assert view.identity is None
    assert view.features is None


def test_a_manipulator_without_features_loses_that_term_only():
    config = DestructionConfig(identity=0)
    twice = wrap(lambda image: 2 * image, native_range="unit")
    image = torch.rand(1, 3, 16, 16, generator=rng())
    views = [look(twice, photo, "", config) for photo in (image, image / 2)]
    mask = torch.ones(1, 1, 16, 16)
    terms = compare(*views, mask, mask, config)
    assert terms.features.tolist() == [0]
    torch.testing.assert_close(terms.mask, (2 * image).square().mean().view(1))


def test_identities_want_a_recognizer():
    with pytest.raises(ConfigError, match="pass a recognizer"):
        look(tiny.manipulator(), torch.rand(1, 3, 16, 16), "", DestructionConfig())


@pytest.mark.parametrize(
    "wrong", [{"masks": "both"}, {"compared": "face"}, {"mask": -1.0},
              {"mask": 0, "identity": 0, "features": 0}],
)  # fmt: skip
def test_settings_are_checked(wrong):
    with pytest.raises(ConfigError):
        DestructionConfig(**wrong)


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_climbing_moves_every_term_the_right_way(preset):
    config = getattr(DestructionConfig, preset)()
    manipulator, recognizer = tiny.manipulator(), tiny.recognizer()
    image = torch.rand(1, 3, 32, 32, generator=rng())
    binary = torch.zeros(1, 1, 32, 32)
    binary[..., 8:24, 8:24] = 1
    heat = torch.rand(1, 1, 32, 32, generator=rng(1))
    with torch.no_grad():
        clean = look(manipulator, image, "smiling", config, recognizer=recognizer)
    moved = (torch.rand(image.shape, generator=rng(2)) - 0.5) / 255
    history = []
    for _ in range(20):
        moved = moved.detach().requires_grad_(True)
        seen = look(manipulator, image + moved, "smiling", config, recognizer=recognizer)
        terms = compare(clean, seen, binary, heat, config)
        history.append(terms)
        (slope,) = torch.autograd.grad(gain(terms, config).sum(), moved)
        moved = (moved + slope.sign() / 255).clamp(-12 / 255, 12 / 255)
    first, last = history[0], history[-1]
    assert last.mask > 2 * first.mask
    assert last.features > 2 * first.features
    assert last.identity < first.identity
