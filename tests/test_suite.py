"""Suites: how they are read, and that rows are what the steps done by hand give."""

import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness.metrics import Facts, SetMeasure
from robustness.rows import load as load_rows
from robustness.suite import SUITES, Suite, find_suite
from shields.errors import ConfigError
from shields.models.round_trip import load_manipulator
from tests.suites import QUICK, cells, run, suite, write_photos, write_protected


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"atacks": []}, "no key 'atacks'; did you mean attacks"),
        ({"photos": None}, "needs `photos`"),
        ({"attacks": 3.5}, "`attacks` must be a list"),
        ({"attacks": [{"jpeg": 75}]}, "`attacks` must be texts"),
        ({"metrics": ["psnr"]}, "must say what it compares"),
        ({"metrics": ["psnr@edit"]}, "did you mean edits"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"seeds": [True]}, "whole numbers"),
        ({"limit": 0}, "`limit` must be a whole number of 1 or more"),
        ({"size": 32}, "`size` must be a whole number of 64 or more"),
        ({"protectors": [{"label": "a"}]}, "needs a `method` or a `folder`"),
        ({"protectors": [{"method": "facelock", "lvels": 8}]}, "did you mean levels"),
        ({"protectors": [{"method": "facelock", "robust": "yes"}]}, "`robust` of 'facelock'"),
        ({"protectors": ["facelock", "facelock"]}, None),
        ({"protectors": [QUICK, {**QUICK, "steps": 3}]}, "two protectors are called 'encoder'"),
        ({"protectors": [{**QUICK, "region": "hair"}]}, "`region` of 'encoder'"),
        ({"manipulators": [{"nme": "a"}]}, "did you mean name"),
        ({"manipulators": [{"name": "a", "role": "edtor"}]}, "did you mean editor"),
        ({"manipulators": [{"name": "a", "protectors": ["encodr"]}]}, "did you mean encoder"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, changes, said) -> None:
    if said is None:
        assert [entry.label for entry in suite(tmp_path, **changes).protectors][1:] == ["facelock"]
        return
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")) as caught:
        suite(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["photos: [", "- a list", "photos: \x00"])
def test_a_file_that_is_no_suite_is_one_line(tmp_path, text) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        Suite.read(tmp_path / "s.yaml")
    assert str(tmp_path / "s.yaml") in str(caught.value) or "pairs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_photos_are_found_beside_the_suite_first(tmp_path, photos, monkeypatch) -> None:
    (tmp_path / "s.yaml").write_text("photos: photos\nlimit: 1\n")
    monkeypatch.chdir("/")
    read = Suite.read(tmp_path / "s.yaml")
    assert read.name == "s"
    assert read.files(tmp_path / "out") == [photos / "0.png"]


def test_clean_photo_and_untouched_file_are_always_there(tmp_path) -> None:
    read = suite(tmp_path, protectors=["none", QUICK], attacks=["jpeg:75", "none", "jpeg:75"])
    assert [entry.label for entry in read.protectors] == ["none", "encoder"]
    assert read.attacks == ("none", "jpeg:75")


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_that_come_along_can_be_read_and_passed_on(path) -> None:
    read = Suite.read(path)
    assert read.name == path.stem
    assert read.summary
    assert read.metrics
    assert pickle.loads(pickle.dumps(read)) == read
    assert find_suite(path.stem) == path
    json.dumps(read.to_dict())


def test_an_unknown_suite_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean offline"):
        find_suite("ofline")


# --- numbers -------------------------------------------------------------------------------------


def jpeg(pixels):
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=75)
    return np.array(PillowImage.open(file))


def forged(network, pixels, condition):
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        result = network(image, condition).clamp(0, 1)
    return (result[0] * 255).round().byte().permute(1, 2, 0).numpy()


def mse(one, other):
    return float((((one.astype(float) - other) / 127.5) ** 2).mean())


def test_rows_are_what_the_steps_by_hand_give(tmp_path, photos, store) -> None:
    folder = write_protected(photos, tmp_path / "done")
    what = suite(
        photos, protectors=[{"folder": str(folder)}],
        manipulators=["small-stargan", "small-portrait-ae"],
        metrics=["mse@photo", "mse@handled", "mse@edits", "mse@fair", "mse@source", "psnr@photo"],
    )  # fmt: skip
    _, rows = run(what, tmp_path, store)
    found = cells(rows)
    networks = {name: load_manipulator(name, store) for name in ("small-stargan",
                                                                  "small-portrait-ae")}  # fmt: skip
    # photos x (photo pair + attacks x handled + attacks x conditions x pairs), two protectors
    conditions = sum(len(network.conditions) for network in networks.values())
    assert len(rows) == 2 * 2 * (2 + 2 * 1 + 2 * conditions * 3)
    for path in sorted(photos.glob("*.png")):
        clean = np.array(PillowImage.open(path))
        protected = np.array(PillowImage.open(folder / path.name))
        assert found[path.name, "done", "none", "none", "", "mse@photo"].value == pytest.approx(
            mse(protected, clean)
        )
        assert found[path.name, "none", "none", "none", "", "psnr@photo"].value == float("inf")
        handled, after = jpeg(protected), jpeg(clean)
        assert found[path.name, "done", "jpeg:75", "none", "", "mse@handled"].value == (
            pytest.approx(mse(handled, clean))
        )
        for name, network in networks.items():
            for condition in network.conditions:
                edit = forged(network, handled, condition)
                wanted = {
                    "mse@edits": mse(edit, forged(network, clean, condition)),
                    "mse@fair": mse(edit, forged(network, after, condition)),
                    "mse@source": mse(edit, clean),
                }
                for metric, value in wanted.items():
                    cell = found[path.name, "done", "jpeg:75", name, condition, metric]
                    assert cell.value == pytest.approx(value, rel=1e-4), metric


