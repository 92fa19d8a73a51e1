"""Many photos: what is done already, and no failure that stops the rest.

A result folder carries a manifest, one JSON record a line and appended as work goes on. A record is
written before a result ("started") and after it ("protected"), so that whatever kills the process,
the next run knows which files are its own.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shields.errors import OutputError, ShieldsError
from shields.folders import Job, check_writable
from shields.photo import read, write
from shields.sheet import write_sheet
from shields.spread import Workers, spread
from shields.types import Progress
from shields.verify import Report, verify

if TYPE_CHECKING:
    from shields.models.base import Perceptual
    from shields.shield import ProtectedPhoto, Shield

__all__ = [
    "MANIFEST",
    "Batch",
    "Manifest",
    "Outcome",
    "Writing",
    "find_record",
    "made_from",
    "process_all",
]

MANIFEST = ".shields.jsonl"
Status = Literal["protected", "skipped", "failed"]
#: what is known of an output: nothing there, finished, ours to replace, somebody else's
State = Literal["free", "done", "ours", "foreign"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Manifest:
    """The records of one result folder; the last one of an output counts."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / MANIFEST
        self._records: dict[str, dict[str, Any]] = {}
        text = self.path.read_bytes() if self.path.exists() else b""
        # A line that was cut off by a power failure is nobody's record.
        self._torn = bool(text) and not text.endswith(b"\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._records[record["output"]] = record
            except (ValueError, TypeError, KeyError):
                continue

    def _key(self, output: Path) -> str:
        return Path(os.path.relpath(output, self.root)).as_posix()

    def find(self, output: Path) -> dict[str, Any] | None:
        """The last record of an output."""
        return self._records.get(self._key(output))

    def append(self, output: Path, record: dict[str, Any]) -> None:
        """Add a record and see it to the disk, in one write."""
        record = {"output": self._key(output), **record}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(b"\n" + line if self._torn else line)
            os.fsync(file.fileno())
        self._torn = False
        self._records[record["output"]] = record

    def state(self, job: Job, source: str, settings: str) -> State:
        """What the manifest and the disk say of an output."""
        if not job.output.exists():
            return "free"
        record = self.find(job.output)
        if record is None:
            return "foreign"
        if record["status"] == "started":
            return "ours"
        if record["output_sha256"] != _sha256(job.output):
            return "foreign"
        same = record["source_sha256"] == source and record["settings"] == settings
        return "done" if same else "ours"


def find_record(protected: Path) -> dict[str, Any] | None:
    """What the manifest of a result's folder, or of one above it, says about a result."""
    protected = protected.resolve()
    for folder in protected.parents:
        if (folder / MANIFEST).is_file():
            record = Manifest(folder).find(protected)
            if record is not None and record["status"] == "protected":
                return record
    return None


def made_from(protected: Path) -> Path | None:
    """The photo that a result was made from; None where it is no result, or not as it was made."""
    record = find_record(protected)
    if record is None or record["output_sha256"] != _sha256(protected):
        return None
    return Path(record["source"])


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How photos are read and results written."""

    quality: int | None = None
    keep_metadata: bool = False
    max_pixels: int | None = None
    #: write before / after / change pictures: a PNG for a single photo, or a folder
    sheet: Path | None = None
    #: redo finished photos, and replace files that are nobody's original but not ours either
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one photo."""

    job: Job
    status: Status
    error: str | None = None
    #: regions, notes, seconds and verification, ready for JSON
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        head = {"source": str(self.job.source), "output": str(self.job.output)}
        return {**head, "status": self.status, "error": self.error, **self.details}


class Batch:
    """Protects photo after photo with one shield.

    Args:
        shield: Does the work.
        run: Whatever decides the result, ready for JSON; a change of it redoes finished photos.
        writing: How files are read and written.
        originals: Every input, none of which is ever written over.
        perceptual: An LPIPS network for the verification.
        lpips_missing: Why there is none, for reports.
    """

    def __init__(
        self,
        shield: Shield,
        *,
        run: dict[str, Any],
        writing: Writing,
        originals: Iterable[Path] = (),
        perceptual: Perceptual | None = None,
        lpips_missing: str | None = None,
    ) -> None:
        self.shield, self.run, self.writing = shield, run, writing
        self.perceptual, self.lpips_missing = perceptual, lpips_missing
        self.originals = {path.resolve() for path in originals}
        text = json.dumps(run, sort_keys=True, allow_nan=False)
        self.settings = hashlib.sha256(text.encode()).hexdigest()
        self._manifests: dict[Path, Manifest] = {}
        self._full = False

    def process(self, job: Job, progress: Progress | None = None) -> Outcome:
        """Protect one photo; whatever goes wrong with it becomes a failed outcome."""
        if self._full:
            return Outcome(job=job, status="failed", error="not tried: the disk is full")
        try:
            return self._process(job, progress)
        except Exception as error:  # one bad file never stops the rest
            self._full = _disk_is_full(error)
            known = isinstance(error, ShieldsError | OSError)
            text = str(error) if known else f"unexpected {type(error).__name__}: {error}"
            return Outcome(job=job, status="failed", error=" ".join(text.split()))

    def _process(self, job: Job, progress: Progress | None) -> Outcome:
        source = _sha256(job.source)
        check_writable(job.output.parent)
        manifest = self._manifests.setdefault(job.root, Manifest(job.root))
        state = manifest.state(job, source, self.settings)
        before, sheet = manifest.find(job.output), self._sheet(job)
        if state == "done" and before is not None and not self.writing.overwrite:
            details = before["details"]
            # A picture that is asked for only now is drawn by doing the photo once more.
            if sheet is None or (details["sheet"] == str(sheet) and sheet.exists()):
                return Outcome(job=job, status="skipped", details=details)
        self._check_free(job.output, known=state in {"free", "ours", "done"})
        if sheet is not None:
            check_writable(sheet.parent)
            known = before is not None and before["details"]["sheet"] == str(sheet)
            self._check_free(sheet, known=known)
        limit = {} if self.writing.max_pixels is None else {"max_pixels": self.writing.max_pixels}
        protected = self.shield.protect(read(job.source, **limit), progress=progress)
        ours = {"sheet": None if sheet is None else str(sheet)}
        manifest.append(job.output, {"status": "started", "details": ours})
        report = self._save(job, protected)
        if sheet is not None:
            write_sheet(sheet, protected.photo.pixels, protected.pixels, protected.placements)
        details = {
            "sha256": source,
            "seconds": round(protected.seconds, 3),
            "notes": list(protected.notes),
            "regions": [region.to_dict() for region in protected.regions],
            **ours,
            "report": report.to_dict(),
        }
        if problem := _judge(report):
            return Outcome(job=job, status="failed", error=problem, details=details)
        record = {
            "status": "protected",
            "source": str(job.source.resolve()),
            "source_sha256": source,
            "output_sha256": _sha256(job.output),
            "settings": self.settings,
            "run": self.run,
            "details": details,
        }
        manifest.append(job.output, record)
        return Outcome(job=job, status="protected", details=details)

    def _save(self, job: Job, protected: ProtectedPhoto) -> Report:
        """Write a result and judge what arrived on the disk."""
        write(
            job.output,
            protected.pixels,
            protected.photo,
            keep_metadata=self.writing.keep_metadata,
            quality=self.writing.quality,
        )
        report = verify(
            job.source,
            job.output,
            protected.config.budget,
            regions=protected.regions,
            protector=self.shield.protector,
            perceptual=self.perceptual,
            device=self.shield.device,
            max_pixels=self.writing.max_pixels,
        )
        missing = self.lpips_missing or report.lpips_missing
        return dataclasses.replace(report, lpips_missing=missing)

    def _sheet(self, job: Job) -> Path | None:
        place = self.writing.sheet
        if place is None or place.suffix.lower() == ".png":
            return place
        inside = job.output.relative_to(job.root)
        return place / inside.with_name(f"{job.output.stem}-sheet.png")

    def _check_free(self, path: Path, *, known: bool) -> None:
        if path.resolve() in self.originals:
            raise OutputError(f"{path} is an original and is never written over")
        if path.exists() and not known and not self.writing.overwrite:
            raise OutputError(
                f"{path} exists and was not made by this command; "
                "move it, choose another --out, or pass --overwrite"
            )


def process_all(
    make: Callable[[], Batch], jobs: Sequence[Job], workers: Workers
) -> Iterator[Outcome]:
    """Protect photos by several processes; outcomes come in the order of the jobs.

    Args:
        make: Builds the batch of a process; can be pickled.
        jobs: What there is to do.
        workers: The processes.

    Raises:
        ShieldsError: The processes cannot be had, or cannot build their batch.
    """
    return spread(_Elsewhere(make), jobs, workers, lost=_lost)


class _Elsewhere:
    """A batch that is built in the process which works with it, once."""

    def __init__(self, make: Callable[[], Batch]) -> None:
        self._make = make
        self._batch: Batch | None = None

    def __call__(self, job: Job) -> Outcome:
        if self._batch is None:
            self._batch = self._make()
        return self._batch.process(job)


def _lost(job: Job, reason: str) -> Outcome:
    return Outcome(job=job, status="failed", error=reason)


def _judge(report: Report) -> str | None:
    """What speaks against a result; a lossy format breaks the budget by its nature."""
    if report.ok or (report.lossy and report.same_size):
        return None
    return "verification failed: " + "; ".join(report.problems)


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        error = error.__cause__ or error.__context__
    return False
