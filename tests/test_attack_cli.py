"""`shields attack` as it is typed, on small networks; and that a kill loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image as PillowImage
from typer.testing import CliRunner

from robustness.cli import app
from robustness.everyday import phrase, sentences, survivals
from robustness.rows import Row, load
from tests.suites import QUICK, cells, pictures, run, suite, untimed, write_photos, write_protected

ROOT = Path(__file__).parents[1]
SUITE = f"""
photos: photos
protectors: [{json.dumps(QUICK)}]
attacks: [jpeg:75, median:3]
manipulators: [small-portrait-ae]
metrics: [psnr@photo, mse@edits]
"""


@pytest.fixture
def folder(tmp_path):
    write_photos(tmp_path / "photos")
    (tmp_path / "tiny.yaml").write_text(SUITE)
    return tmp_path


def attack(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_suite_leaves_rows_pictures_and_a_report(folder, store) -> None:
    result = attack(folder / "tiny.yaml", "--out", folder / "out", "--weights-dir", store.folder)
    assert result.exit_code == 0, result.output
    assert str(folder / "out" / "report.html") in result.output
    head, rows = load(folder / "out" / "rows.json")
    assert len(rows) == 2 * 2 * (1 + 3)
    assert head.command.startswith("shields attack")
    assert (folder / "out" / "report.html").is_file()
    assert (folder / "out" / "report.md").is_file()
    assert json.loads((folder / "out" / "pictures.json").read_text())


def test_the_report_can_be_written_again(folder, store) -> None:
    attack(folder / "tiny.yaml", "--out", folder / "out", "--weights-dir", store.folder)
    (folder / "out" / "report.html").unlink()
    result = attack("report", folder / "out")
    assert result.exit_code == 0, result.output
    assert (folder / "out" / "report.html").is_file()
    assert attack("report", folder / "nowhere").exit_code == 2


def test_flags_replace_what_the_suite_says(folder, store) -> None:
    result = attack(
        folder / "tiny.yaml", "--out", folder / "out", "--weights-dir", store.folder,
        "--limit", 1, "--attack", "resize:0.5", "--metric", "ssim@handled", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    _, rows = load(folder / "out" / "rows.json")
    assert json.loads(result.stdout)["rows"] == len(rows) == 4
    assert {row.attack for row in rows} == {"none", "resize:0.5"}
    assert {row.metric for row in rows} == {"ssim@handled"}


def test_flags_alone_are_a_suite(folder, store) -> None:
    result = attack(
        "--photos", folder / "photos", "--protector", "encoder:steps=1,size=64", "--attack",
        "jpeg:75", "--manipulator", "small-stargan", "--condition", "smiling", "--metric",
        "mse@edits", "--out", folder / "out", "--weights-dir", store.folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    _, rows = load(folder / "out" / "rows.json")
    assert {row.protector for row in rows} == {"none", "encoder:steps=1,size=64"}
    assert {row.condition for row in rows} == {"smiling"}


@pytest.fixture
def portrait(tmp_path):
    """A photo of a face, and one that is said to be protected."""
    face = pytest.importorskip("skimage.data").astronaut()[:256, 96:352]
    image = PillowImage.fromarray(face).resize((128, 128), PillowImage.Resampling.LANCZOS)
    (tmp_path / "portraits").mkdir()
    image.save(tmp_path / "portraits" / "photo.png")
    write_protected(tmp_path / "portraits", tmp_path / "done")
    return tmp_path


def test_everyday_form_answers_in_a_table_and_in_words(portrait, store, monkeypatch) -> None:
    monkeypatch.chdir(portrait)
    result = attack(
        "portraits/photo.png", "--protected", "done/photo.png", "--weights-dir", store.folder,
        "--manipulator", "small-portrait-ae", "--attack", "resize:0.5",
        "--metric", "fr:random-mobilefacenet@source",
        "--metric", "recognised:random-mobilefacenet@source",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "what happens to the file" in result.output
    assert "As saved, the face is" in result.output
    assert "After a half-size share, the face is" in result.output
    assert not (portrait / "out").exists()


def test_a_photo_without_a_face_gets_no_answer_and_says_why(folder, store) -> None:
    result = attack(
        folder / "photos" / "0.png", "--protected", folder / "photos" / "0.png", "--weights-dir",
        store.folder, "--manipulator", "small-portrait-ae", "--attack", "none",
        "--metric", "recognised:random-mobilefacenet@source",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "As saved, nothing is known: no face" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ofline"], "did you mean offline"),
        (["nothing.yaml"], "there is no suite"),
        ([".", "--attack", "jpge:75"], "did you mean jpeg"),
        ([".", "--protected", "nowhere"], "neither a file nor a folder"),
        ([".", "--condition", "smiling"], "name one"),
        ([".", "--protector", "facelock:robust"], "key=value"),
        (["--limit", "1"], "name a suite"),
        ([".", "--weights-dir", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_one_line_and_touch_nothing(tmp_path, monkeypatch, words, said) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "here", count=1)
    result = attack(*words)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_suites_are_listed_with_what_can_be_named() -> None:
    result = attack("suites", "--json")
    listed = json.loads(result.stdout)
    assert {"offline", "tip-rsr-tables-1-to-12"} <= set(listed["suites"])
    assert "jpeg" in listed["attacks"]
    assert "vae" in listed["purifiers"]
    assert "offline:" in attack("suites").output


# --- words ---------------------------------------------------------------------------------------


def pair(protector, attack, likeness, recognised):
    whole = {"photo": "a.png", "protector": protector, "attack": attack, "manipulator": "ae",
             "condition": "", "seed": 0}  # fmt: skip
    return [Row(**whole, metric="fr:net@source", value=likeness),
            Row(**whole, metric="recognised:net@source", value=recognised)]  # fmt: skip


def test_sentences_follow_the_threshold() -> None:
    rows = [*pair("none", "none", 0.9, 1), *pair("none", "resize:0.5", 0.8, 1),
            *pair("none", "jpeg:75", 0.85, 1), *pair("none", "rotate:90", 0.1, 0),
            *pair("mine", "none", 0.1, 0), *pair("mine", "resize:0.5", 0.6, 1),
            *pair("mine", "jpeg:75", 0.2, 0), *pair("mine", "rotate:90", 0.05, 0)]  # fmt: skip
    assert sentences(survivals(rows))[:-1] == [
        "As saved, the face is not recognised (likeness 0.10).",
        "After a half-size share, the face is recognised again (likeness 0.60).",
        "After saving as JPEG 75, the face is still not recognised (likeness 0.20).",
        "After rotate:90, the face is not recognised, but neither is that of the unprotected "
        "photo (likeness 0.05).",
    ]


def test_sentences_claim_no_more_than_was_measured() -> None:
    (lost,) = (row for row in pair("none", "cr", None, None) if row.metric.startswith("recog"))
    rows = [*pair("none", "none", 0.9, 1), *pair("none", "jpeg:75", 0.85, 1), lost,
            *pair("mine", "none", 0.6, 1), *pair("mine", "jpeg:75", 0.2, 0),
            *pair("mine", "cr", 0.1, 0)]  # fmt: skip
    assert sentences(survivals(rows))[:-1] == [
        "As saved, the face is recognised (likeness 0.60).",
        "After saving as JPEG 75, the face is not recognised (likeness 0.20).",
        "After JPEG and a half-size share, the face is not recognised (likeness 0.10).",
    ]


def test_what_could_not_be_measured_is_said() -> None:
    lost = Row(photo="a.png", protector="mine", attack="none", manipulator="ae", condition="",
               seed=0, metric="recognised:net@source", value=None, error="no face")  # fmt: skip
    assert sentences(survivals([lost]))[:-1] == ["As saved, nothing is known: no face."]


def test_the_judge_is_named_at_the_end() -> None:
    assert sentences(survivals(pair("mine", "none", 0.1, 0)))[-1].startswith("Judged by net: ")
    assert sentences([]) == []


def test_several_photos_are_counted() -> None:
    rows = [*pair("mine", "none", 0.1, 0), *pair("mine", "none", 0.5, 1)]
    (said, _) = sentences(survivals(rows))
    assert said == "As saved, 1 of 2 faces are recognised (likeness 0.30)."


@pytest.mark.parametrize(
    ("attack_text", "words"),
    [
        ("resize:0.5", "a half-size share"),
        ("jpeg:75+median:3", "saving as JPEG 75 and then purifying by median:3"),
        ("whatsapp", "a post on WhatsApp"),
        ("vae:taef2", "a round trip through taef2"),
    ],
)
def test_handling_is_put_into_words(attack_text, words) -> None:
    assert phrase(attack_text) == words


# --- a kill --------------------------------------------------------------------------------------


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, store) -> None:
    photos = write_photos(tmp_path / "photos", count=6)
    what = {"attacks": ["jpeg:75", "median:3"], "metrics": ["psnr@photo", "mse@edits"],
            "manipulators": ["small-portrait-ae"]}  # fmt: skip
    (tmp_path / "s.yaml").write_text(
        json.dumps({**what, "photos": str(photos), "protectors": [QUICK]})
    )
    process = subprocess.Popen(
        [sys.executable, "-c", "from robustness.cli import app; app()", str(tmp_path / "s.yaml"),
         "--out", str(tmp_path / "out"), "--weights-dir", str(store.folder), "--device", "cpu"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    units = tmp_path / "out" / "images" / "units"
    deadline = time.monotonic() + 240
    while len(list(units.glob("*.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "rows.json").exists()
    before = pictures(tmp_path / "out")
    kept = {path: path.stat().st_mtime_ns for path in units.glob("*.json")}
    assert 2 <= len(kept) < 12
    _, rows = run(suite(photos, **what), tmp_path, store)
    after = pictures(tmp_path / "out")
    whole = {path: time for path, time in after.items() if path in before}
    assert before == whole, "an image that was there has been computed again"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    _, fresh = run(suite(photos, **what), tmp_path, store, out="fresh")
    assert untimed(rows) == untimed(fresh)
    assert all(row.value is not None for row in cells(rows).values())
