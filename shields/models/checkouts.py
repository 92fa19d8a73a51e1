"""Other people's repositories, as folders on this machine: their modules and their training files.

Importing a checkout runs its code, which its user chose; its files are opened as tensors and plain
options only.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from shields.errors import ConfigError, MissingPackage, WeightsError
from shields.weights import load_strictly

__all__ = ["Checkpoint", "built", "existing", "import_from", "one_line"]


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Let imports find a checkout first, and leave `sys.path` and `sys.modules` as they were.

    All these repositories call their packages `models`, `utils`, `configs`, …
    """
    sources = (path for depth in ("*.py", "*/*.py", "*/*/*.py") for path in folder.glob(depth))
    own = {path.relative_to(folder).with_suffix("").parts[0] for path in sources}

    def namesakes() -> dict[str, ModuleType]:
        return {name: sys.modules[name] for name in [*sys.modules] if name.split(".")[0] in own}

    kept, places = namesakes(), list(sys.path)
    for name in kept:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = places
        for name in namesakes():
            del sys.modules[name]
        sys.modules.update(kept)


def one_line(error: Exception) -> str:
    """First line of what an error says, or its type; not torch's advice to open files unsafely."""
    said = str(error).strip().partition("\n")[0]
    advice = "weights only" in said.lower().replace("_", " ")
    return type(error).__name__ if advice or not said else said


def import_from(repository: str, home: str, *names: str) -> list[ModuleType]:
    """Import modules of a checkout.

    Args:
        repository: Its folder.
        home: Where it can be cloned, for the message.
        names: Modules, as the checkout's own code calls them: `models.psp`.

    Raises:
        ConfigError: The folder is no such checkout, or its code fails on import.
        MissingPackage: Its code needs a package that is not installed.
    """
    folder = Path(repository).expanduser().resolve()
    for name in names:
        file = f"{name.replace('.', '/')}.py"
        if not (folder / file).is_file():
            raise ConfigError(f"{folder} holds no {file}; name a checkout: git clone {home}")
    try:
        with _first_on_path(folder):
            return [import_module(name) for name in names]
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"the code in {folder} needs the package {error.name}, which is not installed"
        ) from error
    except Exception as error:  # other people's code, and compilers that it starts
        raise ConfigError(
            f"the code in {folder} cannot be imported ({one_line(error)}); operators that it "
            "compiles at import need a CUDA device, a compiler and ninja"
        ) from error


def built(module: ModuleType, name: str, *arguments: object) -> nn.Module:
    """Construct a network of a checkout, leaving global random state alone.

    Raises:
        ConfigError: The module has no such network, or it cannot be built so.
    """
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(
            f"{module.__file__} has no network {name!r}; was the weights file made by it?"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            return kind(*arguments)
    except Exception as error:
        raise ConfigError(
            f"{name} of {module.__file__} cannot be built ({one_line(error)}); are the checkout "
            "and the weights file of one age?"
        ) from error


def existing(file: str, home: str) -> Path:
    """The path of a file that must be there.

    Raises:
        WeightsError: It is not, and says where to look for it.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise WeightsError(f"there is no file {path}; the README of {home} says where to get it")
    return path


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What pSp, e4e and StyleCLIP save: a state dict of several parts, and options."""

    path: Path
    state: Mapping[str, Tensor]
    options: Mapping[str, Any]
    #: mean latent code, from which encoders count
    average: Tensor | None

    @classmethod
    def read(cls, file: str, home: str) -> Checkpoint:
        """Open a file as tensors and options; nothing in it is run.

        Raises:
            WeightsError: It is absent, damaged, of another layout, or holds other things.
        """
        path = existing(file, home)
        content = _content(path)
        state, options = content.get("state_dict") or {}, content.get("opts")
        average = content.get("latent_avg")
        options = vars(options) if isinstance(options, Namespace) else options
        tensors = [*state.values()] if isinstance(state, Mapping) else [None]
        tensors += [] if average is None else [average]
        proper = tensors and all(isinstance(value, Tensor) for value in tensors)
        if not proper or not isinstance(options, Mapping):
            raise WeightsError(f"{path} must hold `state_dict` and `opts`, as {home} saves them")
        return cls(path=path, state=state, options=options, average=average)

    def fill(self, network: nn.Module, part: str) -> nn.Module:
        """Load one part of the state dict, strictly."""
        start = f"{part}."
        found = {k.removeprefix(start): v for k, v in self.state.items() if k.startswith(start)}
        load_strictly(network, found, f"{self.path.name}, part {part}")
        return network


def _content(path: Path) -> Mapping[str, Any]:
    safe = get_safe_globals()
    add_safe_globals([Namespace])  # holds options, and runs nothing
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on a damaged file
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors and options, and is not opened "
            f"({one_line(error)})"
        ) from error
    finally:
        clear_safe_globals()
        add_safe_globals(safe)
    return content if isinstance(content, Mapping) else {}
