"""Masks: drawn from landmarks, made of labels, softened, and carried through every transform."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from shields.errors import ConfigError, ImageError, UnknownName
from shields.masks import (
    CLASSES,
    FACE,
    ID_GUARD_BINARY,
    PARTS,
    TIP_RSR_FACE,
    components,
    feather,
    from_labels,
)
from shields.transforms import (
    TRANSFORMS,
    AffineJitter,
    CompressResize,
    Crop,
    Identity,
    Jpeg,
    OneOf,
    Resize,
    Rotate,
    Sequence,
    Transform,
)
from tests import tiny

DRAWN = ("face", "brows", "eyes", "nose", "mouth", "lips")
SIZE = 128


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def turned(points: torch.Tensor, degrees: float, centre: float) -> torch.Tensor:
    """Turn points clockwise as seen, y down, about (centre, centre)."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rotation = torch.tensor([[cosine, -sine], [sine, cosine]])
    return (points - centre) @ rotation.T + centre


def looked_up(mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Nearest values of (H, W) at (N, 2) x, y; 0 outside."""
    x, y = places.round().long().unbind(-1)
    height, width = mask.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.where(inside, mask[y.clamp(0, height - 1), x.clamp(0, width - 1)], 0)


def overlap(mask: torch.Tensor, other: torch.Tensor) -> float:
    """Intersection over union."""
    return float(torch.minimum(mask, other).sum() / torch.maximum(mask, other).sum())


# --- from landmarks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("degrees", [30.0, -75.0, 180.0])
def test_a_drawn_mask_turns_with_the_face(name, degrees) -> None:
    points = tiny.landmarks(1, SIZE)
    upright = components(points, (SIZE, SIZE), [name])[0, 0]
    centre = (SIZE - 1) / 2
    result = components(turned(points, degrees, centre), (SIZE, SIZE), [name])[0, 0]
    # Every pixel of the turned mask is asked for at the place from where it came.
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    places = torch.stack([x, y], dim=-1).view(-1, 2).float()
    expected = looked_up(upright, turned(places, -degrees, centre)).view(SIZE, SIZE)
    assert overlap(result, expected) > 0.85  # thin parts have much of an edge
    if name != "face":  # nearly round, and it covers most of the photo
        assert overlap(result, upright) < 0.8


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawn_mask_scales_and_moves_with_the_face(name) -> None:
    points = tiny.landmarks(1, 64)
    small = components(points, (64, 64), [name])
    large = components(2 * points + 0.5, (128, 128), [name])
    grown = functional.interpolate(small, scale_factor=2.0, mode="nearest")
    assert overlap(large, grown) > 0.8
    moved = components(points + torch.tensor([5.0, -3.0]), (64, 64), [name])
    assert torch.equal(moved[..., 5:50, 10:], small[..., 8:53, 5:-5])


def test_landmarks_lie_in_their_parts() -> None:
    points = tiny.landmarks(3, SIZE, seed=2)
    for name, which in {"eyes": (0, 1), "nose": (2,), "lips": (3, 4), "face": range(5)}.items():
        masks = components(points, (SIZE, SIZE), [name])
        for mask, five in zip(masks[:, 0], points, strict=True):
            assert looked_up(mask, five[list(which)]).min() == 1, name
    brows = components(points, (SIZE, SIZE), ["brows"])
    eyes = components(points, (SIZE, SIZE), ["eyes"])
    rows = torch.arange(SIZE).view(1, 1, -1, 1)
    assert not (brows * eyes).any()
    for brow, eye in zip(brows, eyes, strict=True):
        assert (brow * rows).sum() / brow.sum() < (eye * rows).sum() / eye.sum() - 5


@pytest.mark.parametrize("turn", [0.0, 0.6, 0.95])
def test_nothing_lies_outside_the_hull(turn) -> None:
    points = tiny.landmarks(2, SIZE)
    middle = points.mean(dim=1, keepdim=True)
    # a head that turns away: the eyes come together, the tip of the nose goes to the side
    points = middle + (points - middle) * torch.tensor([1 - turn, 1.0])
    points[:, 2, 0] += 25 * turn
    hull = components(points, (SIZE, SIZE), ["face"])
    for name in DRAWN:
        mask = components(points, (SIZE, SIZE), [name])
        assert mask.any()
        assert (mask <= hull).all(), name
    # it stays as high as it is, though the eyes seem close
    rows = hull[0, 0].any(dim=1).sum()
    assert 0.6 * SIZE < int(rows) < 0.95 * SIZE


def test_known_proportions() -> None:
    """Pupils 40 pixels apart: a face of 90 by 116 pixels, from forehead to chin."""
    points = torch.tensor([[[80.0, 80], [120, 80], [100, 103], [85, 126], [115, 126]]])
    hull = components(points, (240, 200), ["face"])[0, 0]
    rows, columns = (hull.any(dim=side).nonzero().flatten() for side in (1, 0))
    assert int(columns[-1] - columns[0]) == pytest.approx(2 * 1.12 * 40, abs=2)
    assert int(rows[-1] - rows[0]) == pytest.approx(2 * 1.45 * 40, abs=2)
    assert int(rows[0]) < 80 - 30
    assert int(rows[-1]) > 126 + 20
    eyes = components(points, (240, 200), ["eyes"])
    assert float(eyes.sum()) == pytest.approx(2 * math.pi * 12 * 6.4, rel=0.04)


def test_parts_unite_and_a_preset_is_its_parts() -> None:
    points = tiny.landmarks(2, SIZE)
    apart = torch.stack([components(points, (SIZE, SIZE), [name]) for name in ID_GUARD_BINARY])
    together = components(points, (SIZE, SIZE), ID_GUARD_BINARY)
    assert torch.equal(together, apart.amax(dim=0))
    assert torch.equal(components(points, (SIZE, SIZE), ["id-guard-binary"]), together)
    assert torch.equal(components(points, (SIZE, SIZE)), components(points, (SIZE, SIZE), "face"))
    singles = [components(five[None], (SIZE, SIZE), ID_GUARD_BINARY) for five in points]
    assert torch.equal(together, torch.cat(singles))
    assert set(together.unique().tolist()) == {0.0, 1.0}
    assert together.dtype == torch.float32


def test_the_order_of_the_eyes_does_not_matter() -> None:
    points = tiny.landmarks(1, SIZE)
    swapped = points[:, [1, 0, 2, 4, 3]]
    for name in DRAWN:
        mask = components(points, (SIZE, SIZE), [name])
        assert overlap(mask, components(swapped, (SIZE, SIZE), [name])) > 0.99


@pytest.mark.parametrize(
    ("points", "names", "error", "words"),
    [
        (torch.zeros(5, 2), ["face"], ImageError, r"`landmarks` must be \(B, 5, 2\)"),
        (torch.full((1, 5, 2), math.nan), ["face"], ImageError, "must be finite"),
        (torch.zeros(1, 5, 2), ["face"], ImageError, "two eyes must not lie in one place"),
        (torch.rand(1, 5, 2), ["hair"], UnknownName, "five landmarks tell nothing of part 'hair'"),
        (torch.rand(1, 5, 2), ["tip-rsr-face"], UnknownName, "five landmarks tell nothing of"),
        (torch.rand(1, 5, 2), ["eye"], UnknownName, "there is no part 'eye'; did you mean eyes"),
    ],
)
def test_what_cannot_be_drawn_is_refused(points, names, error, words) -> None:
    with pytest.raises(error, match=words):
        components(points, (32, 32), names)


# --- from labels ---------------------------------------------------------------------------------


def every_label() -> torch.Tensor:
    return torch.arange(19).view(1, 1, 19)


def chosen(names) -> set[int]:
    return set(from_labels(every_label(), names)[0, 0, 0].nonzero().flatten().tolist())


def test_presets_are_the_published_indices() -> None:
    assert chosen(ID_GUARD_BINARY) == {2, 3, 4, 5, 10, 11, 12, 13}
    assert chosen(TIP_RSR_FACE) == set(range(1, 15))
    assert chosen(FACE) == {1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13}
    assert chosen(["face"]) == chosen(FACE)
    assert chosen("tip-rsr-face") == chosen(TIP_RSR_FACE)
    assert chosen(["id-guard-binary", "hair"]) == chosen(ID_GUARD_BINARY) | {17}


def test_parts_share_out_the_classes_and_keep_pairs_together() -> None:
    assert sorted(member for members in PARTS.values() for member in members) == sorted(CLASSES)
    assert chosen(PARTS) == set(range(19))
    assert chosen(["eyes"]) == {4, 5}
    assert chosen(["ears"]) == {7, 8}
    with pytest.raises(UnknownName, match="there is no part 'l_eye'; did you mean"):
        from_labels(every_label(), ["l_eye"])


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.zeros(1, 1, 4, 4, dtype=torch.int64), r"\(B, H, W\) int64, got"),
        (torch.zeros(1, 4, 4), r"\(B, H, W\) int64, got"),
        (torch.full((1, 4, 4), 19), r"indices into the 19 classes, got \[19, 19\]"),
    ],
)
def test_labels_that_are_none_are_refused(labels, words) -> None:
    with pytest.raises(ImageError, match=words):
        from_labels(labels, ["face"])


# --- soft edges ----------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [1.0, 2.5, 6.0])
def test_a_soft_edge_goes_from_1_to_0_over_twice_the_radius(radius) -> None:
    step = (torch.arange(41) >= 20).float().expand(1, 1, 9, 41)
    soft = feather(step, radius)
    row = soft[0, 0, 4]
    reach = math.ceil(radius)
    assert torch.equal(row[: 20 - reach], torch.zeros(20 - reach))
    torch.testing.assert_close(row[20 + reach :], torch.ones(21 - reach))
    assert (row.diff() >= -1e-6).all()
    assert float(row[19] + row[20]) == pytest.approx(1, abs=1e-5)  # 1/2 on the edge itself
    assert torch.equal(feather(step, 0), step)
    torch.testing.assert_close(feather(torch.ones(1, 1, 9, 9), radius), torch.ones(1, 1, 9, 9))


def test_both_sources_of_masks_soften_alike() -> None:
    points = tiny.landmarks(1, 64)
    sharp = components(points, (64, 64), ["eyes"])
    assert torch.equal(components(points, (64, 64), ["eyes"], feather=3), feather(sharp, 3))
    labels = (sharp[:, 0] * 4).long()
    assert torch.equal(from_labels(labels, ["eyes"], feather=3), feather(sharp, 3))
    with pytest.raises(ConfigError, match="0 pixels or more, got -1"):
        feather(sharp, -1)


# --- masks move with the image -------------------------------------------------------------------

CASES: dict[str, Transform] = {
    **{name: TRANSFORMS[name]() for name in TRANSFORMS},
    "strong affine": AffineJitter(sigma=0.1),
    "sequence": Sequence(Jpeg(), Rotate(degrees=(20, 30)), Crop(share=0.7), AffineJitter()),
    "one of": OneOf(Identity(), Rotate(degrees=(20, 30)), Sequence(Crop(share=0.6), Jpeg())),
    "shrink": Resize(restore=False),
    "cr, shrink": CompressResize(restore=False),
    "rotate, shrink": Sequence(Rotate(degrees=40), Resize(scale=0.6, restore=False)),
}
MOVING = {"rotate", "crop", "affine", "strong affine", "sequence"}


def disc_and_photo() -> tuple[torch.Tensor, torch.Tensor]:
    """A soft disc off the centre, and a photo that is bright and reddish where the disc is."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(80.0), indexing="ij")
    away = ((x - 50) ** 2 + (y - 24) ** 2).sqrt()
    mask = torch.sigmoid((13 - away) / 1.5).view(1, 1, 64, 80)
    colour = torch.tensor([0.5, 0.4, 0.45]).view(1, 3, 1, 1)
    return mask, 0.2 + colour * mask


def likeness(image: torch.Tensor, mask: torch.Tensor) -> float:
    """Correlation of brightness with the mask: blind to contrast and offset."""
    pair = torch.stack([image.mean(dim=1).flatten(), mask.flatten()])
    return float(torch.corrcoef(pair)[0, 1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_mask_stays_on_what_it_marks(name, seed) -> None:
    mask, photo = disc_and_photo()
    transform = CASES[name]
    image, moved = transform.with_mask(photo, mask, generator(seed))
    assert torch.equal(image, transform(photo, generator(seed)))
    assert moved.shape == (1, 1, *image.shape[2:])
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    # rotation brings black corners, which the mask knows nothing of
    lit = (image.amax(dim=1, keepdim=True) > 0.1).float()
    covered = image * lit + 0.2 * (1 - lit)
    assert likeness(covered, moved) > 0.97
    if name in MOVING:
        assert likeness(covered, moved) > likeness(covered, mask)


@pytest.mark.parametrize("name", sorted(MOVING - {"affine"}))  # it moves by a pixel or two
def test_a_mask_left_behind_would_show(name) -> None:
    mask, photo = disc_and_photo()
    images = [CASES[name](photo, generator(seed)) for seed in range(3)]
    assert min(likeness(image, mask) for image in images) < 0.97


@pytest.mark.parametrize(
    ("transform", "strengths"),
    [
        (Rotate(), {"degrees": 33.0}),
        (Crop(), {"share": 0.6, "left": 0.8, "top": 0.1}),
        (AffineJitter(), {"sigma": 0.05, "seed": 4}),
        (Resize(restore=False), {"scale": 0.5}),
    ],
)
def test_geometry_is_the_same_for_mask_and_image(transform, strengths) -> None:
    mask, _ = disc_and_photo()
    expected = transform.apply(mask.expand(1, 3, 64, 80), **strengths)[:, :1]
    torch.testing.assert_close(transform.apply_mask(mask, **strengths), expected)
    assert expected.shape != mask.shape or not torch.allclose(expected, mask, atol=0.1)


@pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - MOVING))
def test_what_changes_values_alone_leaves_the_mask_alone(name) -> None:
    mask, _ = disc_and_photo()
    transform = TRANSFORMS[name]()
    assert transform.apply_mask(mask, **transform.draw(generator())) is mask


def test_a_quarter_turn_is_exact() -> None:
    mask = (torch.rand(2, 1, 16, 16, generator=generator()) > 0.5).float()
    result = Rotate().apply_mask(mask, degrees=90.0)
    torch.testing.assert_close(result, mask.rot90(1, dims=(2, 3)), atol=1e-4, rtol=0)
