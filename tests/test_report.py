from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from robustness import report
from robustness.report import pictures
from robustness.report.charts import families
from robustness.report.drawing import Axis
from robustness.report.results import Results, View
from robustness.report.tables import of_view, worst_cases
from robustness.report.words import cards, overall
from robustness.rows import Row
from shields.errors import OutputError
from tests import reporting

HOSTILE = "<script>alert('x')</script> & \"quoted\" | *bold*"
SOURCE = View(metric="fr:mobilefacenet@source", manipulator="portrait-ae")


class Page(HTMLParser):
    """Tags, addresses, and the exact values of every table, read back from the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.tables: dict[str, list[list[float | None]]] = defaultdict(list)
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [values[name] or "" for name in ("src", "href", "srcset", "action",
                           "poster", "data", "xlink:href") if name in values]  # fmt: skip
        self.handlers += [name for name in values if name.startswith("on")]
        if tag == "div" and values.get("role") == "region":
            self._table = values["aria-label"] or ""
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag == "data":
            self.tables[self._table][-1].append(float(values["value"] or "nan"))
        elif tag == "span" and values.get("class") == "absent":
            self.tables[self._table][-1].append(None)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return reporting.rows()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Path:
    place = tmp_path_factory.mktemp("run")
    reporting.pictures(place, photos=1, side=32)
    report.write(place, reporting.run(), rows)
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def by_cell(rows: list[Row], view: View) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if (row.metric, row.manipulator) == (
            view.metric,
            view.manipulator,
        ) and row.value is not None:
            found[row.attack, row.protector].append(row.value)
    return found


@pytest.mark.parametrize(
    "view",
    [
        SOURCE,
        View(metric="fr:mobilefacenet@source", manipulator="stargan-smile"),
        View(metric="fid@edits", manipulator="portrait-ae"),
        View(metric="ssim@handled", manipulator="none"),
    ],
    ids=lambda view: view.title,
)
def test_every_number_of_a_table_is_the_mean_of_its_rows(
    page: Page, rows: list[Row], view: View
) -> None:
    known = by_cell(rows, view)
    table = [line for line in page.tables[view.title] if line]
    assert len(table) == len(reporting.ATTACKS)
    for attack, line in zip(reporting.ATTACKS, table, strict=True):
        expected = [mean(known[attack, name]) for name in reporting.PROTECTORS]
        assert line == pytest.approx(expected, rel=1e-12)


def test_the_worst_case_is_each_photos_worst_over_all_handlings(
    page: Page, rows: list[Row]
) -> None:
    expected = []
    for protector in reporting.PROTECTORS:
        worst: dict[str, float] = {}
        for row in rows:
            mine = (row.metric, row.manipulator, row.protector)
            if mine == (SOURCE.metric, SOURCE.manipulator, protector) and row.value is not None:
                worst[row.photo] = max(worst.get(row.photo, -2.0), row.value)
        expected.append(mean(list(worst.values())))
    shown = next(line for line in page.tables["Worst case of each photo"] if line)
    assert shown == pytest.approx(expected, rel=1e-12)


def test_the_markdown_has_the_tables_of_the_page(folder: Path, rows: list[Row]) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    table = of_view(Results(reporting.run(), rows), SOURCE)
    lines = [line for line in text.partition(f"## {SOURCE.title}")[2].splitlines() if line]
    for row, line in zip(table.rows, lines[3:], strict=False):
        cells = [cell.strip() for cell in line.strip("|").split(" |")]
        assert cells[0].startswith(row.label)
        assert [re.sub(r"<[^>]*>|\*", "", cell).split()[0] for cell in cells[1:]] == [
            entry.text for entry in row.entries
        ]


def test_a_cell_without_numbers_is_absent_with_its_reason(tmp_path: Path) -> None:
    run, view = reporting.run(), {"metric": SOURCE.metric, "manipulator": SOURCE.manipulator}
    rows = [
        reporting.row(photo=photo, protector=name, value=value, error=error, **view)
        for photo in ("a", "b")
        for name, value, error in (("none", 0.9, ""), ("A", None, "out of memory"), ("B", 0.1, ""))
    ]
    (line,) = of_view(Results(run, rows), SOURCE).rows
    assert [entry.text for entry in line.entries] == ["0.900", "absent", "0.100"]
    assert [entry.notes for entry in line.entries] == [(), (1,), ()]
    report.write(tmp_path, run, rows)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "out of memory" in text
        assert "absent" in text


@pytest.mark.parametrize(("higher", "best", "second"), [(True, "B", "C"), (False, "A", "C")])
def test_marks_follow_the_direction_and_leave_the_unprotected_photo_out(
    higher: bool, best: str, second: str
) -> None:
    run = reporting.run(metrics={"x@edits": {"higher": higher}})
    rows = [
        reporting.row(photo=photo, protector=name, metric="x@edits", manipulator="m", value=value)
        for photo in ("a", "b")
        for name, value in (("none", 9.0 if higher else -9.0), ("A", 1.0), ("B", 3.0), ("C", 2.0))
    ]
    table = of_view(Results(run, rows), View(metric="x@edits", manipulator="m"))
    marks = dict(zip(table.columns, (entry.rank for entry in table.rows[0].entries), strict=True))
    other = ({"A", "B", "C"} - {best, second}).pop()
    assert marks == {"unprotected": "", best: "best", second: "second", other: ""}


def test_equal_means_share_a_mark_and_no_direction_has_none() -> None:
    rows = [
        reporting.row(protector=name, metric="x@edits", manipulator="m", value=value)
        for name, value in (("A", 1.0), ("B", 1.0), ("C", 0.5))
    ]
    view = View(metric="x@edits", manipulator="m")
    ranked = Results(reporting.run(metrics={"x@edits": {"higher": True}}), rows)
    open_ended = Results(reporting.run(metrics={"x@edits": {"higher": None}}), rows)
    assert [e.rank for e in of_view(ranked, view).rows[0].entries] == ["best", "best", "second"]
    assert {e.rank for e in of_view(open_ended, view).rows[0].entries} == {""}
    assert worst_cases(open_ended).rows == ()


def test_the_page_loads_nothing_and_runs_only_its_own_script(folder: Path, page: Page) -> None:
    assert all(address.startswith(("#", "data:image/webp;")) for address in page.addresses)
    assert page.tags.count("script") == 1
    assert page.handlers == []
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)


def test_hostile_labels_stay_text(tmp_path: Path) -> None:
    rows = [
        reporting.row(
            photo=f"{HOSTILE}{index}", protector=name, attack=attack, manipulator=HOSTILE,
            condition=HOSTILE, metric=f"{HOSTILE}@source", value=value, error=error,
        )
        for index in range(3)
        for name in ("none", HOSTILE)
        for attack, value, error in (("none", 0.5 + index, ""), (HOSTILE, None, HOSTILE))
    ]  # fmt: skip
    run = reporting.run(
        name=HOSTILE, command=HOSTILE, settings={HOSTILE: HOSTILE}, hardware=HOSTILE,
        metrics={f"{HOSTILE}@source": {"higher": False, "summary": HOSTILE, "unit": HOSTILE}},
    )  # fmt: skip
    reporting.pictures(tmp_path, photos=1, side=16)
    entries = json.loads((tmp_path / "pictures.json").read_text())
    for entry in entries:
        entry["photo"] = entry["condition"] = HOSTILE
    (tmp_path / "pictures.json").write_text(json.dumps(entries))
    text = report.write(tmp_path, run, rows).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1
    assert page.handlers == []
    assert "<script>alert" not in text
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"^(?!    ).*<script>", written.replace(r"\<", ""), re.MULTILINE)


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    text = report.write(tmp_path, reporting.run(metrics={}), []).read_text(encoding="utf-8")
    assert "This run has no rows" in text
    assert "<table" not in text


def test_a_run_of_failures_claims_nothing(tmp_path: Path) -> None:
    rows = [
        reporting.row(protector=name, attack=attack, manipulator="m", metric="sr@edits",
                      value=None, error="no such weights")
        for name in ("none", "A") for attack in ("none", "jpeg:75")
    ]  # fmt: skip
    text = report.write(tmp_path, reporting.run(), rows).read_text(encoding="utf-8")
    assert "Nothing could be measured" in text
    assert "4 of 4 numbers could not be computed" in text
    assert "no such weights" in text
    assert "does best" not in text


def changed(values: dict[str, list[float]], attack: str = "none") -> list[Row]:
    return [
        reporting.row(photo=str(place), protector=name, metric="x@edits", manipulator="m",
                      attack=attack, value=value)
        for name, known in values.items() for place, value in enumerate(known)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ([0.5, 0.6, 0.7, 0.6, 0.6], "holds"),
        ([0.1, 0.3, 0.1, 0.3, 0.2], "not shown"),
        ([0.0, 0.1, 0.0, 0.1, 0.0], "harms"),
        ([0.6, 0.7, 0.6, 0.7], "unknown"),
        ([0.9], "unknown"),
    ],
)
def test_a_protection_holds_only_if_the_interval_of_its_change_excludes_nothing(
    own: list[float], verdict: str
) -> None:
    rows = changed({"none": [0.2, 0.2, 0.2, 0.2, 0.2], "A": own})
    results = Results(reporting.run(metrics={"x@edits": {"higher": True}}), rows)
    assert results.verdict(View(metric="x@edits", manipulator="m"), "A", "none") == verdict


def test_what_is_left_is_the_share_of_the_unhandled_change() -> None:
    rows = changed({"none": [0.2] * 5, "A": [0.6] * 5})
    rows += changed({"none": [0.3] * 5, "A": [0.4] * 5}, "jpeg:75")
    results = Results(reporting.run(metrics={"x@edits": {"higher": True}}), rows)
    left = results.left(View(metric="x@edits", manipulator="m"), "A", "jpeg:75")
    assert left == pytest.approx(0.25)
    assert "jpeg:75 (25 %)" in cards(results)[0].judgements[0].of("holds")


def test_an_infinite_psnr_of_untouched_edits_does_not_hide_a_protection() -> None:
    rows = changed({"none": [math.inf] * 6, "A": [15.0, 16.0] * 3})
    results = Results(reporting.run(metrics={"x@edits": {"higher": False}}), rows)
    view = View(metric="x@edits", manipulator="m")
    assert results.verdict(view, "A", "none") == "holds"
    assert [entry.text for entry in of_view(results, view).rows[0].entries] == ["∞", "15.5"]


def test_the_words_name_who_does_best_and_what_nobody_withstands(rows: list[Row]) -> None:
    text = " ".join(overall(Results(reporting.run(), rows)))
    assert "FaceLock 8 robust does best" in text
    assert "Hardest to withstand: tip-rsr" in text


def test_one_photo_allows_no_claim() -> None:
    results = Results(reporting.run(), reporting.rows(photos=1))
    text = " ".join(overall(results))
    assert "One photo allows no statement" in text
    assert "Hardest" not in text


def test_the_words_say_who_was_made_with_the_judge() -> None:
    entries = [
        {"label": "none", "method": ""}, {"label": "gone", "method": "nobody"},
        {"label": "FaceLock 8", "method": "facelock", "networks": {"recognizer": "mobilefacenet"}},
        {"label": "ID-Guard", "method": "facelock"},
    ]  # fmt: skip
    run = reporting.run(settings={"protectors": entries})
    said = " ".join(overall(Results(run, reporting.rows())))
    both = "mobilefacenet, which judges here, and portrait-ae, which forges here"
    assert f"FaceLock 8 was made against {both}: " in said
    assert "ID-Guard was made against portrait-ae, which forges here: " in said
    assert said.count("was made against") == 2


@pytest.mark.parametrize(
    "attacks",
    [["screenshot:0.9", "screenshot:0.5"], ["facebook:2048", "facebook:512"],
     ["tip-rsr:blend=0.4", "tip-rsr:blend=0.1"], ["rotate:5", "rotate:20"]],
)  # fmt: skip
def test_what_keeps_more_of_the_photo_is_gentler(attacks: list[str]) -> None:
    (family,) = families(attacks[::-1])
    assert [attack for _, attack in family.levels] == attacks


def test_families_run_from_gentle_to_strong() -> None:
    found = {family.name: [level for level, _ in family.levels]
             for family in families(reporting.ATTACKS)}  # fmt: skip
    assert found == {"jpeg:…": ["90", "75", "50"], "resize:…": ["0.75", "0.5"],
                     "blur:…": ["1", "2"]}  # fmt: skip
    (chained,) = families(["blur:0,window=9", "blur:0,window=3", "vae:taef2"])
    assert chained.levels == (("3", "blur:0,window=3"), ("9", "blur:0,window=9"))


@pytest.mark.parametrize("values", [[0.0], [1e-4, 3e-4], [-3.0, 250.0], [5.0, 5.0]])
def test_ticks_lie_within_their_axis(values: list[float]) -> None:
    axis = Axis.around(values, 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 10
    assert all(0 <= axis.place(tick) <= 100 for tick in ticks)


def test_pictures_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    reporting.pictures(tmp_path, photos=2, side=32)
    everything = pictures.load(tmp_path, reporting.ATTACKS)
    assert (everything.shown, everything.left_out, everything.broken) == (100, 0, [])
    some = pictures.load(tmp_path, reporting.ATTACKS, weight=20_000)
    sizes = [len(address) for gallery in some.galleries for row in gallery.rows.values()
             for address in row.values()]  # fmt: skip
    assert 0 < some.shown < 100
    assert some.shown + some.left_out == 100
    assert sum(sizes) <= 20_000


def test_pictures_of_the_first_seed_are_shown_whatever_it_is(tmp_path: Path) -> None:
    reporting.pictures(tmp_path, photos=1, side=16)
    entries = json.loads((tmp_path / "pictures.json").read_text())
    forged = [entry for entry in entries if entry["kind"] not in {"clean", "protected"}]
    for entry in forged:
        entry["seed"] = 3
    again = [{**entry, "seed": 7} for entry in forged]
    (tmp_path / "pictures.json").write_text(json.dumps([*entries, *again]))
    album = pictures.load(tmp_path, reporting.ATTACKS)
    assert album.shown == len(entries)
    assert album.left_out == len(again)


def test_broken_pictures_and_those_outside_of_the_run_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    reporting.pictures(folder, photos=1, side=16)
    entries = json.loads((folder / "pictures.json").read_text())
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    entries[0]["file"] = "../secret.png"
    (folder / entries[1]["file"]).write_bytes(b"not a picture")
    (folder / "pictures.json").write_text(json.dumps(entries))
    album = pictures.load(folder, reporting.ATTACKS)
    assert set(album.broken) == {"../secret.png", entries[1]["file"]}
    assert album.shown == len(entries) - 2


@pytest.mark.parametrize("content", [None, "{", '[{"photo": "a"}]', "7"])
def test_without_a_list_of_pictures_there_is_a_report_still(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "pictures.json").write_text(content)
    rows = [reporting.row(protector="A", value=30.0)]
    assert "<img src" not in report.write(tmp_path, reporting.run(), rows).read_text()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html cannot be written"):
        report.write(tmp_path, reporting.run(), [reporting.row()])


def test_nothing_is_left_beside_the_report(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "images", "pictures.json", "report.html", "report.md",
    }  # fmt: skip
