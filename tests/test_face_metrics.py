"""Likeness, recognition and ID-Guard's measures of faces, against what they are made of."""

import math
from pathlib import Path

import pytest
import torch

from robustness.metrics import Scene, load
from robustness.metrics.faces import Defended, Detected, Likeness, Recognised, face_error
from shields.errors import ConfigError
from shields.masks import components
from shields.metrics import identity
from shields.weights import WeightStore
from tests import tiny

CPU = torch.device("cpu")
SHARED = Path(__file__).parents[1].parent / "shared"


def built(text, store=None):
    measure, _ = load(text, store=store or WeightStore(), device=CPU)
    return measure


@pytest.fixture
def pair():
    """Two batches of faces, the second a little different, and where the faces are."""
    image = tiny.faces_image(3, 64, 1)
    other = (image + 0.1 * tiny.faces_image(3, 64, 2) - 0.05).clamp(0, 1)
    return image, other, tiny.landmarks(3, 64)


# --- the face's error ----------------------------------------------------------------------------


def test_the_error_over_the_face_is_a_mean_over_its_pixels_and_channels():
    points = tiny.landmarks(1, 64)
    mask = components(points, (64, 64), ["face"])
    clean = torch.full((1, 3, 64, 64), 0.5)
    inside = clean + torch.tensor([0.3, 0.0, 0.0]).view(3, 1, 1) * mask
    outside = clean + 0.4 * (1 - mask)
    # 0.3 in [0, 1] is 0.6 in [-1, 1]; one channel of three
    assert float(face_error(inside, clean, points)) == pytest.approx(0.36 / 3, rel=1e-5)
    assert float(face_error(outside, clean, points)) == 0


def test_the_error_counts_pixel_by_pixel(pair):
    image, other, points = pair
    values = face_error(image, other, points)
    for row in range(3):
        mask = components(points[row : row + 1], (64, 64), ["face"])[0, 0].bool()
        gaps = [(2 * (image[row, c] - other[row, c]))[mask] ** 2 for c in range(3)]
        assert float(values[row]) == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-5)


def test_without_a_face_there_is_no_error_of_one(pair):
    image, other, points = pair
    points[1] = torch.nan
    values = face_error(image, other, points)
    assert values.isnan().tolist() == [False, True, False]
    points[1] = points[0] + 1000  # a face, but not in the image
    assert face_error(image, other, points).isnan().tolist() == [False, True, False]
    measure = built("l2-face@edits")
    assert measure.measure(image, other, Scene(clean=other)).isnan().all()
    assert "no face" in measure.undefined


# --- likeness ------------------------------------------------------------------------------------


def test_likeness_is_the_cosine_of_aligned_embeddings(pair):
    image, other, points = pair
    network = tiny.recognizer()
    found = Likeness(network).measure(image, other, Scene(clean=other, landmarks=points))
    expected = identity(image, other, network, network.matrix(points, image))
    assert torch.allclose(found, expected, atol=1e-6)
    one_by_one = [
        Likeness(network).measure(
            image[[row]], other[[row]], Scene(clean=other[[row]], landmarks=points[[row]])
        )
        for row in range(3)
    ]
    assert torch.allclose(found, torch.cat(one_by_one), atol=1e-5)
    facts = Likeness(network).facts("source")
    assert facts.higher is False
    assert "tiny-recognizer-0" in facts.summary
    assert "one person above 0.5" in facts.summary


def test_a_photo_without_a_face_has_no_likeness(pair):
    image, other, points = pair
    points[2] = torch.nan
    found = Likeness(tiny.recognizer()).measure(image, other, Scene(clean=other, landmarks=points))
    assert found.isnan().tolist() == [False, False, True]
    nowhere = Likeness(tiny.recognizer()).measure(image, other, Scene(clean=other))
    assert nowhere.isnan().all()


def test_embeddings_of_references_are_kept_with_their_landmarks(pair):
    """Shown by a lie: another image under a known digest is not looked at."""
    image, other, points = pair
    measure, keys = Likeness(tiny.recognizer()), ("a", "b", "c")
    honest = measure.measure(image, other, Scene(clean=other, landmarks=points, keys=keys))
    lie = torch.zeros_like(other)
    kept = measure.measure(image, lie, Scene(clean=other, landmarks=points, keys=keys))
    moved = measure.measure(image, lie, Scene(clean=other, landmarks=points + 3, keys=keys))
    assert torch.allclose(kept, honest, atol=1e-6)
    assert not torch.allclose(moved, honest, atol=1e-3)


