"""Runs of suites: what fails fails alone, and nothing is computed twice."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness import purifiers
from robustness.images import ImageStore, key_of
from robustness.purifiers import Purifier
from robustness.unit import Unit, work
from shields import models
from tests.suites import QUICK, cells, pictures, run, suite, untimed, write_photos


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


# --- failures ------------------------------------------------------------------------------------


class Greedy(Purifier):
    """A purifier that asks for more memory than there is, on some photos."""

    def _purify(self, image, rng):
        if float(image.mean()) > 0.5:
            raise torch.OutOfMemoryError("tried to allocate 999 GiB")
        return image


def test_whatever_fails_is_a_row_and_the_rest_goes_on(tmp_path, photos, store) -> None:
    whole = (photos / "0.png").read_bytes()
    (photos / "broken.png").write_bytes(whole[: len(whole) // 2])
    bright = np.array(PillowImage.open(photos / "1.png")) // 2 + 127
    PillowImage.fromarray(bright).save(photos / "1.png")
    dark = np.array(PillowImage.open(photos / "0.png")) // 2
    PillowImage.fromarray(dark).save(photos / "0.png")
    purifiers.PURIFIERS.add("greedy", f"{__name__}:Greedy")
    try:
        what = suite(
            photos, attacks=["jpge:75", "greedy"],
            protectors=[QUICK, {"method": "facelok"}, {"label": "files", "folder": str(tmp_path)}],
            manipulators=[{"name": "small-stargan", "conditions": ["smiling", "smling"]},
                          {"name": "nobody"}],
            metrics=["psnr@photo", "psnr@handled", "mse@edits", "fr:nobody@source"],
        )  # fmt: skip
        _, rows = run(what, tmp_path, store)
    finally:
        purifiers.PURIFIERS.remove("greedy")
    found = cells(rows)
    assert len(found) == len(rows) == 3 * 4 * (1 + 3 * 1 + 3 * 3 * 2)
    reasons = {
        ("broken.png", "encoder", "none", "none", "", "psnr@photo"): "broken.png is damaged",
        ("0.png", "encoder", "jpge:75", "none", "", "psnr@handled"): "did you mean jpeg",
        ("0.png", "facelok", "none", "none", "", "psnr@photo"): "did you mean facelock",
        ("0.png", "files", "none", "none", "", "psnr@photo"): "there is no 0.png",
        ("0.png", "none", "none", "nobody", "", "mse@edits"): "nobody",
        ("0.png", "none", "none", "small-stargan", "smling", "mse@edits"): "did you mean",
        ("0.png", "none", "none", "small-stargan", "smiling", "fr:nobody@source"): "nobody",
    }
    for cell, reason in reasons.items():
        assert found[cell].value is None
        assert reason in found[cell].error, cell
        assert "\n" not in found[cell].error
    for protector in ("none", "encoder"):
        good = found["0.png", protector, "none", "small-stargan", "smiling", "mse@edits"]
        assert good.value is not None
        assert not good.error
    fits = found["0.png", "none", "greedy", "none", "", "psnr@handled"]
    assert fits.value == float("inf")
    fails = found["1.png", "none", "greedy", "small-stargan", "smiling", "mse@edits"]
    assert fails.value is None
    assert "out of memory: tried to allocate" in fails.error


def test_an_editor_without_a_prompt_fails_in_its_cells(tmp_path, photos, store) -> None:
    from tests.suites import Tinter

    assert Tinter().size == 64
    forgings = [{"name": "tests.suites:Tinter", "role": "editor"},
                {"name": "small-portrait-ae"}]  # fmt: skip
    _, rows = run(suite(photos, manipulators=forgings, limit=1), tmp_path, store)
    bad = [row for row in rows if row.manipulator == "tests.suites:Tinter"]
    assert bad
    assert all("needs a prompt" in row.error for row in bad)
    assert all(row.value is not None for row in rows if row.manipulator != bad[0].manipulator)


def test_prompts_and_seeds_reach_an_editor(tmp_path, photos, store) -> None:
    forging = {"name": "tests.suites:Tinter", "role": "editor", "conditions": ["red", "blue"]}
    what = suite(photos, manipulators=[forging], seeds=[0, 1], limit=1, attacks=[],
                 metrics=["mse@source"])  # fmt: skip
    _, rows = run(what, tmp_path, store)
    numbers = [row.value for row in rows if row.protector == "none"]
    assert len(set(numbers)) == 4


# --- once only -----------------------------------------------------------------------------------


def test_a_second_run_writes_no_image_and_gives_the_same_rows(tmp_path, photos, store) -> None:
    what = suite(photos, metrics=["psnr@photo", "mse@edits", "mse@fair"])
    _, first = run(what, tmp_path, store)
    before = pictures(tmp_path / "out")
    _, second = run(what, tmp_path, store)
    assert second == first
    assert pictures(tmp_path / "out") == before


def test_an_image_that_is_damaged_is_made_again(tmp_path, photos, store) -> None:
    _, first = run(suite(photos), tmp_path, store)
    victim = sorted(pictures(tmp_path / "out"))[0]
    victim.write_bytes(victim.read_bytes()[:50])
    for kept in (tmp_path / "out" / "images" / "units").glob("*.json"):
        kept.unlink()
    _, second = run(suite(photos), tmp_path, store)
    numbers = untimed(first)
    assert untimed(second) == numbers
    PillowImage.open(victim).load()


def test_another_setting_is_another_image(tmp_path, photos, store) -> None:
    run(suite(photos), tmp_path, store)
    before = set(pictures(tmp_path / "out"))
    run(suite(photos, protectors=[{**QUICK, "levels": 4}]), tmp_path, store)
    assert before < set(pictures(tmp_path / "out"))


def test_other_weights_under_the_same_name_are_another_image(tmp_path, photos, store) -> None:
    from robustness.images import weights_of

    cpu = torch.device("cpu")
    one, other = (
        models.load("autoencoder", "small-portrait-ae", store=store, device=cpu) for _ in range(2)
    )
    assert weights_of(one) == weights_of(other)
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    changed = models.load("autoencoder", "small-portrait-ae", store=store, device=cpu)
    changed.load_state_dict(other.state_dict())
    assert weights_of(changed) != weights_of(one)
    assert weights_of({"held": [one]}) == weights_of(one)


def test_a_key_changes_with_all_that_it_is_made_of() -> None:
    base = {"settings": {"a": 1}, "weights": ["w"], "seed": 0}
    keys = {key_of("step", ["in"], **base), key_of("other", ["in"], **base),
            key_of("step", ["on"], **base)}  # fmt: skip
    for change in ({"settings": {"a": 2}}, {"weights": ["v"]}, {"seed": 1}):
        keys.add(key_of("step", ["in"], **{**base, **change}))
    assert len(keys) == 6


def test_an_image_is_built_once(tmp_path) -> None:
    built = []

    def build():
        built.append(1)
        return np.full((16, 20, 3), 7, np.uint8)

    first = ImageStore(tmp_path / "images").make("ab" * 16, build)
    again = ImageStore(tmp_path / "images").make("ab" * 16, build)
    assert built == [1]
    assert np.array_equal(first.pixels, again.pixels)
    assert first.digest == again.digest
    assert again.seconds == first.seconds


def test_a_unit_can_be_sent_elsewhere(tmp_path, photos, store) -> None:
    what = suite(photos, limit=1)
    unit = Unit(
        suite=what, photo=photos / "0.png", name="0.png", protection=what.protectors[1],
        images=tmp_path / "out" / "images", weights_dir=store.folder,
    )  # fmt: skip
    sent = work(pickle.loads(pickle.dumps(unit)))
    _, rows = run(what, tmp_path, store, out="other")
    ours = [row for row in rows if row.protector == "encoder"]
    assert untimed(sent.rows) == untimed(ours)
    assert pickle.loads(pickle.dumps(sent)) == sent


def test_photos_of_one_name_are_told_apart(tmp_path, store) -> None:
    for name in ("a", "b"):
        write_photos(tmp_path / "photos" / name, count=1)
    _, rows = run(suite(tmp_path / "photos", protectors=[]), tmp_path, store)
    assert len({row.photo for row in rows}) == 2
    assert {Path(row.photo).name for row in rows} == {"0.png"}
