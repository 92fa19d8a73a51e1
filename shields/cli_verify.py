"""`shields verify`: the verdict on a saved photo, for people and for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from shields.batch import find_record
from shields.budget import Budget
from shields.cli_common import fail, out, plain, store_at, write_json
from shields.errors import ConfigError, ImageError, ShieldsError, WeightsError
from shields.shield import Region, choose_device
from shields.verify import verify

if TYPE_CHECKING:
    import torch

    from shields.models.base import Perceptual
    from shields.protectors.base import Protector
    from shields.weights import WeightStore

__all__ = ["lpips", "rows", "run", "table"]

_LPIPS = "lpips-alex"


def lpips(store: WeightStore, device: torch.device) -> tuple[Perceptual | None, str | None]:
    """The LPIPS network, or None and why it is not there."""
    from shields import models

    try:
        network: Perceptual = models.load("perceptual", _LPIPS, store=store, device=device)
    except WeightsError:  # the usual case: a place in a table is no place for every path tried
        return None, f"weights not on this machine; `shields models pull {_LPIPS}` fetches them"
    except ShieldsError as error:
        return None, str(error)
    return network, None


def run(
    original: Path,
    protected: Path,
    *,
    levels: float | None,
    document: Path | None,
    weights_dir: Path | None,
    device: str,
    max_pixels: int | None,
    as_json: bool,
) -> int:
    """Verify one photo, print the report, return the exit status.

    Raises:
        ShieldsError: A file or a setting is missing or makes no sense.
    """
    for path in (original, protected):
        if not path.is_file():
            raise ConfigError(f"there is no photo at {path}")
    record = find_record(protected) if document is None else _from_report(document, protected)
    run, details = ({}, None) if record is None else (record["run"], record["details"])
    config = run.get("config", {})
    budget = Budget(
        levels=config.get("levels", 8.0) if levels is None else levels,
        norm=config.get("norm", "linf"),
    )
    place, store = choose_device(device), store_at(weights_dir)
    protector, why = _protector(run, store, place)
    perceptual, no_lpips = (None, None) if details is None else lpips(store, place)
    try:
        report = verify(
            original,
            protected,
            budget,
            regions=None if details is None else list(map(Region.from_dict, details["regions"])),
            protector=protector,
            perceptual=perceptual,
            device=place,
            max_pixels=max_pixels,
        )
    except ImageError as error:  # a photo that cannot be read is a verdict, not wrong usage
        fail(str(error))
        if as_json:
            write_json({"ok": False, "error": str(error), "kind": type(error).__name__})
        return 1
    report = dataclasses.replace(
        report,
        objective_missing=why or report.objective_missing,
        lpips_missing=no_lpips or report.lpips_missing,
    )
    if as_json:
        write_json(report.to_dict())
    else:
        out.print(table(f"verified: {protected}", rows(report.to_dict())))
    return 0 if report.ok else 1


def _from_report(path: Path, protected: Path) -> dict[str, Any]:
    """Find a photo in what `shields protect --json` printed."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        photos = [photo for photo in document["photos"] if "regions" in photo]
        names = [Path(photo["output"]).name for photo in photos]
        if protected.name not in names:
            raise ConfigError(f"{path} says nothing about {protected.name}, but about {names}")
        return {"run": document["run"], "details": photos[names.index(protected.name)]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ShieldsError):
            raise
        raise ConfigError(
            f"{path} is not what `shields protect --json` prints ({type(error).__name__}: {error})"
        ) from error


def _protector(
    run: Mapping[str, Any], store: WeightStore, device: torch.device
) -> tuple[Protector | None, str | None]:
    """The protector that made a photo, or None and why it cannot be had."""
    from shields import protectors

    if not run:
        return None, None
    try:
        config = protectors.PROTECTORS[run["method"]].Config(**run["config"])
        loaded = protectors.load(
            run["method"], config, networks=run["networks"], store=store, device=device
        )
    except ShieldsError as error:
        return None, str(error)
    except (KeyError, TypeError) as error:  # settings that came or went with a version
        return None, f"made by another version of shields: {error}"
    return loaded, None


def table(title: str, lines: Iterable[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    result = Table(title=plain(title), title_justify="left", show_header=False, box=None)
    for name, value in lines:
        result.add_row(f"[bold]{plain(name)}[/]", plain(value))
    return result


def rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A report, as `Report.to_dict` gives it, for people."""
    lines = [("verdict", "good" if report["ok"] else "not as promised")]
    lines += [("problem", problem) for problem in report["problems"]]
    lines.append(("size", f"{report['width']} x {report['height']}, {report['format']}"))
    if not report["same_size"]:
        return lines
    change = f"{report['largest_change']} of {report['allowed_change']} levels"
    outside = report["outside_change"]
    regions = "not known" if outside is None else f"{outside} levels"
    lines += [
        ("largest change", change),
        ("change outside the regions", regions),
        ("changed pixels", f"{100 * report['changed_share']:.1f} %"),
        ("PSNR", _number(report["psnr"], "{:.2f} dB", "photos are equal")),
        ("SSIM", _number(report["ssim"], "{:.4f}", "photo too small")),
        ("LPIPS", _number(report["lpips"], "{:.4f}", report["lpips_missing"])),
    ]
    before = _number(report["objective_before"], "{:.4f}", report["objective_missing"])
    after = report["objective_after"]
    lines.append(("objective", before if after is None else f"{before} -> {after:.4f}"))
    return lines


def _number(value: float | None, form: str, missing: str | None) -> str:
    return f"none ({missing or 'not measured'})" if value is None else form.format(value)
