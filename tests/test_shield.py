"""Photo in, protected photo out: closed forms of the composite, regions, seeds, memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from shields.errors import ConfigError, DeviceError, FaceNotFound
from shields.faces import Placement
from shields.models.base import Detector
from shields.protectors.base import Protector, ProtectorConfig
from shields.shield import Region, Shield, choose_device
from shields.types import Face, Image, Mask, Perturbation, Photo, Progress


class Found(Detector):
    """Finds the faces it was given."""

    def __init__(self, *faces: Face) -> None:
        self.faces = list(faces)

    def __call__(self, image: Image) -> list[Face]:
        assert image.shape[:2] == (1, 3)
        return self.faces


@dataclass(frozen=True, kw_only=True)
class PushConfig(ProtectorConfig):
    """Levels, and which way each call pushes."""

    signs: tuple[int, ...] = (1,)


class Push(Protector):
    """Moves every value as far as the budget lets it, up or down by turns."""

    Config = PushConfig
    config: PushConfig

    def __init__(self, config: PushConfig | None = None) -> None:
        super().__init__(config)
        self.masks: list[Mask] = []

    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: torch.Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        sign = self.config.signs[len(self.masks) % len(self.config.signs)]
        self.masks.append(mask)
        if progress is not None:
            for step in range(4):
                progress(step + 1, 4, 0.5)
        return sign * self.config.budget.epsilon * mask.expand_as(image)


class Noise(Push):
    """Draws its perturbation."""

    def perturb(
        self,
        image: Image,
        mask: Mask,
        *,
        rng: torch.Generator,
        landmarks: torch.Tensor | None,
        progress: Progress | None,
    ) -> Perturbation:
        return (torch.rand(image.shape, generator=rng) * 2 - 1) * mask


def face_at(x: float, y: float, side: float) -> Face:
    """A face whose box is a square around a point."""
    share = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
    corner = np.array([x, y]) - side / 2
    return Face(
        box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2),
        landmarks=(corner + share * side).astype(np.float32),
        score=0.99,
    )


def photo_of(height: int, width: int, *, seed: int = 0, low: int = 40, high: int = 200) -> Photo:
    """A photo of random pixels away from black and white."""
    pixels = np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8)
    return Photo(pixels=pixels)


def change(shield: Shield, photo: Photo) -> np.ndarray:
    """Signed change in levels."""
    return shield.protect(photo).pixels.astype(np.int16) - photo.pixels


def inside(shape: tuple[int, int], regions: tuple[Region, ...]) -> np.ndarray:
    """Which pixels lie in a region."""
    mask = np.zeros(shape, dtype=bool)
    for region in regions:
        mask[region.placement.region] = True
    return mask


def test_a_whole_photo_moves_by_exactly_the_budget() -> None:
    photo = photo_of(120, 203)
    shield = Shield(Push(), detector=None, region="photo", size=96)
    assert (change(shield, photo) == 8).all()


@pytest.mark.parametrize(("levels", "expected"), [(8.0, 8), (7.65, 7), (0.4, 0), (0.0, 0)])
def test_rounding_stays_within_whole_levels(levels: float, expected: int) -> None:
    photo = photo_of(96, 96)
    shield = Shield(Push(PushConfig(levels=levels)), detector=None, region="photo")
    assert np.abs(change(shield, photo)).max() == expected


def test_values_never_leave_the_byte() -> None:
    photo = photo_of(96, 96, low=250, high=256)
    moved = change(Shield(Push(), detector=None, region="photo"), photo)
    assert np.array_equal(moved, np.minimum(8, 255 - photo.pixels.astype(np.int16)))


def test_every_face_of_a_group_is_protected_and_nothing_else() -> None:
    photo = photo_of(300, 500)
    faces = (face_at(90, 150, 60), face_at(380, 120, 40))
    shield = Shield(Push(), detector=Found(*faces), region="face")
    result = shield.protect(photo)
    moved = np.abs(result.pixels.astype(np.int16) - photo.pixels).max(axis=2)
    assert len(result.faces) == len(result.placements) == 2
    assert moved[150, 90] == moved[120, 380] == 8
    assert (moved[~inside(moved.shape, result.regions)] == 0).all()
    assert not inside(moved.shape, result.regions).all()


def test_the_photo_given_is_left_as_it_was() -> None:
    photo = photo_of(96, 96)
    before = photo.pixels.copy()
    Shield(Push(), detector=None, region="photo").protect(photo)
    assert np.array_equal(photo.pixels, before)


def test_overlapping_faces_do_not_undo_each_other() -> None:
    photo = photo_of(240, 320)
    left, right = face_at(120, 120, 70), face_at(190, 120, 70)
    protector = Push(PushConfig(signs=(1, -1)))
    shield = Shield(protector, detector=Found(left, right), region="face")
    regions, _ = shield.regions(photo)
    first, second = (region.placement for region in regions)
    assert first.left + first.width > second.left, "the test needs an overlap"
    moved = change(shield, photo)
    assert np.abs(moved).max() == 8
    assert (moved[100:140, 90:140] == 8).all()
    assert (moved[100:140, 170:220] == -8).all()
    # Half way between them, only the seam may hold anything but a full step.
    row = moved[120, first.left + 30 : second.left + second.width - 30, 0]
    assert np.count_nonzero(np.abs(row) < 8) <= 4


def test_overlapping_regions_share_one_budget() -> None:
    photo = photo_of(240, 320)
    faces = Found(face_at(120, 120, 70), face_at(150, 120, 70), face_at(180, 120, 70))
    moved = change(Shield(Push(), detector=faces, region="face"), photo)
    assert moved.max() == 8
    assert moved.min() == 0


def test_the_working_masks_of_overlapping_regions_are_disjoint() -> None:
    photo = photo_of(256, 256)
    protector = Push()
    faces = Found(face_at(128, 128, 128), face_at(128, 128, 128))
    Shield(protector, detector=faces, region="face").protect(photo)
    first, second = protector.masks
    assert first.any()
    assert not second.any(), "a face that was found twice is protected once"


def test_a_face_is_required_where_it_was_asked_for() -> None:
    shield = Shield(Push(), detector=Found(), region="face")
    with pytest.raises(FaceNotFound, match="--region photo"):
        shield.protect(photo_of(96, 96))


def test_auto_falls_back_to_the_whole_photo_and_says_so() -> None:
    photo = photo_of(96, 128)
    result = Shield(Push(), detector=Found(), region="auto").protect(photo)
    assert (np.abs(result.pixels.astype(np.int16) - photo.pixels) == 8).all()
    assert any("no face" in note for note in result.notes)
    assert result.faces == ()


def test_a_whole_photo_still_carries_its_largest_face() -> None:
    face = face_at(60, 48, 30)
    result = Shield(Push(), detector=Found(face), region="photo").protect(photo_of(96, 128))
    assert result.faces == (face,)
    placement = result.placements[0]
    assert (placement.width, placement.height) == (128, 96)


def test_seeds_fix_the_result_and_differ_between_photos() -> None:
    one, two = photo_of(96, 96, seed=1), photo_of(96, 96, seed=2)

    def noise(photo: Photo, seed: int) -> np.ndarray:
        return change(Shield(Noise(), detector=None, region="photo", seed=seed), photo)

    shield = Shield(Noise(), detector=None, region="photo", seed=0)
    change(shield, two)
    assert np.array_equal(change(shield, one), noise(one, 0)), "the order of photos is free"
    assert not np.array_equal(noise(one, 0), noise(one, 1))
    assert not np.array_equal(noise(one, 0), noise(two, 0))


def test_progress_covers_all_faces() -> None:
    calls: list[tuple[int, int]] = []
    shield = Shield(Push(), detector=Found(face_at(60, 60, 40), face_at(200, 60, 40)))
    shield.protect(photo_of(120, 260), progress=lambda done, total, _: calls.append((done, total)))
    assert calls == [(done, 8) for done in range(1, 9)]


def test_progress_and_global_randomness_change_nothing() -> None:
    photo = photo_of(96, 96)
    shield = Shield(Noise(), detector=None, region="photo")
    state = torch.random.get_rng_state()
    quiet = shield.protect(photo).pixels
    torch.manual_seed(123)
    loud = shield.protect(photo, progress=lambda *_: None).pixels
    torch.random.set_rng_state(state)
    assert np.array_equal(quiet, loud)


@pytest.mark.parametrize("face", [None, face_at(100.25, 80.5, 33)])
def test_regions_survive_json(face: Face | None) -> None:
    region = Region(placement=Placement(4, 5, 200, 160, size=(128, 160)), face=face)
    again = Region.from_dict(region.to_dict())
    assert again.placement == region.placement
    if face is None:
        assert again.face is None
    else:
        assert again.face is not None
        assert np.abs(again.face.landmarks - face.landmarks).max() < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"region": "nose", "detector": None}, "face, photo or auto"),
        ({"region": "face", "detector": None}, "needs a detector"),
        ({"region": "photo", "detector": None, "size": 8}, "at least 64"),
    ],
)
def test_impossible_shields_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shield(Push(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cuda:97", "quantum", "meta"])
def test_devices_that_are_not_there_are_named(name: str) -> None:
    with pytest.raises(DeviceError, match=name):
        choose_device(name)


def test_the_automatic_device_exists() -> None:
    assert torch.zeros(1, device=choose_device("auto")).sum() == 0


@pytest.mark.slow
def test_twelve_megapixels_stay_far_below_three_gigabytes(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    script = """
        import resource, sys
        import numpy as np
        from PIL import Image
        from shields.budget import Budget
        from shields.photo import read, write
        from shields.shield import Shield
        from shields.verify import verify
        from tests.test_shield import Push
        source, target = sys.argv[1:]
        ramp = np.linspace(30, 220, 4000 * 3000, dtype=np.float32).astype(np.uint8)
        Image.fromarray(np.stack([ramp.reshape(3000, 4000)] * 3, axis=2)).save(source)
        photo = read(source)
        shield = Shield(Push(), detector=None, region="photo")
        result = shield.protect(photo)
        write(target, result.pixels, photo)
        report = verify(source, target, Budget(), regions=result.regions)
        assert report.ok and report.largest_change == 8, report
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    files = [str(tmp_path / "large.bmp"), str(tmp_path / "protected.bmp")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    gigabytes = float(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert gigabytes < 2.5
