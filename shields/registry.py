"""Tables of names: an entry is a `module:attribute` that is imported on first use."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar

from shields.errors import ConfigError, MissingPackage, UnknownName

__all__ = ["Registry", "did_you_mean"]

Entry = TypeVar("Entry")

#: import name -> what to install, where the two differ or an extra of ours brings it
_INSTALL = {
    "facenet_pytorch": "facenet-pytorch==2.5.3",
    "pytorch_lightning": "pytorch-lightning",
    "PIL": "pillow",
    "pillow_heif": "'shields[heic]'",
    "flip_evaluator": "'shields[metrics]'",
    "h5py": "'shields[keras]'",
    "pytorch_grad_cam": "'shields[heatmaps]'",
    "spandrel": "'shields[restore]'",
    "torch_fidelity": "'shields[metrics]'",
    "pyarrow": "'shields[suite]'",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known names are near `name`, or list them all.

    Example:
        >>> did_you_mean("facelok", ["facelock", "mist"])
        'did you mean facelock?'
    """
    names = list(known)
    if not names:
        return "there is none"
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Name -> class, in the order in which they are shown; nothing is imported before its turn."""

    def __init__(self, what: str, entries: Mapping[str, str]) -> None:
        self.what = what
        self._entries: dict[str, Any] = dict(entries)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            hint = did_you_mean(name, self._entries)
            raise UnknownName(f"no {self.what} is called {name!r}; {hint}")
        entry = self._entries[name]
        if isinstance(entry, str):
            entry = self._entries[name] = self._import(name, entry)
        return entry

    def _import(self, name: str, address: str) -> Any:  # noqa: ANN401  what stands there
        module, _, attribute = address.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in {"shields", "trainers", "robustness", ""}:
                raise
            install = _INSTALL.get(package, package)
            raise MissingPackage(
                f"{self.what} {name!r} needs the package {package}: pip install {install}"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, name: str, entry: Entry | str) -> None:
        """Register a class, or its `module:attribute`; a name that is taken is an error."""
        if name in self._entries:
            raise ConfigError(f"{self.what} {name!r} is registered already")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Take a name out again."""
        if name not in self._entries:
            raise UnknownName(f"no {self.what} is called {name!r}")
        del self._entries[name]
