"""What a suite consists of, read strictly from YAML.

What cannot be read is an error that names the key; what can be read and turns out not to work (an
attack that nobody knows, a network whose weights are absent) fails in its own cells only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from robustness.metrics import PAIRS
from shields.errors import ConfigError, ShieldsError
from shields.folders import plan
from shields.protectors import PROTECTORS
from shields.registry import did_you_mean

__all__ = ["SUITES", "Forging", "Protection", "Suite", "find_suite"]

#: the suites that come with the project
SUITES = Path(__file__).parent / "suites"

RegionName = Literal["auto", "face", "photo"]


@dataclass(frozen=True, kw_only=True)
class Protection:
    """One way in which the photos are protected, or a folder of files that are already."""

    label: str
    #: a name of `PROTECTORS`; empty for files
    method: str = ""
    #: a folder of files named as the photos, or one file for a single photo
    folder: Path | None = None
    preset: str | None = None
    #: the method's hardened settings, `--robust`
    robust: bool = False
    #: purifiers that the method averages over as well, as a defender who knows the attacker
    aware: tuple[str, ...] = ()
    #: role -> network, where not the method's own
    networks: tuple[tuple[str, str], ...] = ()
    #: further settings of the method, as text
    settings: tuple[tuple[str, str], ...] = ()
    region: RegionName = "auto"
    #: side of the image that the method works on, pixels
    size: int = 256

    @classmethod
    def read(cls, entry: object, base: Path) -> Protection:
        """Read a name, or a mapping; paths are looked for beside `base` first.

        Raises:
            ConfigError: It is neither, lacks what it needs, or has a key that nobody knows.
        """
        if isinstance(entry, str):
            return cls(label=entry, method="" if entry == "none" else entry)
        values = _mapping(entry, "a protector")
        method, folder = values.pop("method", ""), values.pop("folder", None)
        if bool(method) == bool(folder):
            raise ConfigError(f"a protector needs a `method` or a `folder`, one of them: {entry}")
        own = {key: values.pop(key) for key in _PROTECTION & set(values)}
        label = str(own.pop("label", "") or method or Path(str(folder)).name)
        networks = _mapping(own.pop("networks", {}), f"`networks` of {label}")
        own["aware"] = _texts(own.get("aware", ()), "aware")
        _check_protection(label, str(method), own, values)
        return cls(
            label=label,
            method=str(method),
            folder=None if folder is None else _near(str(folder), base),
            networks=_pairs(networks),
            settings=_pairs(values),
            **own,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        values["folder"] = None if self.folder is None else str(self.folder)
        return {**values, "networks": dict(self.networks), "settings": dict(self.settings)}


_PROTECTION = {"label", "preset", "robust", "aware", "networks", "region", "size"}


@dataclass(frozen=True, kw_only=True)
class Forging:
    """A manipulator, an autoencoder or an editor, and what it is asked for."""

    #: a card, a path, `module:factory`
    name: str
    #: attributes or prompts; all that a manipulator lists where empty
    conditions: tuple[str, ...] = ()
    #: prompt -> what the edited photo should show, for metrics that ask
    descriptions: tuple[tuple[str, str], ...] = ()
    #: labels of the protectors that it is run on, beside the unprotected photo; all where empty
    protectors: tuple[str, ...] = ()
    #: "editor" or "manipulator", for those that have no card to say so
    role: str = ""

    @classmethod
    def read(cls, entry: object) -> Forging:
        """Read a name, or a mapping.

        Raises:
            ConfigError: It is neither, or has a key that nobody knows.
        """
        if isinstance(entry, str):
            return cls(name=entry)
        values = _mapping(entry, "a manipulator")
        _known(values, [item.name for item in dataclasses.fields(cls)], "a manipulator")
        if not values.get("name"):
            raise ConfigError(f"a manipulator needs a `name`: {entry}")
        role = str(values.get("role", ""))
        if role not in {"", "manipulator", "autoencoder", "editor"}:
            hint = did_you_mean(role, ["manipulator", "autoencoder", "editor"])
            raise ConfigError(f"`role` of {values['name']} cannot be {role!r}; {hint}")
        conditions = _once(_texts(values.get("conditions", ()), "conditions"))
        texts = _mapping(values.get("descriptions", {}), f"`descriptions` of {values['name']}")
        _known(texts, conditions, f"`descriptions` of {values['name']}: the list of conditions")
        return cls(
            name=str(values["name"]),
            conditions=conditions,
            descriptions=_pairs(texts),
            protectors=_texts(values.get("protectors", ()), "protectors"),
            role=role,
        )

    @property
    def asked(self) -> list[tuple[str, str]]:
        """Name and condition of each of its forgeries; no condition stands for all."""
        return [(self.name, condition) for condition in self.conditions or ("",)]

    def meets(self, protector: str) -> bool:
        """Whether it is run on photos of that protector."""
        return not self.protectors or protector in {"none", *self.protectors}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Photos x protectors x attacks x manipulators x conditions x seeds x metrics."""

    name: str
    photos: tuple[str, ...]
    protectors: tuple[Protection, ...]
    summary: str = ""
    #: only the first so many photos
    limit: int | None = None
    #: centre square of each photo, resized to this before anything else, pixels
    size: int | None = None
    attacks: tuple[str, ...] = ("none",)
    manipulators: tuple[Forging, ...] = ()
    #: of handling, where each photo draws for itself, and of forging; all is repeated for each
    seeds: tuple[int, ...] = (0,)
    metrics: tuple[str, ...] = ("psnr@photo", "ssim@photo")
    #: of the protectors, which work once
    seed: int = 0

    @classmethod
    def read(cls, path: Path, changes: Mapping[str, Any] | None = None) -> Suite:
        """Read a YAML file.

        Args:
            path: The file; its folder is where relative paths are looked for first.
            changes: Entries that replace those of the file.

        Raises:
            ConfigError: It cannot be read, or something in it makes no sense.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"the suite {path} cannot be read: {said}") from error
        values = {"name": path.stem, **_mapping(values, "a suite"), **(changes or {})}
        try:
            return cls.from_dict(values, path.parent)
        except ShieldsError as error:
            raise ConfigError(f"the suite {path}: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: Path = Path()) -> Suite:
        """Read plain values, as YAML gives them.

        Raises:
            ConfigError: An unknown key, a missing one, or a value that makes no sense.
        """
        values = _mapping(values, "a suite")
        _known(values, [item.name for item in dataclasses.fields(cls)], "a suite")
        if not values.get("photos"):
            raise ConfigError("a suite needs `photos`: a folder, files, or both (--photos)")
        entries = _list(values.get("protectors", ()), "protectors")
        protectors = [Protection.read(entry, base) for entry in ["none", *entries]]
        forgings = [Forging.read(e) for e in _list(values.get("manipulators", ()), "manipulators")]
        suite = cls(
            name=str(values.get("name", "suite")),
            summary=str(values.get("summary", "")),
            photos=tuple(str(_near(photo, base)) for photo in _texts(values["photos"], "photos")),
            limit=_count(values, "limit", 1),
            size=_count(values, "size", 64),
            protectors=_once(protectors),
            attacks=_once(["none", *_texts(values.get("attacks", ()), "attacks")]),
            manipulators=_once([forging for forging in forgings if forging.name != "none"]),
            seeds=_seeds(values.get("seeds", (0,))),
            metrics=_metrics(values),
            seed=_seeds(values.get("seed", 0))[0],
        )
        _check_labels(suite)
        return suite

    def files(self, out: Path) -> list[Path]:
        """The photos, sorted, without those inside of `out` and what was made of them.

        Raises:
            ConfigError: A folder or file is missing, or holds no photo; or files that are protected
                already could belong to several photos.
        """
        found = [job.source for job in plan(self.photos, out)]
        # Results of `shields protect` lie beside their photos, and are none.
        made = {path.with_name(f"{path.stem}-protected") for path in found}
        files = [path for path in found if path.with_suffix("") not in made][: self.limit]
        _check_files(files, self.protectors)
        return files

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        values["protectors"] = [protection.to_dict() for protection in self.protectors]
        return values

    @property
    def digest(self) -> str:
        """Hash of what decides the rows of a photo, whichever photos and protectors there are."""
        facts = [self.size, self.attacks, self.manipulators, self.seeds, self.metrics, self.seed]
        return hashlib.sha256(repr(facts).encode()).hexdigest()


def find_suite(name: str) -> Path:
    """The file of a suite: a path, or the name of one that comes with the project.

    Raises:
        ConfigError: There is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = sorted(entry.stem for entry in SUITES.glob("*.yaml"))
    if name in known:
        return SUITES / f"{name}.yaml"
    raise ConfigError(f"there is no suite {name!r}; {did_you_mean(name, known)}")


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{what} must be `key: value` pairs, got {value!r}")
    return dict(value)


