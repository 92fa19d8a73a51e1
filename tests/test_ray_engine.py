"""Suites and folders worked off by several processes: a dead one loses nothing, rows are equal."""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage
from typer.testing import CliRunner

from robustness.ray_engine import on_ray
from robustness.rows import load
from robustness.runner import Place, run_suite
from robustness.unit import Unit, work
from shields.cli import app
from shields.errors import ConfigError, MissingPackage
from shields.spread import _ALONE, _SILENT, Workers, spread
from tests.suites import QUICK, Tinter, run, suite, untimed, write_photos

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def at_root():
    """Workers find this file as the driver does: from the present folder."""
    with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
        for name, value in {**_SILENT, **_ALONE}.items():
            patch.setenv(name, value)
        yield


def with_ray(test):
    """A test that starts processes, which takes seconds; Ray leaves its own to the collector."""
    marks = (
        pytest.mark.slow,
        pytest.mark.skipif(
            importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'shields[ray]'"
        ),
        pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
        pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    )
    for mark in marks:
        test = mark(test)
    return test


def die_once(marker: Path) -> None:
    """Kill this process, unless that has been done; the marker holds its number."""
    try:
        with marker.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(Tinter):
    """An editor whose prompt names a marker: its process is killed in the midst of a unit."""

    def edit(self, image, prompts, *, seeds):
        die_once(Path(prompts[0]))
        return super().edit(image, prompts, seeds=seeds)


@with_ray
def test_a_suite_loses_nothing_when_a_worker_is_killed(tmp_path, store) -> None:
    photos, marker = write_photos(tmp_path / "photos", count=3), tmp_path / "marker"
    (photos / "2.png").write_bytes(b"no photo")
    editor = {"name": f"{__name__}:Deadly", "role": "editor", "conditions": [str(marker)]}
    changes = {"manipulators": [editor, "small-portrait-ae"],
               "metrics": ["psnr@photo", "mse@edits", "mse@fair"]}  # fmt: skip
    what = {"photos": str(photos), "protectors": [QUICK], "attacks": ["jpeg:75"], **changes}
    (tmp_path / "s.yaml").write_text(json.dumps(what))
    result = shields(
        "attack", tmp_path / "s.yaml", "--out", tmp_path / "ray", "--weights-dir", store.folder,
        "--device", "cpu", "--json", "--engine", "ray", "--workers", 2,
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    assert int(marker.read_text()) != os.getpid()
    head, rows = load(tmp_path / "ray" / "rows.json")
    # Nothing else than the result, although Ray has talked of the one that died.
    assert json.loads(result.stdout)["rows"] == len(rows)
    # The marker is there now, so nobody is killed.
    alone, expected = run(suite(photos, **changes), tmp_path, store, out="serial")
    assert untimed(rows) == untimed(expected)
    assert {row.photo for row in rows if row.error} == {"2.png"}
    assert (head.metrics, head.weights) == (alone.metrics, alone.weights)
    # The same images, under names that are hashes of how they were made.
    listed = [(tmp_path / out / "pictures.json").read_text() for out in ("ray", "serial")]
    assert listed[0] == listed[1]


def tried(item):
    """Sleep, and die as often as the item says; count the tries in a file."""
    folder, name, seconds, deaths = item
    tries = len(list(folder.glob(f"{name}-*"))) + 1
    (folder / f"{name}-{tries}").write_text(str(time.monotonic()))
    if tries <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "bad":
        raise ConfigError("item bad makes no sense")
    time.sleep(seconds)
    return f"{name} {Path.cwd()}"


@pytest.fixture(scope="module")
def two(at_root):
    """A Ray of two processors that all tests of a kind share."""
    import ray

    assert not ray.is_initialized(), "what runs before has to end its own"
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**27,
        logging_level="ERROR", log_to_driver=False,
    )  # fmt: skip
    yield Workers(count=2)
    ray.shutdown()


@with_ray
def test_results_keep_their_order_and_what_always_dies_is_given_up(tmp_path, two) -> None:
    asked = [("slow", 1, 0), ("a", 0, 0), ("doomed", 0, 99), ("b", 0, 1), ("early", 0, 0)]
    items = [(tmp_path, *each) for each in asked]
    waiting = []
    results = list(
        spread(
            tried, items, two, lost=lambda item, reason: f"{item[1]}: {reason}",
            first=lambda item: item[1] == "early", on_waiting=waiting.append,
        )
    )  # fmt: skip
    good = [f"{name} {ROOT}" for name in ("slow", "a", "b", "early")]
    assert [*results[:2], *results[3:]] == good
    assert "died 3 times" in results[2]
    assert len(list(tmp_path.glob("doomed-*"))) == 3
    assert len(list(tmp_path.glob("b-*"))) == 2
    begun = {path.stem: float(path.read_text()) for path in tmp_path.glob("*-1")}
    assert begun["early-1"] < min(begun["a-1"], begun["doomed-1"], begun["b-1"])
    assert max(waiting) >= 1


