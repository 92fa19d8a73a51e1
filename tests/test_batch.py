"""Folders: names, resuming, collisions, failures, and a process that is killed."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shields import batch as batch_module
from shields.batch import MANIFEST, Batch, Manifest, Outcome, Writing, find_record
from shields.errors import ConfigError, OutputError
from shields.folders import Job, check_writable, plan
from shields.shield import Shield
from tests.test_shield import Push, PushConfig

ROOT = Path(__file__).parents[1]


def picture(path: Path, *, seed: int = 0, size: tuple[int, int] = (70, 64)) -> Path:
    """Save a photo of random pixels; the format follows from the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(20, 230, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def worker(
    jobs: list[Job], *, levels: float = 8, run: str = "one", writing: Writing | None = None
) -> Batch:
    """A batch that needs no networks."""
    return Batch(
        Shield(Push(PushConfig(levels=levels)), detector=None, region="photo"),
        run={"settings": run},
        writing=writing or Writing(),
        originals=[job.source for job in jobs],
    )


def work(
    folder: Path, out: Path | None, *, run: str = "one", writing: Writing | None = None
) -> dict[str, Outcome]:
    """Protect a folder; outcomes by the name of the photo."""
    jobs = plan([folder], out)
    batch = worker(jobs, run=run, writing=writing)
    return {job.source.name: batch.process(job) for job in jobs}


def statuses(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {name: outcome.status for name, outcome in outcomes.items()}


def names(jobs: list[Job], base: Path) -> dict[str, str]:
    """Photo -> result, relative to a folder."""
    return {
        job.source.relative_to(base).as_posix(): job.output.relative_to(base).as_posix()
        for job in jobs
    }


# -- names


def test_a_single_photo_gets_its_result_beside_it(tmp_path: Path) -> None:
    photo = picture(tmp_path / "me.jpg")
    assert plan([photo], None) == [Job(photo, tmp_path / "me-protected.png", tmp_path)]


def test_a_file_or_a_folder_can_be_named(tmp_path: Path) -> None:
    photo = picture(tmp_path / "me.jpg")
    assert plan([photo], tmp_path / "x.webp")[0].output == tmp_path / "x.webp"
    assert plan([photo], tmp_path / "new")[0].output == tmp_path / "new" / "me.png"
    (tmp_path / "odd.png").mkdir()
    assert plan([photo], tmp_path / "odd.png")[0].output == tmp_path / "odd.png" / "me.png"


def test_the_tree_of_a_folder_is_kept(tmp_path: Path) -> None:
    for name in ("in/a.jpg", "in/deep/er/b.PNG", "in/.hidden/c.jpg", "in/.d.jpg"):
        picture(tmp_path / name)
    (tmp_path / "in/readme.txt").write_text("no photo")
    jobs = plan([tmp_path / "in"], tmp_path / "out")
    assert names(jobs, tmp_path) == {
        "in/a.jpg": "out/a.png",
        "in/deep/er/b.PNG": "out/deep/er/b.png",
    }


def test_several_folders_keep_their_names(tmp_path: Path) -> None:
    picture(tmp_path / "one/a.jpg")
    picture(tmp_path / "two/a.jpg")
    jobs = plan([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert [job.output.relative_to(tmp_path / "out") for job in jobs] == [
        Path("one/a.png"),
        Path("two/a.png"),
    ]


def test_colliding_names_keep_their_suffixes(tmp_path: Path) -> None:
    for name in ("in/a.jpg", "in/a.png", "in/B.jpg", "in/b.webp", "in/c.jpg"):
        picture(tmp_path / name)
    jobs = plan([tmp_path / "in"], tmp_path / "out")
    assert names(jobs, tmp_path) == {
        "in/B.jpg": "out/B.jpg.png",
        "in/a.jpg": "out/a.jpg.png",
        "in/a.png": "out/a.png.png",
        "in/b.webp": "out/b.webp.png",
        "in/c.jpg": "out/c.png",
    }


def test_photos_of_one_name_from_two_places_are_numbered(tmp_path: Path) -> None:
    photos = [picture(tmp_path / "x/a.jpg"), picture(tmp_path / "y/a.jpg")]
    found = {job.output.name for job in plan(photos, tmp_path / "out")}
    assert found == {"a.jpg.png", "a.jpg-2.png"}


def test_a_photo_that_is_named_twice_is_done_once(tmp_path: Path) -> None:
    photo = picture(tmp_path / "a.jpg")
    assert len(plan([photo, tmp_path, str(photo)], tmp_path / "out")) == 1


def test_globs_are_understood(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.png"):
        picture(tmp_path / name)
    assert len(plan([str(tmp_path / "*.jpg")], tmp_path / "out")) == 2


def test_earlier_results_are_not_taken_for_photos(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "a-protected.png")
    picture(tmp_path / "out/a.png")
    assert len(plan([tmp_path], None)) == 2
    assert names(plan([tmp_path], tmp_path / "out"), tmp_path) == {
        "a-protected.png": "out/a-protected.png",
        "a.jpg": "out/a.png",
    }


@pytest.mark.parametrize(
    ("inputs", "out", "message"),
    [
        (["missing.jpg"], None, "no photo or folder at"),
        (["*.nothing"], None, "no photo or folder at"),
        (["empty"], None, "no photos in"),
        (["in"], "in", "input and output at once"),
        (["in/a.png"], "in/a.png", "never written over"),
        (["in/a.png"], "in", "never written over"),
        (["in/a.png", "in/b.png"], "x.png", "name a folder"),
        (["in"], "x.png", "name a folder"),
        (["in/a.png"], "x.gif", "results are"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_happens(
    tmp_path: Path, inputs: list[str], out: str | None, message: str
) -> None:
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in/b.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        plan([tmp_path / name for name in inputs], None if out is None else tmp_path / out)


def test_a_place_that_cannot_be_written_is_found_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="choose another --out"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "new" / "deep")
    assert (tmp_path / "new" / "deep").is_dir()


# -- resuming


def test_finished_photos_are_skipped_and_changes_redone(tmp_path: Path) -> None:
    photos, out = tmp_path / "in", tmp_path / "out"
    for seed, name in enumerate("abc"):
        picture(photos / f"{name}.png", seed=seed)
    first = work(photos, out)
    assert set(statuses(first).values()) == {"protected"}
    assert first["a.png"].details["report"]["largest_change"] == 8
    stamp = (out / "b.png").stat().st_mtime_ns
    again = work(photos, out)
    assert set(statuses(again).values()) == {"skipped"}
    assert again["a.png"].details == first["a.png"].details
    picture(photos / "a.png", seed=9)
    (out / "c.png").unlink()
    assert statuses(work(photos, out)) == {
        "a.png": "protected", "b.png": "skipped", "c.png": "protected"
    }  # fmt: skip
    assert (out / "b.png").stat().st_mtime_ns == stamp
    assert set(statuses(work(photos, out, run="two")).values()) == {"protected"}
    redone = work(photos, out, run="two", writing=Writing(overwrite=True))
    assert set(statuses(redone).values()) == {"protected"}


def test_files_of_others_are_never_replaced_unasked(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    foreign = picture(tmp_path / "out/a.png", seed=5)
    before = foreign.read_bytes()
    outcome = work(tmp_path / "in", tmp_path / "out")["a.png"]
    assert outcome.status == "failed"
    assert "--overwrite" in str(outcome.error)
    assert foreign.read_bytes() == before
    outcome = work(tmp_path / "in", tmp_path / "out", writing=Writing(overwrite=True))["a.png"]
    assert outcome.status == "protected"


def test_a_result_that_somebody_edited_is_kept(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    work(tmp_path / "in", tmp_path / "out")
    edited = picture(tmp_path / "out/a.png", seed=7).read_bytes()
    assert statuses(work(tmp_path / "in", tmp_path / "out", run="two")) == {"a.png": "failed"}
    assert (tmp_path / "out/a.png").read_bytes() == edited


def test_a_cut_off_manifest_loses_one_record_only(tmp_path: Path) -> None:
    for name in "ab":
        picture(tmp_path / f"in/{name}.png", seed=ord(name))
    work(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    path.write_bytes(path.read_bytes()[:-30])
    # The last whole record of b says "started", so its file is ours and is done again.
    assert statuses(work(tmp_path / "in", tmp_path / "out")) == {
        "a.png": "skipped", "b.png": "protected"
    }  # fmt: skip
    assert set(statuses(work(tmp_path / "in", tmp_path / "out")).values()) == {"skipped"}


def test_records_are_found_from_a_result(tmp_path: Path) -> None:
    picture(tmp_path / "in/deep/a.png")
    work(tmp_path / "in", tmp_path / "out")
    record = find_record(tmp_path / "out/deep/a.png")
    assert record is not None
    assert record["run"] == {"settings": "one"}
    assert record["details"]["regions"][0]["face"] is None
    assert find_record(tmp_path / "in/deep/a.png") is None


def test_the_manifest_holds_json_lines_without_absolute_results(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    work(tmp_path / "in", tmp_path / "out")
    lines = (tmp_path / "out" / MANIFEST).read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["started", "protected"]
    assert json.loads(lines[1])["output"] == "a.png"


# -- failures


def test_one_bad_file_never_stops_the_rest(tmp_path: Path) -> None:
    photos = tmp_path / "in"
    whole = picture(photos / "a.jpg")
    (photos / "b.jpg").write_bytes(whole.read_bytes()[:300])
    (photos / "c.jpg").write_bytes(b"")
    (photos / "d.jpg").write_text("a letter, not a photo")
    picture(photos / "e.jpg", seed=1)
    outcomes = work(photos, tmp_path / "out")
    assert statuses(outcomes) == {
        "a.jpg": "protected", "b.jpg": "failed", "c.jpg": "failed", "d.jpg": "failed",
        "e.jpg": "protected",
    }  # fmt: skip
    for name in "bcd":
        assert "\n" not in str(outcomes[f"{name}.jpg"].error)
        assert "unexpected" not in str(outcomes[f"{name}.jpg"].error)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        MANIFEST, "a.png", "e.png"
    ]  # fmt: skip


def test_a_full_disk_ends_the_work_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OutputError("cannot be written: No space left") from OSError(errno.ENOSPC, "full")

    for name in "ab":
        picture(tmp_path / f"in/{name}.png")
    monkeypatch.setattr(batch_module, "write", no_space)
    outcomes = work(tmp_path / "in", tmp_path / "out")
    assert "No space left" in str(outcomes["a.png"].error)
    assert "not tried" in str(outcomes["b.png"].error)
    monkeypatch.undo()
    assert set(statuses(work(tmp_path / "in", tmp_path / "out")).values()) == {"protected"}


def test_a_lossy_result_is_no_failure(tmp_path: Path) -> None:
    photo = picture(tmp_path / "a.png")
    jobs = plan([photo], tmp_path / "b.jpg")
    outcome = worker(jobs).process(jobs[0])
    assert outcome.status == "protected"
    report = outcome.details["report"]
    assert report["lossy"]
    assert not report["within_budget"]


def test_sheets_show_three_panels_and_spare_other_files(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png", size=(64, 128))
    writing = Writing(sheet=tmp_path / "sheets")
    outcome = work(tmp_path / "in", tmp_path / "out", writing=writing)["a.png"]
    sheet = Path(outcome.details["sheet"])
    assert sheet == tmp_path / "sheets" / "a-sheet.png"
    with Image.open(sheet) as image:
        width, height = image.size
        pixels = np.asarray(image)
    assert width > 3 * 384 > 3 * height
    assert (pixels[100, -100] == 128 + 15 * 8).all(), "eight levels, fifteen times, around grey"
    assert statuses(work(tmp_path / "in", tmp_path / "out", run="two", writing=writing)) == {
        "a.png": "protected"
    }
    other = work(tmp_path / "in", tmp_path / "out2", writing=writing)["a.png"]
    assert other.status == "failed"
    assert "a-sheet.png exists" in str(other.error)


def test_a_sheet_that_is_asked_for_later_is_drawn(tmp_path: Path) -> None:
    picture(tmp_path / "in/a.png")
    work(tmp_path / "in", tmp_path / "out")
    writing = Writing(sheet=tmp_path / "sheets")
    for expected in ("protected", "skipped"):
        outcome = work(tmp_path / "in", tmp_path / "out", writing=writing)["a.png"]
        assert outcome.status == expected
        assert Path(outcome.details["sheet"]).is_file()
    assert statuses(work(tmp_path / "in", tmp_path / "out")) == {"a.png": "skipped"}


SLOW = """
    import sys, time
    from pathlib import Path
    from shields.folders import plan
    from tests.test_batch import worker
    from tests.test_shield import Push

    jobs = plan([sys.argv[1]], Path(sys.argv[2]))
    batch = worker(jobs)
    for job in jobs:
        batch.process(job, lambda *_: time.sleep(0.1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_is_resumed_where_it_stood(tmp_path: Path) -> None:
    photos, out = tmp_path / "in", tmp_path / "out"
    for number in range(4):
        picture(photos / f"{number}.png", seed=number)
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(photos), str(out)]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (out / "1.png").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = [f"{n}.png" for n in range(4) if find_record(out / f"{n}.png") is not None]
    assert "0.png" in finished
    assert len(finished) < 4
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            image.load()
    outcomes = statuses(work(photos, out))
    assert [name for name, status in outcomes.items() if status == "skipped"] == finished
    assert set(outcomes.values()) == {"skipped", "protected"}
    assert Manifest(out).find(out / "3.png") is not None
