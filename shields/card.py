"""Cards: what is known about a file or a folder of weights."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shields.errors import WeightsError
from shields.registry import did_you_mean

__all__ = ["ROLES", "Card"]

ROLES = ("autoencoder", "recognizer", "perceptual", "diffusion", "detector", "generator",
         "manipulator", "editor", "parser", "adapter", "classifier", "denoiser",
         "purifier")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known about one weights file or folder."""

    name: str
    #: what it is used as, one of `ROLES`
    role: str
    #: entry of the registry of its role
    architecture: str
    summary: str = ""
    #: keywords of the network's constructor
    config: Mapping[str, Any] = field(default_factory=dict)
    #: name of the weights file in any of the places; empty for a folder in diffusers' layout
    file: str = ""
    #: of the file; eight digits or more where its publisher gives no more
    sha256: str = ""
    bytes: int = 0
    #: Hugging Face id, with the revision and the folder inside
    repository: str = ""
    revision: str = ""
    subfolder: str = ""
    #: address of the file, where it is not in a repository
    url: str = ""
    licence: str = ""
    #: who made it, with a link
    source: str = ""
    #: what it was trained on, and what that data's terms ask
    data: str = ""
    remarks: str = ""
    #: how it was trained: commit, command, seed, hardware, …
    training: Mapping[str, Any] = field(default_factory=dict)
    #: what was measured; a recognizer's `threshold` is its cosine threshold
    results: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise WeightsError(f"card {self.name!r}: {problem}")

    def _problems(self) -> list[str]:
        problems = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            wanted: type = {"str": str, "int": int}.get(str(item.type), Mapping)
            if not isinstance(value, wanted) or isinstance(value, bool):
                problems.append(f"`{item.name}` must be a {wanted.__name__}, got {value!r}")
        if problems:
            return problems
        if not (self.name and self.architecture):
            problems.append("`name` and `architecture` must not be empty")
        if self.role not in ROLES:
            problems.append(f"no role is called {self.role!r}; {did_you_mean(self.role, ROLES)}")
        if self.file != Path(self.file).name:
            problems.append(f"`file` must be a bare name, got {self.file!r}")
        if self.sha256 and not re.fullmatch("[0-9a-f]{8,64}", self.sha256):
            problems.append(f"`sha256` must be 8 to 64 lower-case hex digits, got {self.sha256!r}")
        if self.url and self.repository:
            problems.append("`url` and `repository` exclude each other")
        if self.url and not self.url.startswith("https://"):
            problems.append(f"`url` must begin with https://, got {self.url!r}")
        if not (self.file or self.repository or ":" in self.architecture):
            problems.append("a `file`, or the `repository` of a folder, must be given")
        if (self.sha256 or self.bytes or self.url) and not self.file:
            problems.append("`sha256`, `bytes` and `url` belong to a `file`, and none is given")
        if (self.revision or self.subfolder) and not self.repository:
            problems.append("`revision` and `subfolder` belong to a `repository`")
        return problems

    @classmethod
    def read(cls, path: Path) -> Card:
        """Read a TOML card.

        Raises:
            WeightsError: It cannot be read, has an unknown key, or contradicts itself.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise WeightsError(f"card {path} cannot be read: {error}") from error
        known = [item.name for item in dataclasses.fields(cls)]
        for key in table:
            if key not in known:
                raise WeightsError(f"card {path}: unknown key {key!r}; {did_you_mean(key, known)}")
        absent = [key for key in ("name", "role", "architecture") if key not in table]
        if absent:
            raise WeightsError(f"card {path} lacks {', '.join(absent)}")
        if table["name"] != path.stem:
            raise WeightsError(f"card {path} calls itself {table['name']!r}; it must be its name")
        return cls(**table)

    @property
    def address(self) -> str:
        """Where the weights can be had, for people; empty where they cannot."""
        if self.url:
            return self.url
        parts = (self.repository, "resolve", self.revision or "main", self.subfolder, self.file)
        inside = "/".join(part for part in parts if part) if self.file else self.repository
        return f"https://huggingface.co/{inside}" if self.repository else ""
