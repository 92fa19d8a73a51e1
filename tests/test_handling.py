"""Chains of attacks and purifiers: what they equal, how they are written, what is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness import attacks, handling, purifiers
from robustness.handling import Handling
from shields.errors import ConfigError, UnknownName, WeightsError
from tests.photos import smooth

CPU = torch.device("cpu")
PHOTO = (smooth(64, 48).astype(int) + np.random.default_rng(0).integers(-9, 9, (64, 48, 3))).clip(
    0, 255
).astype(np.uint8)  # fmt: skip


def load(text, store) -> Handling:
    return handling.load(text, store=store, device=CPU)


def test_a_jpeg_and_a_purifier_are_the_two_after_each_other(store) -> None:
    file = io.BytesIO()
    PillowImage.fromarray(PHOTO).save(file, "JPEG", quality=75)
    coded = np.array(PillowImage.open(file))
    purifier = purifiers.load("vae:small-portrait-ae", store=store, device=CPU)
    image = torch.from_numpy(coded).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = (purifier.autoencoder.reconstruct(image)[0] * 255).round().byte()
    found = load("jpeg:75+vae:small-portrait-ae", store).apply(PHOTO)
    assert np.array_equal(found, expected.permute(1, 2, 0).numpy())
    assert not np.array_equal(found, coded)


def test_order_counts(store) -> None:
    one = load("median:3+resize:0.5", store).apply(PHOTO)
    other = load("resize:0.5+median:3", store).apply(PHOTO)
    assert one.shape == other.shape == (32, 24, 3)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("text", ["none", "jpeg:60", "rotate:10", "drop:0.2+rotate:10+jpeg:75"])
def test_attacks_alone_do_what_they_do_without_purifiers(store, text) -> None:
    expected = attacks.parse(text).apply(PHOTO, seed=5)
    assert np.array_equal(load(text, store).apply(PHOTO, seed=5), expected)


def test_a_purifier_alone_does_what_it_does_by_itself(store) -> None:
    purifier = purifiers.load("noise-upscale", store=store, device=CPU)
    expected = purifier.apply(PHOTO, seed=7)
    assert np.array_equal(load("noise-upscale", store).apply(PHOTO, seed=7), expected)


def test_equal_seeds_give_equal_photos_and_others_do_not(store) -> None:
    chain = load("drop:0.2+noise-upscale", store)
    first, again, other = (chain.apply(PHOTO, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_photo_itself_is_left_as_it_is(store) -> None:
    before = PHOTO.copy()
    load("drop:0.5+median:3", store).apply(PHOTO)
    assert np.array_equal(PHOTO, before)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("jpeg+resize:0.5:bicubic", "jpeg:75+resize:0.5,kernel=bicubic"),
        (" median:5 + jpeg:75", "median:5+jpeg:75"),
        ("vae:autoencoder=small-portrait-ae", "vae:small-portrait-ae"),
    ],
)
def test_text_comes_back_in_one_way_of_writing(store, text, written) -> None:
    chain = load(text, store)
    assert str(chain) == written
    assert str(load(written, store)) == written


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("jpge:75", UnknownName, "did you mean jpeg"),
        ("jpeg:75+medain", UnknownName, "did you mean median"),
        ("jpeg:75+", ConfigError, "an attack is missing"),
        ("", ConfigError, "an attack is missing"),
        ("jpeg:quality=75,qualty=3", ConfigError, "did you mean quality"),
        ("median:two", ConfigError, "must be a whole number"),
    ],
)
def test_mistakes_are_told_without_loading_anything(store, text, error, said) -> None:
    with pytest.raises(error, match=said):
        handling.check(text)
    with pytest.raises(error, match=said):
        load(text, store)


def test_a_good_text_passes_the_check_though_its_weights_are_absent(store) -> None:
    handling.check("jpeg:75+vae:taesd")
    with pytest.raises((WeightsError, UnknownName)):
        load("jpeg:75+vae:taesd", store)


def test_chains_can_share_a_purifier(store) -> None:
    made = []

    def make(text):
        made.append(text)
        return purifiers.load(text, store=store, device=CPU)

    chain = handling.load("jpeg:75+median:3", store=store, device=CPU, purifier=make)
    assert made == ["median:3"]
    assert np.array_equal(chain.apply(PHOTO), load("jpeg:75+median:3", store).apply(PHOTO))
