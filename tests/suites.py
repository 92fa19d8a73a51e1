"""A small suite on small networks, for the tests of suites and of their command."""

import dataclasses

import numpy as np
import torch
from PIL import Image as PillowImage

from robustness.runner import Place, run_suite
from robustness.suite import Suite
from shields.models.manipulation import Editor
from tests import tiny

#: a protector that takes two steps against a small network
QUICK = {"method": "encoder", "steps": 2, "networks": {"autoencoder": "small-portrait-ae"}}


def write_photos(folder, count=2, size=64):
    """Portrait-free photos of noise and colour, `0.png` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        levels = (tiny.faces_image(1, size, index)[0] * 255).byte().permute(1, 2, 0).numpy()
        PillowImage.fromarray(levels).save(folder / f"{index}.png")
    return folder


def write_protected(photos, folder):
    """The same photos with every value moved by up to six levels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for path in sorted(photos.glob("*.png")):
        pixels = np.array(PillowImage.open(path)).astype(int)
        moved = (pixels + rng.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8)
        PillowImage.fromarray(moved).save(folder / path.name)
    return folder


def suite(folder, /, **changes):
    """A suite of one protector, one attack and one manipulator."""
    values = {
        "name": "tiny", "photos": str(folder), "protectors": [QUICK], "attacks": ["jpeg:75"],
        "manipulators": [{"name": "small-stargan", "conditions": ["smiling"]}],
        "metrics": ["psnr@photo", "mse@edits"],
    }  # fmt: skip
    return Suite.from_dict({**values, **changes})


def pictures(folder):
    """Every image of a run with the time of its writing."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}


class Tinter(Editor):
    """An editor that mixes in a colour made of the prompt and the seed."""

    size = 64

    def edit(self, image, prompts, *, seeds):
        """Edit (B, 3, H, W): a plain mix, resized to its square."""
        small = torch.nn.functional.interpolate(image, (self.size, self.size))
        colours = [
            torch.tensor([len(prompt) % 5 / 5, seed % 3 / 3, 0.5]).view(1, 3, 1, 1)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return 0.5 * small + 0.5 * torch.cat(colours)


def run(what, tmp_path, store, out="out", **options):
    """Run a suite into a folder: what is true of all rows, and the rows."""
    return run_suite(what, Place(out=tmp_path / out, weights_dir=store.folder), **options)


def cells(rows):
    """Rows by what they are about."""
    return {
        (row.photo, row.protector, row.attack, row.manipulator, row.condition, row.metric): row
        for row in rows
    }


def untimed(rows):
    """Rows without their seconds."""
    return [dataclasses.replace(row, seconds=0) for row in rows]