def test_recognition_is_likeness_above_the_threshold_of_the_card(pair):
    image, other, points = pair
    network = tiny.recognizer()
    where = Scene(clean=other, landmarks=points)
    likeness = Likeness(network).measure(image, other, where)
    network.threshold = float(likeness.sort().values[:2].mean())
    measure = Recognised(network)
    assert torch.equal(measure.measure(image, other, where), (likeness > network.threshold).float())
    assert measure.measure(image, other, where).sum() == 2
    assert f"{network.threshold:g}, the threshold of its card" in measure.facts("source").summary


def test_the_threshold_of_the_embedded_recognizer_is_that_of_its_card():
    threshold = WeightStore().card("face-embedder").results["threshold"]
    assert (
        f"above {threshold:g}" in built("recognised:face-embedder@source").facts("source").summary
    )


def test_a_recognizer_must_be_named_and_must_know_its_threshold(store):
    for text in ("fr@source", "recognised@source", "dsr@edits", "fd@edits"):
        with pytest.raises(ConfigError, match="Name a recognizer"):
            built(text, store)
    with pytest.raises(ConfigError, match="tells no `threshold`"):
        built("recognised:small-arcface-ir@source", store)
    assert "one person" not in built("fr:small-arcface-ir@source", store).facts("edits").summary


# --- defence success -----------------------------------------------------------------------------


class Fixed(tiny.TinyRecognizer):
    """Embeds the mean colour's angle: the cosine is known."""

    def _embed(self, face):
        angle = face.mean(dim=(1, 2, 3)) * math.pi
        return torch.stack([angle.cos(), angle.sin()], dim=1)


@pytest.mark.parametrize(
    ("change", "reached"),
    # cosines of 0.90, 0.50 and 0.29; squared errors in [-1, 1] of 0.08, 0.44 and 0.65
    [(0.142, 0), (1 / 3, 0), (0.405, 1)],
)
def test_a_face_is_defended_where_it_is_disrupted_and_no_longer_alike(change, reached):
    network = Fixed()
    network.freeze()
    clean = torch.full((1, 3, 64, 64), 0.3)
    where = Scene(clean=clean, landmarks=tiny.landmarks(1, 64))
    image = clean + change
    likeness = float(Likeness(network).measure(image, clean, where))
    assert likeness == pytest.approx(math.cos(change * math.pi), abs=0.02)
    measure = Defended(network)
    assert measure.measure(image, clean, where).tolist() == [reached]
    assert measure.facts("edits").higher is True


def test_a_face_that_is_unlike_but_hardly_changed_is_not_defended(pair):
    """Both thresholds count: the error decides here."""
    image, other, points = pair
    network = tiny.recognizer()
    where = Scene(clean=other, landmarks=points)
    errors = face_error(image, other, points)
    assert float(errors.max()) < 0.05
    unlike = tiny.faces_image(3, 64, 9)
    far = face_error(unlike, other, points)
    alike = Likeness(network).measure(unlike, other, where)
    expected = ((far > 0.05) & (alike < 0.4)).float()
    assert torch.equal(Defended(network).measure(unlike, other, where), expected)
    assert Defended(network).measure(image, other, where).sum() == 0


def test_a_missing_face_is_neither_defended_nor_lost(pair):
    image, other, points = pair
    points[0] = torch.nan
    found = Defended(tiny.recognizer()).measure(image, other, Scene(clean=other, landmarks=points))
    assert found.isnan().tolist() == [True, False, False]


# --- faces that move -----------------------------------------------------------------------------


def portrait():
    """A portrait (1, 3, 256, 256) and its landmarks."""
    from shields.photo import read

    folder = SHARED / "data" / "celeba-hq-sample"
    files = sorted(folder.rglob("*.jpg")) + sorted(folder.rglob("*.png"))
    if not files:
        pytest.skip("no portraits beside the project")
    image = read(files[0]).image()
    image = torch.nn.functional.interpolate(image, (256, 256), mode="area")
    return image, torch.as_tensor(tiny.detector()(image)[0].landmarks).float()[None]


def test_a_moved_face_is_recognised_where_each_is_aligned_on_its_own():
    image, points = portrait()
    moved = image.roll((16, -24), dims=(2, 3))
    where = Scene(clean=image, landmarks=points)
    clean, own = (
        float(built(f"fr:face-embedder{text}@handled").measure(moved, image, where))
        for text in ("", ",align=own")
    )
    assert own > 0.8
    assert clean < own - 0.3


def test_a_face_that_is_gone_is_told_apart_from_one_that_is_unlike():
    image, points = portrait()
    both, grey = torch.cat([image, image]), torch.full_like(image, 0.5)
    judged = torch.cat([image, grey])
    where = Scene(clean=both, landmarks=torch.cat([points, points]))
    assert Detected(tiny.detector()).measure(judged, both, where).tolist() == [1, 0]
    alike = built("fr:face-embedder,align=own@source").measure(judged, both, where)
    assert float(alike[0]) == pytest.approx(1, abs=1e-4)
    assert alike[1].isnan()
