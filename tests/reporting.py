"""Rows and pictures of a run that never was, the same at every call."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from robustness.rows import Row, Run

PROTECTORS = ("none", "FaceLock 8", "FaceLock 8 robust", "PhotoGuard 8", "ID-Guard")
ATTACKS = ("none", "jpeg:90", "jpeg:75", "jpeg:50", "jpeg:75+resize:0.5", "resize:0.75",
           "resize:0.5", "blur:1", "blur:2", "tip-rsr", "vae:taef2")  # fmt: skip
FORGERS = ("portrait-ae", "stargan-smile")
#: protector -> similarity of the forgery to the person unhandled, and how fast that recovers
_STRENGTH = {"none": (0.86, 0.0), "FaceLock 8": (0.12, 0.9), "FaceLock 8 robust": (0.18, 0.35),
             "PhotoGuard 8": (0.45, 0.8), "ID-Guard": (0.35, 0.55)}  # fmt: skip
#: handling -> how much of a perturbation it takes away
_HARM = dict(zip(ATTACKS, (0.0, 0.25, 0.5, 0.8, 0.95, 0.4, 0.7, 0.5, 0.9, 1.1, 0.6), strict=True))
METRICS = {
    "psnr@photo": {"higher": True, "unit": "dB", "summary": "Peak signal-to-noise ratio."},
    "lpips:alex@photo": {"higher": False, "summary": "Perceptual distance."},
    "fr:mobilefacenet@source": {"higher": False, "summary": "Cosine of the face embeddings."},
    "sr@edits": {"higher": True, "summary": "1 where the edit has moved far, else 0."},
    "fid@edits": {"higher": True, "summary": "Distance of two sets of photos."},
    "clip-s@source": {"higher": None, "summary": "Likeness of image and prompt."},
    "ssim@handled": {"higher": False, "summary": "Structural similarity."},
}
MISSING = "weights of 'clip' are not here: shields models get clip"


def run(**fields: object) -> Run:
    facts = {name: {"low": 0.0, "high": 1.0, **fact} for name, fact in METRICS.items()}
    known = Run(
        name="offline", command="shields attack robustness/suites/offline.yaml --out runs/offline",
        settings={"name": "offline", "attacks": list(ATTACKS), "seeds": [0]},
        seed=0, started="2026-11-20T14:46:00+00:00", seconds=241.5, commit="c9dfd6e0a1",
        hardware="a processor, 2 cores, no GPU", versions={"python": "3.11.2", "torch": "2.15.0"},
        metrics=facts, weights={"portrait-ae": "ab" * 32},
    )  # fmt: skip
    return dataclasses.replace(known, **fields)


def row(**fields: object) -> Row:
    known = Row(
        photo="a.png", protector="none", attack="none", manipulator="none", condition="", seed=0,
        metric="psnr@photo", value=1.0,
    )  # fmt: skip
    return dataclasses.replace(known, **fields)


def rows(photos: int = 8, protectors: tuple[str, ...] = PROTECTORS) -> list[Row]:
    rng = np.random.default_rng(0)
    names = [f"{index:03d}.jpg" for index in range(photos)]
    found: list[Row] = []
    for name in names:
        for protector in protectors:
            fidelity = np.inf if protector == "none" else 38 - 3 * len(protector) / 10
            noise = float(rng.normal(0, 0.4))
            found.append(row(photo=name, protector=protector, value=fidelity + noise))
            distance = 0.0 if protector == "none" else 0.02 + abs(noise) / 50
            found.append(row(photo=name, protector=protector, metric="lpips:alex@photo",
                             value=distance))  # fmt: skip
            found += _handled(name, protector, rng)
    for protector in protectors:
        for attack in ATTACKS:
            for forger in FORGERS:
                where = {"protector": protector, "attack": attack, "manipulator": forger}
                value = float(40 * (1 - _HARM[attack] / 2) + rng.normal())
                found.append(row(photo="*", metric="fid@edits", value=value, **where))
    return found


def _handled(photo: str, protector: str, rng: np.random.Generator) -> list[Row]:
    base, recovery = _STRENGTH[protector]
    found = []
    for attack in ATTACKS:
        where = {"photo": photo, "protector": protector, "attack": attack}
        likeness = float(0.98 - 0.2 * _HARM[attack] + rng.normal(0, 0.01))
        found.append(row(metric="ssim@handled", value=likeness, **where))
        for shift, forger in enumerate(FORGERS):
            conditions = ("",) if forger == "portrait-ae" else ("smiling", "blond")
            for condition in conditions:
                there = {**where, "manipulator": forger, "condition": condition}
                back = (0.86 - base) * min(1.0, recovery * _HARM[attack])
                value = float(base + back - 0.04 * _HARM[attack] + rng.normal(0, 0.05) - shift / 20)
                broken = attack == "vae:taef2" and photo == "000.jpg"
                found.append(row(metric="fr:mobilefacenet@source", value=None if broken else value,
                                 error="no face was found in the forgery" if broken else "",
                                 **there))  # fmt: skip
                found.append(row(metric="sr@edits", value=float(value < 0.5), **there))
                found.append(row(metric="clip-s@source", value=None, error=MISSING, **there))
    return found


def pictures(folder: Path, photos: int = 2, side: int = 256) -> None:
    """Write `pictures.json` and small images, smooth with a face-like disc."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for index in range(photos):
        for place, protector in enumerate(PROTECTORS):
            for attack in ATTACKS[:5]:
                for forger in ("none", FORGERS[0]):
                    kind = "forged" if forger != "none" else "handled"
                    if attack == "none" and forger == "none":
                        kind = "clean" if protector == "none" else "protected"
                    file = f"images/{index}{place}{ATTACKS.index(attack)}{forger}.png"
                    _picture(index, place, forger == "none", side).save(folder / file)
                    entries.append({"photo": f"{index:03d}.jpg", "protector": protector,
                                    "attack": attack, "manipulator": forger, "condition": "",
                                    "seed": 0, "kind": kind, "file": file})  # fmt: skip
    (folder / "pictures.json").write_text(json.dumps(entries))


def _picture(index: int, place: int, plain: bool, side: int) -> Image.Image:
    down, across = np.mgrid[0:side, 0:side] / side
    disc = ((down - 0.5) ** 2 + (across - 0.5) ** 2 < 0.09)[..., None]
    ground = np.stack([0.3 + down / 2, 0.5 - across / 4, 0.4 + 0.1 * index + 0 * down], axis=-1)
    skin = np.array([0.85, 0.65, 0.55]) * (0.8 + 0.2 * down[..., None])
    noise = np.random.default_rng(place).normal(0, 0.02 * place, (side, side, 1))
    tint = 0.0 if plain else 0.15
    values = np.where(disc, skin - tint, ground) + noise
    return Image.fromarray((values.clip(0, 1) * 255).astype(np.uint8))
