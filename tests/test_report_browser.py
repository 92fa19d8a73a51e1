from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from robustness import report
from tests import reporting

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
HEIGHT = 1600
#: the page within a frame of the width wanted: a browser's window cannot be as narrow as a phone
FRAME = """<!doctype html><body style="margin:0">
<iframe id="frame" style="border:0;display:block;width:{width}px;height:{height}px"
 srcdoc="{page}"></iframe><output></output><script>
frame.onload = () => {{
  const page = frame.contentDocument;
  const zoom = page.querySelector(".zoom");
  const viewer = page.getElementById("viewer");
  zoom.click();
  const opened = viewer.open && viewer.querySelector("img").src === zoom.firstElementChild.src;
  viewer.close();
  const tables = [...page.querySelectorAll(".numbers .scroll")];
  const wide = tables.some((box) => box.scrollWidth > box.clientWidth);
  const loaded = [...page.images].filter((image) => image.src).every((image) => image.complete);
  document.querySelector("output").textContent = [
    "width=" + page.documentElement.scrollWidth, "opened=" + opened, "wide=" + wide,
    "loaded=" + loaded, "charts=" + page.querySelectorAll("svg[role=img]").length,
  ].join(" ");
}};</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"),
]


@dataclass(frozen=True)
class Seen:
    """What a browser made of the page."""

    width: int
    pixels: np.ndarray
    said: dict[str, str]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    reporting.pictures(folder, photos=1, side=24)
    return report.write(folder, reporting.run(), reporting.rows(photos=4)).read_text("utf-8")


@pytest.fixture(scope="module", params=[360, 1200], ids=["phone", "desktop"])
def seen(
    request: pytest.FixtureRequest, text: str, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    width, folder = int(request.param), tmp_path_factory.mktemp("browser")
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, height=HEIGHT, page=html.escape(text)), "utf-8")
    shot = folder / "shot.png"
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}",
         f"--window-size={max(width, 500)},{HEIGHT}", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    match = re.search(r"<output>(.+?)</output>", done.stdout)
    assert match, "the page did not load"
    said = dict(pair.split("=") for pair in match[1].split())
    with Image.open(shot) as image:
        return Seen(width, np.asarray(image.convert("RGB"))[:, :width], said)


def test_the_page_fits_its_width_and_only_wide_tables_scroll(seen: Seen) -> None:
    assert int(seen.said["width"]) == seen.width
    assert seen.said["wide"] == ("true" if seen.width < 500 else "false")


def test_the_page_is_drawn_from_top_to_bottom(seen: Seen) -> None:
    assert seen.pixels.shape == (HEIGHT, seen.width, 3)
    codes = seen.pixels.astype(np.int64) @ [65536, 256, 1]
    assert min(len(np.unique(band)) for band in np.array_split(codes, 8)) > 20


def test_charts_and_pictures_are_there_and_a_picture_opens_large(seen: Seen) -> None:
    # A heat map, three curves and a scatter for each of two forgers; five heat maps are folded.
    assert int(seen.said["charts"]) == 2 * (1 + 3 + 1) + 5
    assert seen.said["loaded"] == "true"
    assert seen.said["opened"] == "true"
