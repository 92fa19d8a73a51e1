"""Frozen networks that others published, behind small contracts: the tables, and `load`."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from shields.errors import ConfigError, ShieldsError, UnknownName, WeightsError
from shields.registry import Registry, did_you_mean
from shields.weights import Card, WeightStore

if TYPE_CHECKING:
    import torch

    from shields.models.base import Autoencoder, Detector, Frozen, Perceptual, Recognizer
    from shields.models.diffusion import LatentDiffusion
    from shields.models.generators import Generator
    from shields.models.manipulation import Editor, Manipulator
    from shields.models.parsing import Parser
    from shields.models.unconditional import UnconditionalDiffusion

__all__ = ["ADAPTERS", "AUTOENCODERS", "CLASSIFIERS", "DENOISERS", "DETECTORS", "DIFFUSIONS",
           "EDITORS", "GENERATORS", "MANIPULATORS", "PARSERS", "PERCEPTUAL", "RECOGNIZERS",
           "architecture", "imported", "load", "plugins"]  # fmt: skip

#: architectures, in the order in which they are listed; an entry has `load(source, card)`
AUTOENCODERS: Registry[Any] = Registry(
    "autoencoder architecture",
    {
        "portrait-ae": "shields.models.autoencoders:PortraitAutoencoderModel",
        "taef2": "shields.models.autoencoders:Taef2Model",
        "diffusers": "shields.models.diffusion:DiffusersAutoencoder",
    },
)
RECOGNIZERS: Registry[Any] = Registry(
    "recognizer architecture",
    {
        "face-embedder": "shields.models.recognizers:FaceEmbedderModel",
        "mobilefacenet": "shields.models.recognizers:MobileFaceNetModel",
        "inception-resnet-v1": "shields.models.recognizers:FaceNetModel",
        "arcface-ir": "shields.models.arcface:IrModel",
        "arcface-iresnet": "shields.models.arcface:IResNetModel",
        "arcface-ir-se101": "shields.models.arcface:SharedSlopeModel",
    },
)
PERCEPTUAL: Registry[Any] = Registry(
    "perceptual architecture",
    {
        "lpips-vgg": "shields.models.perceptual:LpipsModel",
        "lpips-alex": "shields.models.perceptual:LpipsModel",
        "lpips-squeeze": "shields.models.perceptual:LpipsModel",
    },
)
DIFFUSIONS: Registry[Any] = Registry(
    "diffusion architecture", {"latent-diffusion": "shields.models.diffusion:LatentDiffusion"}
)
MANIPULATORS: Registry[Any] = Registry(
    "manipulator architecture",
    {
        "stargan": "shields.models.manipulators:StarGANModel",
        "aggan": "shields.models.manipulators:AGGANModel",
        "fpgan": "shields.models.manipulators:FPGANModel",
        "relgan": "shields.models.relgan:RelGANModel",
        "hisd": "shields.models.hisd:HiSDModel",
    },
)
ADAPTERS: Registry[Any] = Registry(
    "image-prompt adapter", {"ip-adapter": "shields.models.ip_adapter:IpAdapterModel"}
)
EDITORS: Registry[Any] = Registry(
    "editor architecture",
    {
        "instruct-pix2pix": "shields.models.editors:InstructPix2PixEditor",
        "img2img": "shields.models.editors:ImageToImageEditor",
        "inpainting": "shields.models.editors:InpaintingEditor",
        "ip-adapter": "shields.models.reference_editors:IPAdapterEditor",
        "flux2": "shields.models.reference_editors:Flux2Editor",
        "diffusers": "shields.models.editors:PipelineEditor",
    },
)
CLASSIFIERS: Registry[Any] = Registry(
    "classifier architecture",
    {"attribute-classifier": "shields.models.classifiers:AttributeClassifierModel"},
)
GENERATORS: Registry[Any] = Registry(
    "generator architecture",
    {
        "ars": "shields.models.generators:ArsModel",
        "idguard": "shields.models.idguard:IdGuardModel",
        "tafim": "shields.models.learned_baselines:TafimModel",
        "universal": "shields.models.learned_baselines:UniversalModel",
    },
)
DENOISERS: Registry[Any] = Registry(
    "denoiser architecture",
    {"unconditional": "shields.models.unconditional:UnconditionalDiffusion"},
)
RESTORERS: Registry[Any] = Registry(
    "restorer architecture",
    {
        "compact": "shields.models.restoration:CompactRestorer",
        "unet": "shields.models.restoration:UNetRestorer",
        "spandrel": "shields.models.super_resolution:SpandrelRestorer",
    },
)
PARSERS: Registry[Any] = Registry(
    "face parser architecture",
    {
        "bisenet": "shields.models.parsing:BiSeNetParser",
        "segformer": "shields.models.parsing:SegformerParser",
    },
)
#: detectors have no card, their weights come with a package; an entry has `load(device=…)`
DETECTORS: Registry[Any] = Registry("detector", {"mtcnn": "shields.models.detectors:MtcnnDetector"})

_TABLES: Mapping[str, Registry[Any]] = {
    "autoencoder": AUTOENCODERS,
    "recognizer": RECOGNIZERS,
    "perceptual": PERCEPTUAL,
    "diffusion": DIFFUSIONS,
    "manipulator": MANIPULATORS,
    "editor": EDITORS,
    "adapter": ADAPTERS,
    "parser": PARSERS,
    "classifier": CLASSIFIERS,
    "generator": GENERATORS,
    "denoiser": DENOISERS,
    "purifier": RESTORERS,
}
#: role -> architecture of a folder, or of a Hugging Face id, in diffusers' layout
_FOLDERS = {
    "autoencoder": "diffusers",
    "diffusion": "latent-diffusion",
    "adapter": "ip-adapter",
    "editor": "diffusers",
    "parser": "segformer",
    "denoiser": "unconditional",
}
_FEATURES = "features:"


@overload
def load(
    role: Literal["autoencoder"], name: str, *, store: WeightStore, device: torch.device
) -> Autoencoder: ...
@overload
def load(
    role: Literal["recognizer"], name: str, *, store: WeightStore, device: torch.device
) -> Recognizer: ...
@overload
def load(
    role: Literal["perceptual"], name: str, *, store: WeightStore, device: torch.device
) -> Perceptual: ...
@overload
def load(
    role: Literal["diffusion"], name: str, *, store: WeightStore, device: torch.device
) -> LatentDiffusion: ...
@overload
def load(
    role: Literal["manipulator"], name: str, *, store: WeightStore, device: torch.device
) -> Manipulator: ...
@overload
def load(
    role: Literal["editor"], name: str, *, store: WeightStore, device: torch.device
) -> Editor: ...
@overload
def load(
    role: Literal["parser"], name: str, *, store: WeightStore, device: torch.device
) -> Parser: ...
@overload
def load(
    role: Literal["denoiser"], name: str, *, store: WeightStore, device: torch.device
) -> UnconditionalDiffusion: ...
@overload
def load(
    role: Literal["generator"], name: str, *, store: WeightStore, device: torch.device
) -> Generator: ...
@overload
def load(  # type: ignore[overload-overlap]  # a detector is no network of ours: nothing to freeze
    role: Literal["detector"], name: str, *, store: WeightStore, device: torch.device
) -> Detector: ...
@overload
def load(role: str, name: str, *, store: WeightStore, device: torch.device) -> Frozen: ...
def load(role: str, name: str, *, store: WeightStore, device: torch.device) -> Frozen | Detector:
    """Load a network, frozen and in evaluation mode.

    Args:
        role: "autoencoder", "recognizer", "perceptual", "diffusion", "manipulator", "editor",
            "parser" or "detector".
        name: The name of a card; a weights file or folder; a Hugging Face id; for "perceptual",
            "features:" and the name of an autoencoder or a recognizer; or code of your own: an
            entry point of the group "shields.ROLEs", or `module:factory`, whose factory is called
            without arguments. A card whose `architecture` is `module:factory` calls it with its
            `[config]`. Only name code that you trust.
        store: Where weights are looked for, and whether they may be fetched.
        device: Where the network is put.

    Returns:
        The network behind its contract; `name` says what it is, for reports.

    Raises:
        UnknownName: Neither card nor path nor id; or there is no such role.
        ConfigError: The card describes a network of another role.
        WeightsError: The weights are absent, damaged or do not fit.
    """
    if role == "detector":
        return cast("Detector", DETECTORS[name].load(device=device))
    if role not in _TABLES:
        raise UnknownName(
            f"no role is called {role!r}; {did_you_mean(role, [*_TABLES, 'detector'])}"
        )
    if role == "perceptual" and name.startswith(_FEATURES):
        return _deep_features(name.removeprefix(_FEATURES), store, device)
    if name not in store.names() and (name in plugins(role) or _is_import(name)):
        return _plugged(role, plugins(role).get(name, name), {}, name).to(device)
    card, source = _resolve(role, name, store)
    if _is_import(card.architecture):
        return _plugged(role, card.architecture, card.config, card.name).to(device)
    network: Frozen = _TABLES[role][card.architecture].load(source or store.find(card), card)
    network.name = card.name
    return network.to(device)


def architecture(card: Card) -> Any:  # noqa: ANN401  a class with `load(source, card)`
    """Return the class that loads a card's weights.

    Raises:
        ConfigError: Networks of the card's role are not loaded here.
        UnknownName: The role has no such architecture.
    """
    if card.role not in _TABLES:
        raise ConfigError(f"{card.name!r} has role {card.role!r}, which is not loaded from here")
    return _TABLES[card.role][card.architecture]


def plugins(role: str) -> dict[str, str]:
    """Networks of a role that installed packages offer: name -> `module:factory`."""
    return {point.name: point.value for point in entry_points(group=f"shields.{role}s")}


def _is_import(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def _plugged(role: str, address: str, settings: Mapping[str, Any], name: str) -> Frozen:
    """Call a factory that is not ours, and hold what it returns to the contract."""
    try:
        network = imported(address)(**settings)
    except ShieldsError:
        raise
    except Exception as error:  # of code that we know nothing about
        said = " ".join(str(error).split())
        raise ConfigError(
            f"the {role} {address!r} cannot be made: {type(error).__name__}: {said}"
        ) from error
    wanted = _contract(role)
    if not isinstance(network, wanted):
        how = "subclass " + " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in wanted)
        if role == "manipulator":
            how = "pass the network through shields.models.manipulation.wrap"
        raise ConfigError(
            f"{address} returned a {type(network).__name__}; a factory must return a {role}: {how}"
        )
    network.name = name
    return network


def imported(address: str) -> Any:  # noqa: ANN401  what stands there
    """What a user's `module:name` names; the folder that the command is run in counts."""
    module, _, attribute = address.partition(":")
    if str(Path.cwd()) not in sys.path:  # as for `python -m`
        sys.path.append(str(Path.cwd()))
    return getattr(import_module(module), attribute)


