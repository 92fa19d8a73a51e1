"""Talking heads behind the contract of an animator: a program on this machine, or a function.

Such a model draws a video from a photo and a sound file through detectors, encoders and samplers;
no gradient comes back. It serves to see what is left of a forgery once the photo was protected.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from shields.errors import ConfigError, ImageError, MissingPackage
from shields.models.checkouts import one_line
from shields.models.manipulation import Animator
from shields.types import Image, check_image

__all__ = ["Frames", "ditto", "hallo", "talking_head"]

#: seeds a Python program that does not do so itself, and runs it as if it had been called
_SEEDED = (
    "import random, runpy, sys, numpy, torch; "
    "seed = int(sys.argv[1]); random.seed(seed); numpy.random.seed(seed); torch.manual_seed(seed); "
    "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)

#: (photo (1, 3, H, W), sound file, seed) -> frames (T, 3, h, w), [0, 1]; or (T, h, w, 3), uint8
Frames = Callable[[Image, Path, int], Tensor | np.ndarray]


class _TalkingHead(Animator):
    """A function behind the contract."""

    def __init__(self, run: Frames) -> None:
        super().__init__()
        self.run = run  # a module registers itself, so that it moves to the device
        self.freeze()

    @torch.no_grad()
    def animate(self, image: Image, audio: Path, *, seed: int = 0) -> Tensor:
        """Animate (1, 3, H, W), [0, 1]: (T, 3, h, w), [0, 1]."""
        check_image(image)
        if len(image) != 1:
            raise ImageError(f"a talking head takes one photo, got {len(image)}; call it for each")
        sound = Path(audio).expanduser().resolve()
        if not sound.is_file():
            raise ConfigError(f"there is no sound file {sound}")
        return _checked(self.run(image, sound, seed))


def _checked(frames: object) -> Tensor:
    if isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.ndim == 4:
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    if not isinstance(frames, Tensor):
        raise ImageError(
            "a talking head must return frames, (T, 3, h, w) in [0, 1] or (T, h, w, 3) uint8; "
            f"got {type(frames).__name__}"
        )
    check_image(frames, "frames")
    return frames


class _Program:
    """A command line that reads a photo and a sound file, and writes a video."""

    def __init__(self, words: Sequence[str], folder: str, seconds: float) -> None:
        self.words, self.seconds = [*words], seconds
        self.folder = Path(folder).expanduser().resolve()
        absent = [name for name in ("image", "audio", "output") if f"{{{name}}}" not in self.text]
        if absent:
            raise ConfigError(
                f"the command of a talking head must hold {{image}}, {{audio}} and {{output}}; "
                f"{', '.join(absent)} missing in: {self.text}"
            )
        if not self.folder.is_dir():
            raise ConfigError(f"there is no folder {self.folder} to run the talking head in")

    @property
    def text(self) -> str:
        """The command as it was given."""
        return " ".join(self.words)

    def __call__(self, image: Image, audio: Path, seed: int) -> np.ndarray:
        """Run the program on one photo: (T, h, w, 3), uint8."""
        if seed and "{seed}" not in self.text:
            raise ConfigError(f"this talking head takes no seed: no {{seed}} in: {self.text}")
        with TemporaryDirectory() as place:
            photo, video = Path(place) / "photo.png", Path(place) / "video.mp4"
            pixels = (image[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
            Pillow.fromarray(pixels).save(photo)
            self._run({"image": photo, "audio": audio, "output": video, "seed": seed})
            return _read_video(video)

    def _run(self, given: dict[str, object]) -> None:
        words = self.words
        for name, value in given.items():
            words = [word.replace(f"{{{name}}}", str(value)) for word in words]
        try:
            done = subprocess.run(  # noqa: S603  the command is its user's
                words, cwd=self.folder, capture_output=True, timeout=self.seconds, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConfigError(f"the talking head did not run: {one_line(error)}") from error
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise ConfigError(f"the talking head ended with status {done.returncode}: {last}")


def _read_video(path: Path) -> np.ndarray:
    """Frames of a video: (T, h, w, 3), RGB, uint8."""
    if not path.is_file():
        raise ConfigError("the talking head ended well, but wrote no video to {output}")
    try:
        cv2 = import_module("cv2")
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "to read a talking head's video: pip install opencv-python-headless"
        ) from error
    video, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = video.read()
        if not there:
            break
        frames.append(frame[..., ::-1])
    video.release()
    if not frames:
        raise ConfigError("what the talking head wrote to {output} is no video that opencv reads")
    return np.stack(frames)


def talking_head(
    run: Frames | Sequence[str], *, folder: str = ".", seconds: float = 3600.0
) -> Animator:
    """Make an animator of a function, or of a program that is installed on this machine.

    Args:
        run: A function (photo (1, 3, H, W) in [0, 1], sound file, seed) -> frames; or the words of
            a command with `{image}` (a PNG), `{audio}`, `{output}` (an MP4 that it writes) and, if
            it takes one, `{seed}`. It is run without a shell.
        folder: Where a command is run.
        seconds: After which a command is given up.

    Raises:
        ConfigError: A placeholder or the folder is missing.
    """
    if callable(run):
        animator = _TalkingHead(run)
        animator.name = getattr(run, "__name__", type(run).__name__)
        return animator
    animator = _TalkingHead(_Program(run, folder, seconds))
    animator.name = "talking-head"
    return animator


def hallo(repository: str, *, python: str = sys.executable) -> Animator:
    """Hallo, run as its README does; its program seeds itself, always alike.

    Args:
        repository: Folder of the checkout, with `pretrained_models` in it.
        python: Interpreter of the environment in which Hallo is installed.

    Source:
        Hallo (Xu et al., 2024), https://github.com/fudan-generative-vision/hallo.
    """
    _check(repository, "scripts/inference.py", "https://github.com/fudan-generative-vision/hallo")
    words = [python, "scripts/inference.py", "--source_image", "{image}", "--driving_audio",
             "{audio}", "--output", "{output}"]  # fmt: skip
    animator = talking_head(words, folder=repository)
    animator.name = "hallo"
    return animator


def ditto(
    repository: str, data_root: str, cfg_pkl: str, *, python: str = sys.executable
) -> Animator:
    """Ditto, run as its README does, but seeded: its own program draws anew each time.

    Its stages run in threads; whether equal seeds give equal videos on a GPU was not tried.

    Args:
        repository: Folder of the checkout.
        data_root: Folder of the TensorRT engines, inside the checkout or absolute.
        cfg_pkl: The offline configuration, likewise; Ditto unpickles it.
        python: Interpreter of the environment in which Ditto is installed.

    Source:
        Ditto (Li et al., 2024), https://github.com/antgroup/ditto-talkinghead.
    """
    _check(repository, "inference.py", "https://github.com/antgroup/ditto-talkinghead")
    words = [python, "-c", _SEEDED, "{seed}", "inference.py", "--data_root", data_root,
             "--cfg_pkl", cfg_pkl, "--audio_path", "{audio}", "--source_path", "{image}",
             "--output_path", "{output}"]  # fmt: skip
    animator = talking_head(words, folder=repository)
    animator.name = "ditto"
    return animator


def _check(repository: str, file: str, home: str) -> None:
    folder = Path(repository).expanduser().resolve()
    if not (folder / file).is_file():
        raise ConfigError(f"{folder} holds no {file}; name a checkout: git clone {home}")
