"""Two processes learn what one with all their photos learns, on the CPU (gloo)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shields.models.networks import PortraitAutoencoder
from shields.models.star_networks import StarGenerator
from tests import cards, ddp_run, tiny
from trainers.data import FacePacks
from trainers.parallel import gathered, mean_over_processes

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KINDS = ("ars", "idguard:kpi", "idguard:mgda")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Twelve faces of six people, and beside them cards of small networks."""
    folder = tmp_path_factory.mktemp("networks")
    path = folder / "faces.safetensors"
    save_file(
        {
            "faces": (tiny.faces_image(12, 40) * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(12, 40),
            "identity": torch.arange(12) // 2,
        },
        path,
        metadata={"identities": json.dumps([f"person {i}" for i in range(6)])},
    )
    with tiny.seeded(0):
        cards.save_file_model(
            folder, "small-ae", "autoencoder", "portrait-ae",
            PortraitAutoencoder(fine=8, coarse=8, blocks=1, latent_channels=4),
            "[config]\nfine = 8\ncoarse = 8\nblocks = 1\nlatent_channels = 4\n",
        )  # fmt: skip
        cards.save_file_model(
            folder, "small-gan", "manipulator", "stargan", StarGenerator(1, width=8, blocks=1),
            '[config]\nattributes = ["Smiling"]\n',
        )  # fmt: skip
        cards.save_file_model(
            folder, "small-face", "recognizer", "face-embedder",
            cards.randomised(
                cards.FaceEmbedder(widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), dimensions=16), 1
            ),
            "[config]\nwidths = [8, 8, 8, 8]\nblocks = [1, 1, 1, 1]\ndimensions = 16\n",
        )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHIELDS_CHECKPOINTS", str(folder))
        yield path


@pytest.fixture(scope="module")
def pairs(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes saw of every kind of training."""
    folder = tmp_path_factory.mktemp("pairs")
    script = [sys.executable, ddp_run.__file__, ",".join(KINDS), str(packed), str(folder), "2"]
    done = subprocess.run(
        script, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def seen(folder: Path, kind: str, processes: int, rank: int) -> dict[str, Any]:
    file = folder / f"{kind.replace(':', '-')}-{processes}-{rank}.pt"
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns_from_all_their_photos(
    packed: Path, pairs: Path, tmp_path: Path, kind: str
) -> None:
    ddp_run.main(kind, str(packed), str(tmp_path), 1)
    alone = seen(tmp_path, kind, 1, 0)
    pair = [seen(pairs, kind, 2, rank) for rank in range(2)]
    steps = 2 if kind == "ars" else 1  # the Adv Net's, and the generator's
    assert len(alone["seen"]) == len(pair[0]["seen"]) == 2 * (1 + steps)
    for wanted, first, second in zip(alone["seen"], *(each["seen"] for each in pair), strict=True):
        if "photos" in wanted:
            assert len(first["photos"]) == 4
            assert torch.equal(torch.cat([first["photos"], second["photos"]]), wanted["photos"])
            continue
        assert wanted.keys() == first.keys() == second.keys()
        largest = max(float(value.abs().max()) for value in wanted.values())
        assert largest > 0
        for name, value in wanted.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4 * largest, msg=name)
    for name, value in pair[0]["state"].items():
        assert torch.equal(value, pair[1]["state"][name]), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_process_gets_its_share_of_one_large_batch(packed: Path, ranks: int) -> None:
    def rows(rank: int, count: int) -> torch.Tensor:
        data = FacePacks([packed], batch=12 // count, batches=3, share=0.4)
        data._place = lambda: (5, rank, count)  # type: ignore[method-assign]
        return torch.tensor(list(data.train_dataloader().sampler)).reshape(3, -1)

    shares = [rows(rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(shares, dim=1), rows(0, 1))
    assert not torch.equal(shares[0], shares[1])


def test_one_process_is_left_alone() -> None:
    values = torch.rand(3, 2)
    assert gathered(values) is values
    assert mean_over_processes(values) is values