def _known(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{what} has no key {key!r}; {did_you_mean(key, known)}")


def _list(value: object, key: str) -> list[Any]:
    if isinstance(value, str | int):
        return [value]
    if not isinstance(value, Sequence):
        raise ConfigError(f"`{key}` must be a list, got {value!r}")
    return list(value)


def _texts(value: object, key: str) -> tuple[str, ...]:
    entries = _list(value, key)
    for entry in entries:
        if not isinstance(entry, str | int | float) or isinstance(entry, bool) or entry == "":
            raise ConfigError(f"`{key}` must be texts, got {entry!r}; put it in quotes")
    return tuple(str(entry) for entry in entries)


def _seeds(value: object) -> tuple[int, ...]:
    seeds = _list(value, "seeds")
    if not seeds or not all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds):
        raise ConfigError(f"seeds must be whole numbers from 0 to 2147483647, got {value!r}")
    return _once(seeds)


def _count(values: Mapping[str, Any], key: str, least: int) -> int | None:
    value = values.get(key)
    if value is not None and (type(value) is not int or value < least):
        raise ConfigError(f"`{key}` must be a whole number of {least} or more, got {value!r}")
    return value


def _metrics(values: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = _texts(values.get("metrics", ("psnr@photo", "ssim@photo")), "metrics")
    for metric in metrics:
        name, _, pair = metric.rpartition("@")
        if not name or pair not in PAIRS:
            hint = did_you_mean(pair, PAIRS)
            raise ConfigError(f"{metric!r} must say what it compares, as in ssim@edits; {hint}")
    return _once(metrics)


def _once(entries: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(entries))


def _check_labels(suite: Suite) -> None:
    labels = [protection.label for protection in suite.protectors]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                f"two protectors are called {label!r}; give each a `label` of its own"
            )
    asked = Counter(pair for forging in suite.manipulators for pair in forging.asked)
    for (name, condition), count in asked.items():
        if count > 1 or (condition and (name, "") in asked):
            raise ConfigError(
                f"{name!r} is asked for {condition or 'all that it lists'!r} twice; list the "
                "conditions of a manipulator in one entry"
            )
    for forging in suite.manipulators:
        for label in forging.protectors:
            if label not in labels:
                hint = did_you_mean(label, labels)
                raise ConfigError(f"{forging.name} is for the protector {label!r}; {hint}")


