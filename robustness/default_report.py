"""What the default protection does, on held-out networks too: the table in the README.

`python -m robustness.default_report` protects the CelebA-HQ samples at 256x256: by the embedded
generator as `shields protect` runs it, and by FaceLock, once against the embedded networks and once
against published ones, with and without `--robust`. Every result is then handled for real (the
codec and Pillow's Lanczos, nothing differentiable), sent through each autoencoder and looked at by
each recognizer. Protected photos are kept, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
import typer
from PIL import Image as PILImage
from rich.progress import Progress

from robustness.attacks import parse
from robustness.metrics import bootstrap
from shields import metrics
from shields.errors import ConfigError, ImageError
from shields.models import load as load_network
from shields.models.base import Autoencoder, Recognizer
from shields.models.detectors import MtcnnDetector
from shields.photo import write
from shields.protectors import load
from shields.protectors.facelock import FaceLockConfig
from shields.protectors.learned import ArsConfig
from shields.provenance import hardware, revision
from shields.shield import Shield
from shields.types import Photo
from shields.weights import WeightStore

__all__ = ["ATTACKS", "GENERATOR", "PAIRS", "Plan", "app", "render", "summarise"]

#: name -> (autoencoder, recognizer)
PAIRS = {
    "embedded": ("portrait-ae", "face-embedder"),
    "published": ("taef2", "mobilefacenet"),
}
#: the embedded generator, trained against both autoencoders and the embedded recognizer
GENERATOR = "ars-latent"


#: what a protected photo goes through, by the real codec and the real resampler
ATTACKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": parse("none").apply,
    "JPEG 75": parse("jpeg:75").apply,
    "half size": parse("resize:0.5,restore=true").apply,
    "C&R": parse("cr:restore=true").apply,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way of protecting: which networks, how far, how carefully."""

    optimised: str
    levels: float
    robust: bool
    stealth: bool = False

    @property
    def method(self) -> str:
        """The protector's name."""
        return "ars" if self.optimised == GENERATOR else "facelock"

    @property
    def networks(self) -> dict[str, str]:
        """Role -> card."""
        if self.optimised == GENERATOR:
            return {"generator": GENERATOR}
        return dict(zip(("autoencoder", "recognizer"), PAIRS[self.optimised], strict=True))

    def config(self) -> FaceLockConfig | ArsConfig:
        """As `shields protect` runs it; FaceLock's larger networks in bfloat16 for speed."""
        if self.optimised == GENERATOR:
            return ArsConfig(levels=self.levels)
        config = replace(FaceLockConfig(), levels=self.levels, stealth=self.stealth)
        config = config.hardened() if self.robust else config
        return replace(config, precision="bfloat16") if self.optimised == "published" else config

    def key(self) -> str:
        """A name that changes with any setting."""
        text = json.dumps([asdict(self), self.config().to_dict()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def photos(folder: Path, limit: int | None) -> Iterator[Photo]:
    """Read the samples at 256x256 (resized before protecting: the files are JPEGs themselves)."""
    paths = sorted(folder.glob("*.jpg"))[:limit]
    if not paths:
        raise ImageError(f"no .jpg in {folder}; name the CelebA-HQ samples with --photos")
    for path in paths:
        image = PILImage.open(path).convert("RGB").resize((256, 256), PILImage.Resampling.LANCZOS)
        yield Photo(pixels=np.array(image), path=path)


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


class _Judge:
    """A pair of networks that measures: recognizer after the autoencoder's round trip."""

    def __init__(self, pair: str, store: WeightStore) -> None:
        device = torch.device("cpu")
        autoencoder, recognizer = PAIRS[pair]
        network = load_network("autoencoder", autoencoder, store=store, device=device)
        judge = load_network("recognizer", recognizer, store=store, device=device)
        assert isinstance(network, Autoencoder)
        assert isinstance(judge, Recognizer)
        self.autoencoder, self.recognizer = network, judge
        #: of the weights files, so that measurements are not mistaken for those of other networks
        self.digests = [store.card(name).sha256 for name in PAIRS[pair]]

    @torch.no_grad()
    def similarities(
        self, pixels: np.ndarray, clean: np.ndarray, landmarks: torch.Tensor | None
    ) -> dict[str, float]:
        """Per attack: cosine of the handled photo after the round trip with the clean photo."""
        image = torch.cat([_tensor(handle(pixels)) for handle in ATTACKS.values()])
        reference = _tensor(clean)
        matrix = self.recognizer.matrix(landmarks, reference)
        after = self.autoencoder.reconstruct(image)
        embedding = self.recognizer(after, matrix.expand(len(image), 2, 3))
        cosine = (embedding * self.recognizer(reference, matrix)).sum(dim=1)
        return dict(zip(ATTACKS, cosine.tolist(), strict=True))


@dataclass(frozen=True)
class _Sample:
    """A photo, where its face is, and what the judges say of it unprotected."""

    photo: Photo
    landmarks: torch.Tensor | None
    clean: dict[str, dict[str, float]]

    @classmethod
    def of(cls, photo: Photo, judges: dict[str, _Judge], detector: MtcnnDetector) -> Self:
        """Judge a clean photo, once for all plans."""
        faces = detector(photo.image())
        points = torch.from_numpy(faces[0].landmarks)[None].float() if faces else None
        clean = {
            pair: judge.similarities(photo.pixels, photo.pixels, points)
            for pair, judge in judges.items()
        }
        return cls(photo, points, clean)


def _protect(
    plan: Plan, sample: list[Photo], store: WeightStore, folder: Path, tick: Callable[[], None]
) -> None:
    """Protect what is not in `folder` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    shield: Shield | None = None
    for photo in sample:
        assert photo.path is not None
        target = folder / f"{photo.path.stem}.png"
        if not target.is_file():
            if shield is None:
                device = torch.device("cpu")
                protector = load(
                    plan.method, plan.config(), store=store, device=device, networks=plan.networks
                )
                shield = Shield(protector, detector=MtcnnDetector.load(device=device))
            write(target, shield.protect(photo).pixels, photo)
        tick()


def _measure(
    plan: Plan, samples: list[_Sample], judges: dict[str, _Judge], folder: Path
) -> list[dict[str, object]]:
    """Judge every protected photo of a plan; what was measured before is read from its folder."""
    basis = {
        "judges": {pair: judge.digests for pair, judge in judges.items()},
        "photos": [sample.photo.path.name for sample in samples if sample.photo.path is not None],
    }
    kept = folder / "rows.json"
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["basis"] == basis:
            return list(found["rows"])
    rows: list[dict[str, object]] = []
    for sample in samples:
        photo = sample.photo
        assert photo.path is not None
        protected = np.asarray(PILImage.open(folder / f"{photo.path.stem}.png").convert("RGB"))
        clean, image = photo.image(), _tensor(protected)
        facts = {
            **asdict(plan),
            "photo": photo.path.name,
            "max_levels": int(np.abs(protected.astype(int) - photo.pixels.astype(int)).max()),
            "psnr": float(metrics.psnr(image, clean)[0]),
            "ssim": float(metrics.ssim(image, clean)[0]),
            "flip": float(metrics.flip(image, clean)[0]),
        }
        for pair, judge in judges.items():
            after = judge.similarities(protected, photo.pixels, sample.landmarks)
            rows += [
                {
                    **facts,
                    "attack": attack,
                    "measured": pair,
                    "similarity": after[attack],
                    "clean": sample.clean[pair][attack],
                }
                for attack in ATTACKS
            ]
    kept.write_text(json.dumps({"basis": basis, "rows": rows}), encoding="utf-8")
    return rows


def summarise(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Mean, interval and n of every cell, fidelity beside it."""
    keys = ("optimised", "measured", "levels", "robust", "stealth", "attack")
    cells: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in keys), []).append(row)
    summary: list[dict[str, object]] = []
    for cell, members in cells.items():
        means = {
            name: float(np.mean([float(str(member[name])) for member in members]))
            for name in ("similarity", "clean", "psnr", "ssim", "flip")
        }
        _, low, high = bootstrap([float(str(member["similarity"])) for member in members])
        summary.append(
            {
                **dict(zip(keys, cell, strict=True)),
                **means,
                "low": low,
                "high": high,
                "n": len(members),
            }
        )
    return summary


