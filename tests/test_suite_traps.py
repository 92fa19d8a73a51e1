"""Suites where names collide, plug-ins misbehave, or something beside the weights has changed."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness.images import ImageStore, code_of, weights_of
from robustness.judging import Look, measured
from robustness.metrics import Facts, Measure
from robustness.steps import beside, drawn
from robustness.suite import Suite
from robustness.tools import Tools
from shields import models
from shields.errors import ConfigError
from shields.weights import WeightStore
from tests.suites import cells, run, suite, write_photos

CPU = torch.device("cpu")


def touch(folder, *names):
    for name in names:
        PillowImage.new("RGB", (16, 16)).save(folder / name)


# --- files that are protected already ------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "photo", "found"),
    [
        (["img.face.png", "img.png"], "img.jpg", "img.png"),
        (["odd[1].png"], "odd[1].jpg", "odd[1].png"),
        (["x.png", "x-protected.png"], "x.png", "x-protected.png"),
    ],
)
def test_a_protected_file_is_that_of_its_photo(tmp_path, names, photo, found) -> None:
    touch(tmp_path, *names)
    assert beside(tmp_path, tmp_path / photo).name == found


def test_results_beside_their_photos_are_no_photos(tmp_path) -> None:
    touch(tmp_path, "x.png", "x-protected.png", "y-protected.png")
    files = Suite.from_dict({"photos": str(tmp_path)}).files(tmp_path / "out")
    assert [path.name for path in files] == ["x.png", "y-protected.png"]


def test_a_protected_file_cannot_stand_for_several_photos(tmp_path) -> None:
    for folder in ("one", "a", "b", "done"):
        (tmp_path / folder).mkdir()
        touch(tmp_path / folder, "x.png")
    touch(tmp_path / "one", "y.png")
    file = {"folder": str(tmp_path / "done" / "x.png")}
    with pytest.raises(ConfigError, match="one file"):
        suite(tmp_path / "one", protectors=[file]).files(tmp_path / "out")
    folder = {"folder": str(tmp_path / "done")}
    twice = suite(tmp_path, photos=[str(tmp_path / "a"), str(tmp_path / "b")], protectors=[folder])
    with pytest.raises(ConfigError, match="2 photos are called 'x'"):
        twice.files(tmp_path / "out")


def test_a_manipulator_is_asked_for_everything_once(tmp_path) -> None:
    one, other = ({"name": "a", "conditions": [text]} for text in ("x", "y"))
    assert len(suite(tmp_path, manipulators=[one, other]).manipulators) == 2
    repeated = suite(tmp_path, manipulators=[{"name": "a", "conditions": ["x", "x"]}])
    assert repeated.manipulators[0].conditions == ("x",)
    for second in ({**one, "role": "editor"}, "a"):
        with pytest.raises(ConfigError, match="twice"):
            suite(tmp_path, manipulators=[one, second])


# --- plug-ins ------------------------------------------------------------------------------------


class Scalar(Measure):
    """One number for a whole batch, which the contract forbids."""

    def facts(self, pair):
        return Facts(higher=True, low=0, high=1, summary="nothing")

    def _measure(self, image, other, scene):
        return torch.zeros(())


class Factless(Scalar):
    """A metric that cannot say what it means."""

    def facts(self, pair):
        return {}["higher"]


class Described(Scalar):
    """How long the description is that the scene brings along."""

    def _measure(self, image, other, scene):
        return torch.full((len(image),), float(len(scene.description)))


def test_a_plug_in_that_breaks_its_contract_fails_alone(tmp_path, store) -> None:
    photos = write_photos(tmp_path / "photos", count=1)
    metrics = [f"{__name__}:Scalar@handled", f"{__name__}:Factless@handled", "mse@handled"]
    what = suite(photos, protectors=[], manipulators=[], metrics=metrics)
    _, rows = run(what, tmp_path, store)
    found = cells(rows)
    assert len(found) == 6
    said = [found["0.png", "none", "jpeg:75", "none", "", metric].error for metric in metrics]
    assert "a number an image" in said[0]
    assert "KeyError" in said[1]
    assert said[2] == ""


def test_each_forgery_is_measured_with_its_own_description(tmp_path, store) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    stored = ImageStore(tmp_path).make("ab" * 16, lambda: pixels)
    looks = [
        Look(place=place, metric=f"{__name__}:Described@source", condition="smile",
             description=text, image=stored, other=stored)
        for place, text in enumerate(("", "a smile"))
    ]  # fmt: skip
    values = {place: value for place, value, _ in measured(looks, stored, Tools(store, CPU))}
    assert values == {0: 0.0, 1: 7.0}


def test_a_detector_that_fails_is_said_in_the_rows(tmp_path, store, monkeypatch) -> None:
    def fail(*_):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    photos = write_photos(tmp_path / "photos", count=1)
    monkeypatch.setattr(Tools, "landmarks", fail)
    _, rows = run(suite(photos, protectors=[], manipulators=[]), tmp_path, store)
    assert {row.value for row in rows} == {None}
    assert all("out of memory" in row.error for row in rows)


# --- what numbers depend on ----------------------------------------------------------------------


def test_a_card_and_the_code_of_a_plug_in_change_the_key(tmp_path, store, monkeypatch) -> None:
    name = "small-face-embedder"
    folder = tmp_path / "weights"
    folder.mkdir()
    for path in store.folder.glob(f"{name}*"):
        (folder / path.name).write_bytes(path.read_bytes())
    card = folder / f"{name}.toml"
    marks, weights = [], []
    for threshold in ("0.25", "0.5"):
        head = card.read_text().partition("[results]")[0]
        card.write_text(f"{head}\n[results]\nthreshold = {threshold}\n")
        tools = Tools(WeightStore(folder), CPU)
        network = models.load("recognizer", name, store=tools.store, device=CPU)
        marks.append(tools.marks_of({"held": network}))
        weights.append(weights_of(network))
    assert weights[0] == weights[1]
    assert marks[0] != marks[1]
    (tmp_path / "own_plug_in.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    models.imported("own_plug_in:value")
    before = code_of("own_plug_in:value")
    (tmp_path / "own_plug_in.py").write_text("value = 2\n")
    assert before != code_of("own_plug_in:value") != ""
    assert code_of("stargan") == ""


def test_each_photo_draws_for_itself_and_its_copies_draw_alike(tmp_path, store) -> None:
    photos = write_photos(tmp_path / "photos", count=2)
    same = np.array(PillowImage.open(photos / "0.png"))
    same[0, 0] ^= 1
    PillowImage.fromarray(same).save(photos / "1.png")
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in photos.glob("*.png"):
        (copies / path.name).write_bytes(path.read_bytes())
    what = suite(photos, protectors=[{"folder": str(copies)}], attacks=["rotate:90"],
                 manipulators=[], metrics=["mse@handled"])  # fmt: skip
    _, rows = run(what, tmp_path, store)
    found = {key[:2]: row.value for key, row in cells(rows).items() if key[2] == "rotate:90"}
    assert found["0.png", "copies"] == found["0.png", "none"]
    assert found["0.png", "none"] != pytest.approx(found["1.png", "none"], rel=0.01)
    assert drawn(0, "a") != drawn(1, "a") != drawn(1, "b")
    assert dataclasses.replace(what, seeds=(1,)).digest != what.digest