def test_protecting_in_a_suite_is_protecting_alone(tmp_path, photos, store) -> None:
    from shields.photo import read
    from shields.protectors import PROTECTORS
    from shields.protectors import load as load_protector
    from shields.shield import Shield

    run(suite(photos, seed=4), tmp_path, store)
    config = dataclasses.replace(PROTECTORS["encoder"].Config(), steps=2)
    cpu = torch.device("cpu")
    protector = load_protector("encoder", config, networks=QUICK["networks"], store=store,
                               device=cpu)  # fmt: skip
    expected = Shield(protector, detector=None, region="photo", seed=4).protect(
        read(photos / "0.png")
    )
    listed = json.loads((tmp_path / "out" / "pictures.json").read_text())
    (entry,) = [e for e in listed if e["kind"] == "protected" and e["protector"] == "encoder"
                and e["photo"] == "0.png"]  # fmt: skip
    pixels = np.array(PillowImage.open(tmp_path / "out" / entry["file"]))
    assert np.array_equal(pixels, expected.pixels)


def test_head_and_pictures_tell_what_was_done(tmp_path, photos, store) -> None:
    head, rows = run(suite(photos, seeds=[0, 1]), tmp_path, store, command="shields attack tiny")
    assert load_rows(tmp_path / "out" / "rows.json") == (head, rows)
    assert head.command == "shields attack tiny"
    assert set(head.metrics) == {"psnr@photo", "mse@edits"}
    assert set(head.weights) >= {"small-portrait-ae", "small-stargan"}
    assert {row.seed for row in rows if row.metric == "mse@edits"} == {0, 1}
    listed = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert {entry["kind"] for entry in listed} == {
        "clean", "protected", "handled", "forged-clean", "forged"
    }  # fmt: skip
    assert all((tmp_path / "out" / entry["file"]).is_file() for entry in listed)


def test_photos_are_cut_to_size_before_they_are_protected(tmp_path, store) -> None:
    folder = write_photos(tmp_path / "wide", count=1, size=96)
    wide = np.array(PillowImage.open(folder / "0.png"))[:80]
    PillowImage.fromarray(wide).save(folder / "0.png")
    _, rows = run(suite(folder, size=64), tmp_path, store)
    assert all(row.error == "" for row in rows)
    listed = json.loads((tmp_path / "out" / "pictures.json").read_text())
    clean = next(entry for entry in listed if entry["kind"] == "clean")
    expected = PillowImage.fromarray(wide[:, 8:88]).resize((64, 64), PillowImage.Resampling.LANCZOS)
    found = np.array(PillowImage.open(tmp_path / "out" / clean["file"]))
    assert np.array_equal(found, np.array(expected))


def test_a_manipulator_meets_only_its_protectors(tmp_path, photos, store) -> None:
    forging = {"name": "small-stargan", "conditions": ["smiling"], "protectors": ["encoder"]}
    other = {**QUICK, "label": "other"}
    what = suite(photos, protectors=[QUICK, other], manipulators=[forging], limit=1)
    _, rows = run(what, tmp_path, store)
    assert {row.protector for row in rows if row.manipulator != "none"} == {"none", "encoder"}


class MeanGap(SetMeasure):
    """How far the mean colours of two sets are apart."""

    def facts(self, pair):
        return Facts(higher=True, low=0, high=1, summary="distance of mean colours")

    def features(self, image, scene):
        return image.mean(dim=(2, 3))

    def distance(self, features, reference):
        return float((features.mean(0) - reference.mean(0)).abs().max())


def test_a_number_about_a_set_has_one_row_a_cell(tmp_path, photos, store) -> None:
    folder = write_protected(photos, tmp_path / "done")
    what = suite(
        photos, protectors=[{"folder": str(folder)}], manipulators=[],
        metrics=[f"{__name__}:MeanGap@handled"],
    )  # fmt: skip
    _, rows = run(what, tmp_path, store)
    assert [row.photo for row in rows] == ["*"] * 4
    found = {(row.protector, row.attack): row.value for row in rows}
    clean = np.stack([np.array(PillowImage.open(path)) for path in sorted(photos.glob("*"))])
    kept = np.stack([np.array(PillowImage.open(path)) for path in sorted(folder.glob("*"))])
    gap = np.abs(clean.mean((0, 1, 2)) - kept.mean((0, 1, 2))).max() / 255
    assert found["done", "none"] == pytest.approx(gap, rel=1e-3)
    assert found["none", "none"] == pytest.approx(0, abs=1e-7)