@with_ray
def test_an_error_arrives_as_it_was_raised(tmp_path, two) -> None:
    items = [(tmp_path, name, 0, 0) for name in ("a", "bad", "c")]
    with pytest.raises(ConfigError) as caught:
        list(spread(tried, items, two, lost=lambda item, reason: reason))
    assert str(caught.value) == "item bad makes no sense"


@with_ray
@pytest.mark.parametrize("workers", [Workers(count=5), Workers(gpus=0.25)])
def test_workers_without_room_are_refused(two, workers) -> None:
    with pytest.raises(ConfigError, match="there is room for"):
        next(spread(len, ["a"], workers, lost=lambda item, reason: 0))


# --- the commands --------------------------------------------------------------------------------


def shields(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@with_ray
def test_a_folder_is_protected_as_one_process_does_it(tmp_path, store, two) -> None:
    photos = write_photos(tmp_path / "photos", count=3)
    (photos / "3.png").write_bytes(b"no photo")
    words = ("protect", photos, "--method", "encoder", "--autoencoder", "small-portrait-ae",
             "--region", "photo", "--steps", 2, "--size", 64, "--device", "cpu", "--json",
             "--weights-dir", store.folder)  # fmt: skip
    spread_out = (*words, "--out", tmp_path / "ray", "--engine", "ray", "--workers", two.count)
    results = [shields(*spread_out), shields(*words, "--out", tmp_path / "serial")]
    for result in results:
        assert result.exit_code == 1, result.output
    ours, alone = (json.loads(result.stdout) for result in results)
    assert ours["summary"]["protected"] == 3
    assert ours["run"] == alone["run"]
    for entry, other in zip(ours["photos"], alone["photos"], strict=True):
        assert entry["source"] == other["source"]
        for report in (entry.get("report", {}), other.get("report", {})):
            report.pop("protected", None)
        assert entry.get("report") == other.get("report")
        assert entry["error"] == other["error"]
    for index in range(3):
        images = [PillowImage.open(tmp_path / out / f"{index}.png") for out in ("ray", "serial")]
        assert np.array_equal(*map(np.array, images))
    again = json.loads(shields(*words, "--out", tmp_path / "ray").stdout)
    assert again["summary"]["skipped"] == 3


def test_an_engine_that_is_not_installed_is_one_line(tmp_path, store, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    photos = write_photos(tmp_path / "photos", count=1)
    with pytest.raises(MissingPackage, match=r"pip install 'shields\[ray\]'"):
        run(suite(photos), tmp_path, store, engine=on_ray(Workers()))
    result = shields("attack", photos, "--engine", "ray")
    assert result.exit_code == 2
    assert "needs the package ray" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "2"], "--workers is for --engine ray"),
        (["--gpus-per-worker", "0.5"], "--gpus-per-worker is for --engine ray"),
        (["--ray-address", "auto"], "--ray-address is for --engine ray"),
        (["--engine", "ray", "--workers", "0"], "at least one worker"),
        (["--engine", "ray", "--ray-address", "127.0.0.1:1"], "nothing answers at"),
        (["--engine", "ray", "--gpus-per-worker", "1.5"], "a share of one as in 0.25"),
        (["--engine", "ray", "--gpus-per-worker", "-1"], "a share of one as in 0.25"),
    ],
)
@pytest.mark.parametrize("command", ["attack", "protect"])
def test_mistakes_are_one_line(tmp_path, command, words, said) -> None:
    photos = write_photos(tmp_path / "photos", count=1)
    result = shields(command, photos, "--out", tmp_path / "out", *words)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_workers_compute_on_the_gpus_that_they_are_given() -> None:
    assert Workers(gpus=0.25).device("cuda:1") == "cuda"
    assert Workers(gpus=1).device("cpu") == "cuda"
    assert Workers().device("cuda") == "cpu"
    assert Workers().device("mps") == "mps"


def test_a_unit_that_is_given_up_has_all_its_rows_and_is_tried_again(tmp_path, store) -> None:
    photos = write_photos(tmp_path / "photos", count=1)
    what = suite(photos)
    place = Place(out=tmp_path / "out", weights_dir=store.folder)
    _, rows = run_suite(what, place)
    unit = Unit(
        suite=what, photo=photos / "0.png", name="0.png", protection=what.protectors[1],
        images=place.images, weights_dir=store.folder, problem="its process died",
    )  # fmt: skip
    ours = [row for row in rows if row.protector == QUICK["method"]]
    given_up = work(unit).rows
    assert [(row.attack, row.metric) for row in given_up] == [(r.attack, r.metric) for r in ours]
    assert {(row.value, row.error) for row in given_up} == {(None, "its process died")}
    assert untimed(run_suite(what, place)[1]) == untimed(rows)