def render(report: Mapping[str, object]) -> str:
    """The Markdown table of a report."""
    summary = report["summary"]
    assert isinstance(summary, list)
    cells = {
        (c["optimised"], c["measured"], c["levels"], c["robust"], c["stealth"], c["attack"]): c
        for c in summary
    }
    lines = [
        "| optimised against | measured on | levels | `--robust` | none | JPEG 75 | half size "
        "| C&R | SSIM | ꟻLIP |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    done = set()
    for optimised, measured, levels, robust, stealth, _ in cells:
        line = (optimised, measured, levels, robust, stealth)
        if line in done:
            continue
        done.add(line)
        row = [cells[*line, attack] for attack in ATTACKS]
        values = " | ".join(f"{cell['similarity']:.2f}" for cell in row)
        held_out = "" if optimised == measured else " (held out)"
        if optimised == GENERATOR:
            held_out = {"published": " (recognizer held out)"}.get(measured, "")
        flags = ("yes" if robust else "no") + (" + `--stealth`" if stealth else "")
        lines.append(
            f"| {optimised} | {measured}{held_out} | {levels:g} | {flags} | {values} "
            f"| {row[0]['ssim']:.3f} | {row[0]['flip']:.3f} |"
        )
    clean = {c["measured"]: c for c in summary if c["attack"] == "none"}
    worst = {c["measured"]: c for c in summary if c["attack"] == "C&R"}
    base = "; ".join(
        f"{name} {clean[name]['clean']:.2f} (after C&R {worst[name]['clean']:.2f})"
        for name in clean
    )
    first = summary[0]
    lines += [
        "",
        "Mean cosine between the clean face and the face after handling and the autoencoder's "
        f"round trip, n = {first['n']} photos; lower is better. Unprotected photos: {base}. "
        f"Made by `{report['command']}` (commit {report['commit']}, seed 0, {report['hardware']}); "
        f"rows, intervals and every photo's value in `robustness/results/default.json`.",
    ]
    return "\n".join(lines)


def _insert(readme: Path, table: str) -> None:
    """Put the table between the README's markers."""
    begin, end = "<!-- default-report -->", "<!-- /default-report -->"
    text = readme.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ImageError(f"{readme} lacks the markers {begin} and {end}")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    readme.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")


def _command(cells: list[str], limit: int | None, *, stealth: bool) -> str:
    """What has to be typed to get the same figures."""
    words = ["python -m robustness.default_report", *(f"--plan {cell}" for cell in cells)]
    words += ["--stealth"] if stealth else []
    words += [] if limit is None else [f"--limit {limit}"]
    return " ".join(words)


def _cell(text: str) -> tuple[str, float]:
    """Read "embedded:8": networks to optimise against, and levels."""
    pair, _, levels = text.partition(":")
    try:
        if pair in (*PAIRS, GENERATOR) and float(levels) > 0:
            return pair, float(levels)
    except ValueError:
        pass
    names = " or ".join((*PAIRS, GENERATOR))
    raise ConfigError(f"--plan wants {names}, a colon and levels, got {text!r}")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    photo_folder: Annotated[Path, typer.Option("--photos", help="The CelebA-HQ samples.")] = Path(
        "../shared/data/celeba-hq-sample"
    ),
    weights_dir: Annotated[Path, typer.Option(help="Where taef2 and mobilefacenet lie.")] = Path(
        "../shared/weights"
    ),
    work: Annotated[Path, typer.Option(help="Where protected photos are kept.")] = Path(
        "out/default-report"
    ),
    output: Annotated[Path, typer.Option(help="The report to write.")] = Path(
        "robustness/results/default.json"
    ),
    plan: Annotated[
        list[str] | None,
        typer.Option(help="Optimise so, e.g. embedded:8; both pairs at 4, 8, 16 if left out."),
    ] = None,
    stealth: Annotated[bool, typer.Option(help="Add --stealth --robust at 8 levels.")] = False,
    limit: Annotated[int | None, typer.Option(help="Use the first N photos only.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Insert the table there.")] = None,
) -> None:
    """Protect, handle, measure, and write the report."""
    store = WeightStore(weights_dir)
    sample = list(photos(photo_folder, limit))
    cells = [_cell(text) for text in plan or ()]
    plans = [
        Plan(optimised=pair, levels=budget, robust=robust)
        for pair, budget in cells
        or [(pair, budget) for pair in PAIRS for budget in (4.0, 8.0, 16.0)]
        for robust in ((False,) if pair == GENERATOR else (False, True))
    ]
    if stealth:
        plans.append(Plan(optimised="embedded", levels=8.0, robust=True, stealth=True))
    rows: list[dict[str, object]] = []
    with Progress() as progress:
        task = progress.add_task("protecting", total=len(plans) * len(sample))
        for each in plans:
            _protect(each, sample, store, work / each.key(), lambda: progress.advance(task))
    judges = {pair: _Judge(pair, store) for pair in PAIRS}
    detector = MtcnnDetector.load(device=torch.device("cpu"))
    judged = [_Sample.of(photo, judges, detector) for photo in sample]
    for each in plans:
        rows += _measure(each, judged, judges, work / each.key())
    report = {
        "command": _command(plan or [], limit, stealth=stealth),
        "commit": revision(),
        "hardware": hardware(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "configs": {each.key(): {**asdict(each), **each.config().to_dict()} for each in plans},
        "summary": summarise(rows),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    table = render(report)
    print(table)
    if readme is not None:
        _insert(readme, table)


if __name__ == "__main__":
    app()