def _contract(role: str) -> tuple[type[Any], ...]:
    from shields.models import base, manipulation

    return {
        "manipulator": (manipulation.Manipulator, manipulation.Animator),
        "editor": (manipulation.Editor,),
        "autoencoder": (base.Autoencoder,),
        "recognizer": (base.Recognizer,),
        "perceptual": (base.Perceptual,),
    }.get(role, (base.Frozen,))


def _deep_features(name: str, store: WeightStore, device: torch.device) -> Frozen:
    from shields.models.perceptual import DeepFeatures

    known = name in store.names()
    role = store.card(name).role if known else "autoencoder"
    if role not in {"autoencoder", "recognizer"}:
        raise ConfigError(f"{_FEATURES}{name}: needs an autoencoder or a recognizer, not a {role}")
    return DeepFeatures(load(role, name, store=store, device=device))


def _resolve(role: str, name: str, store: WeightStore) -> tuple[Card, Path | None]:
    """Return the card, read or made up, and the source where a path names it."""
    if name in store.names():
        card = store.card(name)
        if card.role != role:
            hint = did_you_mean(name, _names(role, store))
            raise ConfigError(f"{name!r} has role {card.role!r}, needed is {role!r}; {hint}")
        return card, None
    path = Path(name).expanduser().absolute()
    if name and path.exists():
        return _from_path(role, path, store)
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    if looks_like_id and role in _FOLDERS and path.suffix not in {".safetensors", ".pth", ".pt"}:
        return Card(name=name, role=role, architecture=_FOLDERS[role], repository=name), None
    if "/" in name or path.suffix in {".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".toml"}:
        raise WeightsError(
            f"there is no file or folder {name}; give a card's name instead "
            f"({', '.join(_names(role, store)) or 'none is known'}), or put the weights there"
        )
    raise UnknownName(f"no {role} is called {name!r}; {did_you_mean(name, _names(role, store))}")


def _names(role: str, store: WeightStore) -> list[str]:
    names = []
    for name in store.names():
        # A hint must not fail because of a damaged card that nobody asked for.
        with contextlib.suppress(WeightsError):
            if store.card(name).role == role:
                names.append(name)
    return names


def _from_path(role: str, path: Path, store: WeightStore) -> tuple[Card, Path]:
    beside = path.with_suffix(".toml")
    if path.suffix == ".toml" or (path.is_file() and beside.is_file()):
        card = Card.read(beside)
        if card.role != role:
            raise ConfigError(f"{beside} describes role {card.role!r}, needed is {role!r}")
        near = WeightStore(path.parent, download=store.download)
        return card, near.find(card)
    for name in _names(role, store):
        card = store.card(name)
        if path.is_file() and card.file == path.name:
            return card, WeightStore(path.parent).find(card)
    architecture = _FOLDERS.get(role, "") if path.is_dir() else ""
    if role == "autoencoder" and not (path / "config.json").exists() and _is_pair(path):
        architecture = "taef2"
    if not architecture:
        raise WeightsError(
            f"{path}: which network is it? Write a card {beside.name} beside it with `name`, "
            f"`role`, `architecture` (one of {', '.join(_TABLES[role])}) and `file`"
        )
    made_up = Card(name=path.name, role=role, architecture=architecture, file=path.name)
    return replace(made_up, summary=f"loaded from {path}"), path


def _is_pair(path: Path) -> bool:
    """Whether a path leads to the two published state dicts of taef2."""
    names = [found.name for found in path.iterdir()] if path.is_dir() else [path.name]
    return any("taef2" in name and ("encoder" in name or "decoder" in name) for name in names)
