"""Talking heads: a function or a program behind the contract of an animator."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shields.errors import ConfigError, ImageError
from shields.models.talking_heads import ditto, hallo, talking_head
from tests.checkouts import write

#: five frames of the photo's size, each a constant grey that the sound file and a draw decide
PROGRAM = """
    import argparse
    import cv2
    import numpy as np

    parser = argparse.ArgumentParser()
    for option in {options}:
        parser.add_argument(option)
    given = vars(parser.parse_args())
    photo = cv2.imread(given[{image!r}])
    sound = open(given[{audio!r}]).read()
    height, width = photo.shape[:2]
    video = cv2.VideoWriter(given[{output!r}], cv2.VideoWriter_fourcc(*"mp4v"), 25, (width, height))
    grey = photo.mean() / 2 + np.random.randint(0, 60) * (sound == "speech")
    for frame in range(5):
        video.write(np.full_like(photo, grey + 10 * frame))
    video.release()
"""


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.wav"
    path.write_text("silence")
    return path


def photo() -> Tensor:
    return torch.full((1, 3, 48, 64), 0.4)


def program(options: list[str], image: str, audio: str, output: str) -> str:
    return PROGRAM.format(options=options, image=image, audio=audio, output=output)


def test_hallo_is_run_as_its_readme_says_and_its_video_is_read(tmp_path: Path, sound: Path) -> None:
    options = ["--source_image", "--driving_audio", "--output"]
    script = program(options, "source_image", "driving_audio", "output")
    animator = hallo(str(write(tmp_path / "hallo", {"scripts/inference.py": script})))
    frames = animator.animate(photo(), sound)
    assert frames.shape == (5, 3, 48, 64)
    assert frames.dtype == torch.float32
    greys = frames.mean(dim=(1, 2, 3)) * 255
    # 0.4 of 255, halved, and ten levels more each frame; the codec may err by a few
    torch.testing.assert_close(greys, 51 + 10 * torch.arange(5.0), atol=4, rtol=0)
    assert animator.name == "hallo"
    with pytest.raises(ConfigError, match="takes no seed"):
        animator.animate(photo(), sound, seed=1)


def test_ditto_is_seeded(tmp_path: Path, sound: Path) -> None:
    options = ["--data_root", "--cfg_pkl", "--audio_path", "--source_path", "--output_path"]
    script = program(options, "source_path", "audio_path", "output_path")
    # a stand-in for the torch of Ditto's own environment, which takes seconds to import
    seeds = "def manual_seed(seed):\n    print(seed)\n"
    files = {"inference.py": script, "torch.py": seeds}
    animator = ditto(str(write(tmp_path / "ditto", files)), "engines", "config.pkl")
    sound.write_text("speech")
    first, again, other = (animator.animate(photo(), sound, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("factory", "file"),
    [
        (lambda folder: hallo(folder), "scripts/inference.py"),
        (lambda folder: ditto(folder, "a", "b"), "inference.py"),
    ],
)
def test_a_folder_without_the_program_is_refused(
    tmp_path: Path, factory: object, file: str
) -> None:
    assert callable(factory)
    with pytest.raises(ConfigError, match=f"holds no {file}; name a checkout: git clone https"):
        factory(str(tmp_path))


def test_a_function_may_return_tensors_or_pixels(sound: Path) -> None:
    def still(image: Tensor, audio: Path, seed: int) -> Tensor:
        assert audio.is_absolute()
        return image.repeat(seed, 1, 1, 1)

    def pixels(image: Tensor, audio: Path, seed: int) -> np.ndarray:
        frames = (image * 255).round().byte().permute(0, 2, 3, 1)
        return frames.repeat(seed, 1, 1, 1).numpy()

    for function in (still, pixels):
        animator = talking_head(function)
        frames = animator.animate(photo(), sound, seed=3)
        torch.testing.assert_close(frames, photo().expand(3, 3, 48, 64))
        assert animator.name == function.__name__


def test_a_module_is_frozen_and_moves_along(sound: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, image: Tensor, audio: Path, seed: int) -> Tensor:
            return image * self.scale

    animator = talking_head(Head())
    assert [value.requires_grad for value in animator.parameters()] == [False]
    assert float(animator.animate(photo(), sound).max()) == pytest.approx(0.2)


@pytest.mark.parametrize("result", [None, torch.full((2, 3, 8, 8), 1.5), np.zeros((2, 8, 8, 3))])
def test_results_that_are_no_frames_are_refused(sound: Path, result: object) -> None:
    animator = talking_head(lambda image, audio, seed: result)  # type: ignore[arg-type,return-value]
    with pytest.raises(ImageError, match=r"frames"):
        animator.animate(photo(), sound)


def test_wrong_calls_are_refused(tmp_path: Path, sound: Path) -> None:
    animator = talking_head(lambda image, audio, seed: image)
    with pytest.raises(ImageError, match="takes one photo, got 2"):
        animator.animate(photo().repeat(2, 1, 1, 1), sound)
    with pytest.raises(ConfigError, match="no sound file"):
        animator.animate(photo(), tmp_path / "absent.wav")


def test_a_command_must_say_where_things_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"audio, output missing in: run \{image\}"):
        talking_head(["run", "{image}"])
    with pytest.raises(ConfigError, match="no folder"):
        talking_head(["{image}{audio}{output}"], folder=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-program-here"], "did not run"),
        ([sys.executable, "-c", "raise SystemExit('no face found')"], "status 1: no face found"),
        ([sys.executable, "-c", "import time; time.sleep(20)"], "timed out"),
        ([sys.executable, "-c", ""], "wrote no video"),
        ([sys.executable, "-c", "import sys; open(sys.argv[3], 'w').write('x')"], "is no video"),
    ],
)
def test_a_command_that_fails_says_how(sound: Path, words: list[str], said: str) -> None:
    seconds = 1.0 if "sleep" in words[-1] else 60.0
    animator = talking_head([*words, "{image}", "{audio}", "{output}"], seconds=seconds)
    with pytest.raises(ConfigError, match=said):
        animator.animate(photo(), sound)