def _check_files(photos: Sequence[Path], protectors: Sequence[Protection]) -> None:
    """Hold files that are protected already to one photo each."""
    stems = Counter(photo.stem for photo in photos)
    for protection in protectors:
        folder = protection.folder
        if folder is not None and folder.is_file() and len(photos) > 1:
            raise ConfigError(
                f"{protection.label!r} is one file, {folder}, and there are {len(photos)} photos; "
                "name a folder of protected files, or one photo"
            )
        if folder is not None and stems and stems.most_common(1)[0][1] > 1:
            stem, count = stems.most_common(1)[0]
            raise ConfigError(
                f"{count} photos are called {stem!r}, and files of {protection.label!r} are told "
                "apart by their names; run them as suites of their own, or rename them"
            )


def _check_protection(
    label: str, method: str, own: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Hold the keys of a protector to what it has; a method that is unknown fails in its cells."""
    known = [*sorted(_PROTECTION), "method", "folder"]
    if method in PROTECTORS:
        known += [item.name for item in dataclasses.fields(PROTECTORS[method].Config)]
    if not method or method in PROTECTORS:
        _known(settings, known, f"the protector {label!r}")
    for key, kind in (("robust", bool), ("preset", str), ("size", int)):
        if key in own and type(own[key]) is not kind:
            raise ConfigError(f"`{key}` of {label!r} must be a {kind.__name__}, got {own[key]!r}")
    idle = [key for key in ("aware", "robust", "preset") if own.get(key)]
    if not method and idle:
        raise ConfigError(
            f"{label!r} is a folder of files that are protected already: `{idle[0]}` means nothing"
        )
    regions = get_args(RegionName)
    if own.get("region", "auto") not in regions:
        hint = did_you_mean(str(own["region"]), regions)
        raise ConfigError(f"`region` of {label!r} cannot be {own['region']!r}; {hint}")


def _pairs(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, _text(value)) for key, value in sorted(values.items()))


def _text(value: object) -> str:
    """A value of YAML as `--set` would have it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _near(path: str, base: Path) -> Path:
    """A path beside the suite's file, or from the folder that the command is run in."""
    beside = base / path
    return beside if beside.exists() else Path(path)
