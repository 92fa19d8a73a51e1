"""The command line from end to end, on tiny networks that are found through real cards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from skimage import data

from shields import cli
from shields.batch import MANIFEST, find_record
from shields.photo import read
from shields.protectors import PROTECTORS
from tests import tiny
from tests.commands import QUICK, shields, tiny_networks
from tests.test_batch import picture
from tests.test_shield import Push

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pushing() -> Any:
    """A method without networks, `push`."""
    PROTECTORS.add("push", Push)
    yield "push"
    PROTECTORS.remove("push")


@pytest.fixture
def astronaut(tmp_path: Path) -> Path:
    """A real portrait, public domain (NASA), 512 x 512."""
    path = tmp_path / "photos" / "astronaut.png"
    path.parent.mkdir()
    Image.fromarray(data.astronaut()).save(path)
    return path


# -- the story


def test_a_real_portrait_is_protected_and_verified(astronaut: Path, weights: Path) -> None:
    folder = astronaut.parent
    options = [*tiny_networks(weights), "--steps", "4", "--device", "cpu", "--seed", "3"]
    extra = ["--sheet", folder / "look.png", "--report", folder / "report.json"]
    done = shields("protect", astronaut, "--region", "face", *options, *extra, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["summary"]["protected"] == 1
    assert document == json.loads((folder / "report.json").read_text())
    (photo,) = document["photos"]
    (region,) = photo["regions"]
    left, top, right, bottom = region["face"]["box"]
    assert left < 225 < right
    assert top < 110 < bottom, "her nose is about there"
    report = photo["report"]
    assert report["ok"]
    assert 1 <= report["largest_change"] <= 8
    assert report["outside_change"] == 0
    assert report["objective_after"] > report["objective_before"]
    assert document["run"]["networks"] == {"autoencoder": "small-ae", "recognizer": "small-face"}
    with Image.open(folder / "look.png") as sheet:
        assert sheet.width > 1000

    protected = folder / "astronaut-protected.png"
    gap = np.abs(read(protected).pixels.astype(int) - read(astronaut).pixels)
    assert gap.max() == report["largest_change"]
    checked = shields("verify", astronaut, protected, "--weights-dir", weights, "--json")
    assert checked.exit_code == 0, checked.stderr
    verdict = json.loads(checked.stdout)
    for key in ("largest_change", "outside_change", "psnr", "ssim"):
        assert verdict[key] == report[key]
    assert verdict["objective_after"] == pytest.approx(report["objective_after"], abs=1e-4)
    protected.rename(folder / "moved.png")
    (folder / MANIFEST).unlink()
    strict = shields("verify", astronaut, folder / "moved.png", "--levels", "1")
    assert strict.exit_code == (1 if report["largest_change"] > 1 else 0)


def test_the_same_command_gives_the_same_bits(astronaut: Path, weights: Path) -> None:
    files = []
    for name in ("one.png", "two.png"):
        out = astronaut.parent / name
        done = shields("protect", astronaut, "--out", out, *tiny_networks(weights), *QUICK)
        assert done.exit_code == 0, done.stderr
        files.append(out.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("robust", [[], ["--robust"]])
def test_a_folder_is_protected_resumed_and_summarised(
    tmp_path: Path, weights: Path, robust: list[str]
) -> None:
    for name in ("in/a.jpg", "in/deep/b.png"):
        picture(tmp_path / name)
    command = ["protect", tmp_path / "in", "--out", tmp_path / "out", *tiny_networks(weights)]
    done = shields(*command, *QUICK, *robust)
    assert done.exit_code == 0, done.stderr
    assert "2 protected, 0 skipped, 0 failed of 2" in done.stdout
    assert (tmp_path / "out/deep/b.png").is_file()
    again = shields(*command, *QUICK, *robust)
    assert "0 protected, 2 skipped" in again.stdout
    other = shields(*command, *QUICK, *robust, "--seed", "5")
    assert "2 protected, 0 skipped" in other.stdout


def test_a_glob_is_resumed_although_it_now_finds_results_too(tmp_path: Path, pushing: str) -> None:
    photos = [picture(tmp_path / name) for name in ("a.png", "b.png")]
    command = ["--method", pushing, "--region", "photo"]
    assert shields("protect", *photos, *command).exit_code == 0
    everything = sorted(tmp_path.glob("*.png"))
    assert len(everything) == 4
    again = shields("protect", *everything, *command)
    assert "0 protected, 2 skipped, 0 failed of 2" in again.stdout, again.stderr
    alone = shields("protect", tmp_path / "a-protected.png", *command)
    assert alone.exit_code == 0, "a result that is named alone is a photo like any other"
    picture(tmp_path / "b-protected.png", seed=8)  # an original of the user, by its content
    before = (tmp_path / "b-protected.png").read_bytes()
    assert shields("protect", *everything, *command, "--overwrite").exit_code == 2
    assert (tmp_path / "b-protected.png").read_bytes() == before


def test_the_embedded_default_needs_no_options(astronaut: Path) -> None:
    done = shields("protect", astronaut, "--json", "--steps", "3")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)["photos"][0]["report"]
    assert report["ok"]
    assert report["objective_after"] > report["objective_before"]


# -- output


def test_output_is_quiet_on_request_and_json_alone_on_stdout(tmp_path: Path, pushing: str) -> None:
    photo = picture(tmp_path / "a.png")
    done = shields("protect", photo, "--method", pushing, "--region", "photo", "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")
    (tmp_path / "b.png").write_text("no photo")
    done = shields("protect", tmp_path, "--method", pushing, "--region", "photo", "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document["summary"] | {"seconds": 0} == {
        "protected": 0, "skipped": 1, "failed": 1, "of": 2, "interrupted": False, "seconds": 0
    }  # fmt: skip
    assert [photo["status"] for photo in document["photos"]] == ["skipped", "failed"]
    assert done.stderr.count("error:") == 1
    assert "b.png" in done.stderr


def test_a_person_reads_the_verification(tmp_path: Path, pushing: str) -> None:
    photo = picture(tmp_path / "a.png")
    done = shields("protect", photo, "--method", pushing, "--region", "photo", "--levels", "5.5")
    for text in ("a-protected.png", "5 of 5 levels", "PSNR", "good"):
        assert text in done.stdout


def test_jpeg_says_what_it_costs_and_is_measured(tmp_path: Path, pushing: str) -> None:
    photo = picture(tmp_path / "a.png")
    command = ["protect", photo, "--method", pushing, "--region", "photo", "--format", "jpg"]
    done = shields(*command, "--quality", "60", "--json")
    assert done.exit_code == 0
    assert "JPEG rewrites every pixel" in done.stderr
    (entry,) = json.loads(done.stdout)["photos"]
    assert entry["output"].endswith("a-protected.jpg")
    assert entry["report"]["lossy"]
    assert entry["report"]["largest_change"] > 8
    assert shields("verify", photo, entry["output"]).exit_code == 1


def test_a_step_beyond_the_budget_is_warned_of(tmp_path: Path, weights: Path) -> None:
    photo = picture(tmp_path / "a.png")
    done = shields(
        "protect", photo, *tiny_networks(weights), *QUICK, "--set", "step=9", "--levels", "4"
    )
    assert done.exit_code == 0
    assert "a step of 9 levels is longer than the budget of 4" in done.stderr
    once = shields("protect", photo, *tiny_networks(weights), "--method", "fgsm", "--overwrite")
    assert once.exit_code == 0
    assert "warning" not in once.stderr, "one step is meant to end at the bounds"


# -- plug-ins


def greet() -> None:
    """Say hello."""
    typer.echo("hello from outside")


PLUGIN = typer.Typer()
PLUGIN.command()(greet)


def test_commands_of_other_packages_are_found_and_broken_ones_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = [
        metadata.EntryPoint("greet", "tests.test_cli:PLUGIN", cli.PLUGINS),
        metadata.EntryPoint("ruin", "tests.no_such_module:app", cli.PLUGINS),
        metadata.EntryPoint("protect", "tests.test_cli:PLUGIN", cli.PLUGINS),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: entries)
    listing = shields("--help")
    assert listing.exit_code == 0
    assert "Say hello" in listing.stdout
    assert "Protect photos" in listing.stdout, "nobody replaces a command of ours"
    assert "'ruin' cannot be loaded" in listing.stderr
    assert shields("greet").stdout == "hello from outside\n"
    assert shields("ruin").exit_code == 2
    assert shields("list", "detectors").exit_code == 0


# -- Ctrl-C

SLOW = """
    import sys, time
    from shields.cli import app
    from shields.protectors import PROTECTORS
    from tests.test_shield import Push

    class Slow(Push):
        def perturb(self, image, mask, **options):
            time.sleep(0.5)
            return super().perturb(image, mask, **options)

    PROTECTORS.add("slow", Slow)
    app(["protect", sys.argv[1], "--method", "slow", "--region", "photo", "--out", sys.argv[2]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_an_interruption_leaves_whole_files_and_says_how_to_go_on(tmp_path: Path) -> None:
    photos, out = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        picture(photos / f"{number}.png", seed=number)
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(photos), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while find_record(out / "0.png") is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "of 4 photos are finished" in told
    assert "the same command goes on" in told
    assert "Traceback" not in told
    left = sorted(path.name for path in out.iterdir() if path.name != MANIFEST)
    assert left
    assert len(left) < 4
    assert all(find_record(out / name) is not None for name in left)


def test_tiny_networks_tell_one_photo_from_another() -> None:
    """The story above would prove nothing on networks that ignore their input."""
    image = tiny.faces_image(2, 64)
    recognizer = tiny.recognizer(1)
    embedding = recognizer(image, recognizer.matrix(None, image))
    assert not torch.allclose(embedding[0], embedding[1], atol=1e-3)
