"""Verification of people: figures in closed form, pairs, and the whole path on real photos."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from shields import models
from shields.errors import ImageError
from shields.models.base import Detector
from shields.models.pairs import PhotoSet, draw_pairs, read_pairs
from shields.models.verification import check_lfw, histogram_rows, verify_pairs
from shields.types import Face
from shields.weights import WeightStore
from tests import tiny

SHARED = Path(__file__).parents[1].parent / "shared"
LFW = SHARED / "data" / "lfw-deepfunneled.tar"
CPU = torch.device("cpu")


def pairs_of(cosines):
    """Unit vectors in the plane, two for each cosine, so that each pair has exactly that one."""
    angles = torch.tensor(cosines, dtype=torch.float64).arccos()
    ones = torch.stack([torch.ones_like(angles), torch.zeros_like(angles)], dim=1)
    others = torch.stack([angles.cos(), angles.sin()], dim=1)
    rows = torch.arange(len(angles))[:, None] + torch.tensor([[0, len(angles)]])
    return torch.cat([ones, others]), rows


def verified(genuine, impostor, **settings):
    embeddings, rows = pairs_of([*genuine, *impostor])
    same = torch.tensor([True] * len(genuine) + [False] * len(impostor))
    return verify_pairs(embeddings, rows, same, **settings)


def test_people_who_are_apart_give_all_hits_at_the_middle() -> None:
    result = verified([0.9, 0.8, 0.7, 0.8], [0.1, 0.2, -0.5, 0.1], name="someone")
    assert result.accuracy == result.best_accuracy == 1.0
    assert result.accuracy_deviation == 0.0
    assert result.threshold == pytest.approx(0.45)
    assert (result.genuine, result.impostor, result.recognizer) == (4, 4, "someone")
    assert (result.genuine_mean, result.impostor_mean) == (
        pytest.approx(0.8),
        pytest.approx(-0.025),
    )


def test_each_miss_costs_its_share() -> None:
    genuine, impostor = [0.8] * 18 + [0.0] * 2, [0.1] * 19 + [0.9]
    result = verified(genuine, impostor)
    assert result.threshold == pytest.approx(0.45)
    assert result.best_accuracy == result.accuracy == pytest.approx(37 / 40)


def test_a_fold_is_judged_by_the_others_threshold() -> None:
    # Fold 0 alone would put the threshold at 0.5, fold 1 at 0.7; each then fails on the other.
    genuine, impostor = [0.6, 0.6, 0.9, 0.9], [0.4, 0.4, 0.65, 0.65]
    fold = torch.tensor([0, 0, 1, 1] * 2)
    result = verified(genuine, impostor, fold=fold)
    assert result.folds == 2
    # By fold 1's threshold (0.775) fold 0 loses its genuine pairs; by fold 0's (0.5), fold 1 its
    # impostors: half of each.
    assert result.accuracy == pytest.approx(0.5)
    assert result.best_accuracy == pytest.approx(6 / 8)


def test_best_threshold_is_that_of_an_exhaustive_search() -> None:
    rng = torch.Generator().manual_seed(1)
    genuine = (0.5 + 0.25 * torch.randn(60, generator=rng)).clamp(-1, 1).tolist()
    impostor = (0.1 + 0.25 * torch.randn(90, generator=rng)).clamp(-1, 1).tolist()
    result = verified(genuine, impostor)

    def hits(threshold):
        return sum(c > threshold for c in genuine) + sum(c <= threshold for c in impostor)

    searched = max(hits(threshold) for threshold in np.linspace(-1.01, 1.01, 20001))
    assert hits(result.threshold) == searched
    assert result.best_accuracy == pytest.approx(searched / 150)
    assert 0.6 < result.accuracy <= result.best_accuracy


def test_true_accepts_at_rare_false_ones() -> None:
    impostor = (np.arange(1000) / 1000 - 0.5).tolist()  # the highest ones: 0.499, 0.498, …
    genuine = [0.4985, 0.4895, 0.4885, 0.9]
    common, rare = verified(genuine, impostor).rates
    assert (common.false_accepts, rare.false_accepts) == (0.01, 0.001)
    assert common.threshold == pytest.approx(0.489)  # ten lie above it
    assert common.true_accepts == 0.75
    assert rare.threshold == pytest.approx(0.498)  # one lies above it
    assert rare.true_accepts == 0.5


def test_rates_that_the_pairs_cannot_tell_are_left_out() -> None:
    assert verified([0.9] * 9, [0.1] * 99).rates == ()
    assert [rate.false_accepts for rate in verified([0.9] * 9, [0.1] * 100).rates] == [0.01]


def test_histogram_counts_every_pair_once() -> None:
    rng = np.random.default_rng(0)
    genuine, impostor = rng.uniform(-0.3, 1, 50).tolist(), rng.uniform(-0.4, 0.4, 70).tolist()
    result = verified([*genuine, 1.0], [*impostor, -0.62])
    edges = np.linspace(-1, 1, len(result.genuine_bars) + 1)
    assert result.genuine_bars == tuple(np.histogram([*genuine, 1.0], edges)[0])
    assert result.impostor_bars == tuple(np.histogram([*impostor, -0.62], edges)[0])
    rows = histogram_rows(result)
    assert (rows[0][0], rows[-1][1]) == (-0.65, 1.0)
    assert sum(row[2] for row in rows) == 51
    assert sum(row[3] for row in rows) == 71
    assert all(math.isclose(a[1], b[0]) for a, b in itertools.pairwise(rows))


def test_a_result_is_plain_data() -> None:
    result = verified([0.9] * 100, [0.1] * 100)
    again = json.loads(json.dumps(dataclasses.asdict(result)))
    assert again["rates"] == [
        {"false_accepts": 0.01, "true_accepts": 1.0, "threshold": pytest.approx(0.1)}
    ]


def test_pairs_of_one_kind_alone_are_refused() -> None:
    with pytest.raises(ImageError, match="got 3 and 1"):
        verified([0.9] * 3, [0.1])
    with pytest.raises(ImageError, match="two folds"):
        verified([0.9] * 3, [0.1] * 3, fold=torch.zeros(6))


COLOURS = {"Ada_B": (200, 60, 60), "Cem_D": (60, 200, 60), "Eva_F": (60, 60, 200)}


class Square(Detector):
    """Finds a face in the middle of whatever is bright, and a larger one in the corner."""

    def __call__(self, image):
        if image.mean() < 0.1:
            return []
        side = image.shape[3]
        middle = tiny.landmarks(side)[0].numpy() * 0.5 + side / 4
        corner = middle * 0.6 - side * 0.1
        return [
            Face(box=(0, 0, side, side), landmarks=corner, score=0.99),
            Face(box=(8, 8, side - 8, side - 8), landmarks=middle, score=0.99),
        ]


def make_photos(folder, counts=(4, 4, 4)):
    """People who differ by colour; photos of one differ by noise."""
    rng = np.random.default_rng(0)
    for (name, colour), count in zip(COLOURS.items(), counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(1, count + 1):
            pixels = rng.normal(colour, 12, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            PillowImage.fromarray(pixels).save(folder / name / f"{name}_{number:04d}.png")
    return folder


def make_tar(folder, path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname="./photos")
    return path


def test_drawn_pairs_are_right_and_repeatable(tmp_path) -> None:
    photos = PhotoSet.open(make_photos(tmp_path / "lfw"))
    first, again, other = (
        draw_pairs(photos, 20, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert first == again != other
    assert [pair.same for pair in first] == [True] * 10 + [False] * 10
    assert len({frozenset((pair.first, pair.second)) for pair in first}) == 20
    for pair in first:
        assert pair.same == (pair.first.partition("/")[0] == pair.second.partition("/")[0])


def test_a_small_set_gives_what_it_has(tmp_path) -> None:
    photos = PhotoSet.open(make_photos(tmp_path / "lfw", (3, 1, 1)))
    pairs = draw_pairs(photos, 100, torch.Generator().manual_seed(0))
    assert sum(pair.same for pair in pairs) == 3
    assert sum(not pair.same for pair in pairs) == 3 + 3 + 1


@pytest.mark.parametrize(
    ("counts", "message"), [((1, 1, 1), "3, 0 of them"), ((4, 0, 0), "1, 1 of them")]
)
def test_too_few_people_are_refused(tmp_path, counts, message) -> None:
    photos = PhotoSet.open(make_photos(tmp_path / "lfw", counts))
    with pytest.raises(ImageError, match=message):
        draw_pairs(photos, 10, torch.Generator())


OFFICIAL = """2\t2
Ada_B\t1\t2
Ada_B\t1\t9
Ada_B\t1\tCem_D\t1
Eva_F\t1\tCem_D\t2
Cem_D\t1\t2
Cem_D\t3\t4
Ada_B\t4\tEva_F\t4
Nobody\t1\tEva_F\t4
"""


def test_official_pairs_keep_their_folds_and_absent_photos_are_named(tmp_path) -> None:
    folder = make_photos(tmp_path / "lfw")
    (folder / "pairs.txt").write_text(OFFICIAL)
    photos = PhotoSet.open(folder)
    pairs, absent = read_pairs(photos.pairs_file, photos, 6000)
    assert [(pair.same, pair.fold) for pair in pairs] == [
        (True, 0), (False, 0), (False, 0), (True, 1), (True, 1), (False, 1),
    ]  # fmt: skip
    assert pairs[1].first == "Ada_B/Ada_B_0001.png"
    assert pairs[1].second == "Cem_D/Cem_D_0001.png"
    assert absent.keys() == {"Ada_B_0009", "Nobody_0001"}
    assert len(read_pairs(photos.pairs_file, photos, 4)[0]) == 4  # one of a kind from each fold


@pytest.mark.parametrize("text", ["", "ten 300\n", "1\nAda_B one two\n", "1\nAda_B\n"])
def test_a_damaged_list_of_pairs_is_refused(tmp_path, text) -> None:
    folder = make_photos(tmp_path / "lfw")
    (folder / "pairs.txt").write_text(text)
    with pytest.raises(ImageError, match=r"pairs\.txt"):
        check_lfw(tiny.recognizer(), folder, detector=Square())


def test_folder_and_tar_give_the_same_figures(tmp_path) -> None:
    folder = make_photos(tmp_path / "lfw")
    seen = []
    results = [
        check_lfw(
            tiny.recognizer(), source, pairs=24, seed=5, detector=Square(),
            progress=lambda done, total: seen.append((done, total)),
        )
        for source in (folder, make_tar(folder, tmp_path / "lfw.tgz"))
    ]  # fmt: skip
    one, other = (dataclasses.replace(result, seconds=0) for result in results)
    assert one == other
    assert (one.photos, one.lost, one.failed) == (12, 0, {})
    assert (one.genuine, one.impostor, one.seed) == (12, 12, 5)
    assert one.best_accuracy == 1.0  # colours are easily told apart
    assert seen == [(done, 12) for done in range(1, 13)] * 2


def test_the_face_in_the_middle_is_the_one_that_counts(tmp_path) -> None:
    class Middle(Square):
        def __call__(self, image):
            return super().__call__(image)[1:]

    folder = make_photos(tmp_path / "lfw")
    one, other = (
        dataclasses.replace(check_lfw(tiny.recognizer(), folder, detector=detector), seconds=0)
        for detector in (Square(), Middle())
    )
    assert one == other


def test_bad_photos_are_named_and_cost_their_pairs_only(tmp_path) -> None:
    folder = make_photos(tmp_path / "lfw")
    (folder / "Ada_B" / "Ada_B_0001.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    PillowImage.new("RGB", (64, 64)).save(folder / "Cem_D" / "Cem_D_0002.png")
    (folder / "Eva_F" / "._Eva_F_0001.png").write_bytes(b"not a photo, but nobody should look")
    for source in (folder, make_tar(folder, tmp_path / "lfw.tgz")):
        result = check_lfw(tiny.recognizer(), source, pairs=60, detector=Square())
        prefix = "" if source == folder else "photos/"
        bad = {f"{prefix}Ada_B/Ada_B_0001.png", f"{prefix}Cem_D/Cem_D_0002.png"}
        assert result.failed.keys() == bad
        assert "no face was found" in result.failed[f"{prefix}Cem_D/Cem_D_0002.png"]
        assert all(str(tmp_path) not in reason or not prefix for reason in result.failed.values())
        assert result.photos == 10
        assert result.lost > 0
        drawn = draw_pairs(PhotoSet.open(source), 60, torch.Generator().manual_seed(0))
        assert result.genuine + result.impostor == len(drawn) - result.lost


def test_without_any_face_nothing_is_made_up(tmp_path) -> None:
    folder = tmp_path / "lfw"
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for number in (1, 2):
            PillowImage.new("RGB", (64, 64)).save(folder / name / f"{number}.png")
    with pytest.raises(ImageError, match="are there faces"):
        check_lfw(tiny.recognizer(), folder, pairs=4, detector=Square())


def test_sources_that_are_none_are_refused(tmp_path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no photos")
    with pytest.raises(ImageError, match="neither a folder nor a tar"):
        check_lfw(tiny.recognizer(), text)
    with pytest.raises(ImageError, match="neither a folder nor a tar"):
        check_lfw(tiny.recognizer(), tmp_path / "absent.tar")
    with pytest.raises(ImageError, match="one folder for each person"):
        check_lfw(tiny.recognizer(), tmp_path)


@pytest.fixture(scope="module")
def some_of_lfw(tmp_path_factory):
    """A tar of twelve photos: four of each of three people."""
    if not LFW.is_file():
        pytest.skip(f"LFW is not at {LFW}")
    pytest.importorskip("facenet_pytorch")
    path = tmp_path_factory.mktemp("lfw") / "some.tar"
    counts: dict[str, int] = {}
    with tarfile.open(LFW) as archive, tarfile.open(path, "w") as small:
        for member in archive:
            person = Path(member.name).parent.name
            if not member.isfile() or counts.get(person, 0) == 4:
                continue
            if person not in ("Abdullah_Gul", "Adrien_Brody", "Ai_Sugiyama"):
                if person > "Al":
                    break
                continue
            counts[person] = counts.get(person, 0) + 1
            small.addfile(member, io.BytesIO(archive.extractfile(member).read()))
    return path


@pytest.mark.parametrize("name", ["face-embedder", "mobilefacenet"])
def test_real_people_are_told_apart(some_of_lfw, name) -> None:
    store = WeightStore(SHARED / "weights")
    if name == "mobilefacenet" and not (SHARED / "weights").is_dir():
        pytest.skip(f"no weights at {SHARED / 'weights'}")
    recognizer = models.load("recognizer", name, store=store, device=CPU)
    result = check_lfw(recognizer, some_of_lfw, pairs=30)
    assert result.recognizer == name
    assert (result.photos, result.failed) == (12, {})
    assert result.best_accuracy >= 0.9
    assert result.genuine_mean > result.impostor_mean + 0.3
    assert 0.05 < result.threshold < 0.6
