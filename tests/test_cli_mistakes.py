"""The command line when something is wrong: one line that says what to do, nothing touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands import QUICK, shields, tiny_networks
from tests.test_batch import picture


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "facelok"], "did you mean facelock"),
        (["--preset", "papr"], "did you mean paper"),
        (["--set", "stepz=3"], "did you mean"),
        (["--set", "steps"], "NAME=VALUE"),
        (["--set", "steps=many"], "`steps` must be a int"),
        (["--set", "levels=4", "--levels", "8"], "leave one out"),
        (["--levels", "-1"], "`levels` must be 0 or more"),
        (["--levels", "nan"], "`levels` must be 0 or more"),
        (["--steps", "0"], "`steps` must be a whole number"),
        (["--size", "3"], "at least 64"),
        (["--size", "250"], "steps of 8"),
        (["n" * 300 + ".jpg"], "File name too long"),
        (["--device", "cuda:99"], "--device cpu"),
        (["--device", "abacus"], "no device is called 'abacus'"),
        (["--weights-dir", "nowhere"], "is not a folder"),
        (["--autoencoder", "small-eel"], "small-ae"),
        (["--diffusion", "sd"], "no network for the role 'diffusion'"),
        (["--out", "PHOTO"], "never written over"),
        (["--out", "PHOTO/below/x.png"], "cannot write to"),
        (["--out", "x.gif"], "results are"),
        (["--format", "webp", "--out", "x.png"], "does not fit"),
        (["--quality", "80"], "lossless"),
        (["--sheet", "PHOTO"], "never written over"),
        (["--report", "x.txt"], ".json"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    photo = picture(tmp_path / "photos" / "a.png")
    before = photo.read_bytes()
    monkeypatch.chdir(tmp_path / "photos")
    given = [argument.replace("PHOTO", str(photo)) for argument in arguments]
    names = [] if "--weights-dir" in given else ["--weights-dir", str(weights)]
    names += [] if "--autoencoder" in given else ["--autoencoder", "small-ae"]
    done = shields("protect", photo, *names, "--recognizer", "small-face", *given)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert photo.read_bytes() == before
    assert sorted(path.name for path in photo.parent.iterdir()) == ["a.png"]


def test_missing_photos_and_missing_weights_are_wrong_usage(tmp_path: Path, weights: Path) -> None:
    done = shields("protect", tmp_path / "gone.jpg", "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["kind"] == "ConfigError"
    (weights / "small-ae.safetensors").unlink()
    done = shields("protect", picture(tmp_path / "a.png"), *tiny_networks(weights))
    assert done.exit_code == 2
    assert str(weights / "small-ae.safetensors") in done.stderr, "the places tried"


def test_no_face_where_one_was_asked_for(tmp_path: Path, weights: Path) -> None:
    photo = picture(tmp_path / "a.png")
    command = ["protect", photo, *tiny_networks(weights), *QUICK]
    done = shields(*command, "--region", "face")
    assert done.exit_code == 1
    assert "--region photo" in done.stderr
    done = shields(*command, "--json")
    assert done.exit_code == 0
    assert any("no face" in note for note in json.loads(done.stdout)["photos"][0]["notes"])


@pytest.mark.parametrize("content", [b"", b"a letter", None])
def test_unreadable_results_are_judged_bad(tmp_path: Path, content: bytes | None) -> None:
    photo, other = picture(tmp_path / "a.png"), tmp_path / "b.png"
    other.write_bytes(photo.read_bytes()[:400] if content is None else content)
    done = shields("verify", photo, other, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["ok"] is False
    assert shields("verify", photo, tmp_path / "gone.png").exit_code == 2


def test_sizes_that_differ_are_judged_bad(tmp_path: Path) -> None:
    photo, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(64, 80))
    done = shields("verify", photo, other)
    assert done.exit_code == 1
    assert "sizes differ" in done.stdout
    assert (
        "sizes differ"
        in json.loads(shields("verify", photo, other, "--json").stdout)["problems"][0]
    )


def test_a_report_of_other_photos_or_another_version_is_noticed(tmp_path: Path) -> None:
    photo = picture(tmp_path / "a.png")
    (tmp_path / "r.json").write_text('{"photos": [], "run": {}}')
    done = shields("verify", photo, photo, "--report", tmp_path / "r.json")
    assert done.exit_code == 2
    run = {"method": "encoder", "config": {"sharpness": 3}, "networks": {}}
    photos = [{"output": "a.png", "regions": []}]
    (tmp_path / "r.json").write_text(json.dumps({"photos": photos, "run": run}))
    done = shields("verify", photo, photo, "--report", tmp_path / "r.json", "--json")
    assert done.exit_code == 0, done.output
    assert "another version" in json.loads(done.stdout)["objective_missing"]
    (tmp_path / "r.json").write_text("[1")
    assert shields("verify", photo, photo, "--report", tmp_path / "r.json").exit_code == 2
