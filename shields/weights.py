"""Card -> verified local file -> state dict.

A card is a TOML file that describes one weights file: what it is, where it comes from, under which
licence, what was measured. Weights are never loaded from anything that could run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError

import torch
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shields.card import ROLES, Card
from shields.errors import UnknownName, WeightsError
from shields.registry import did_you_mean

__all__ = ["ROLES", "Card", "WeightStore", "build", "digest", "load_strictly", "read_state_dict",
           "read_table"]  # fmt: skip

Network = TypeVar("Network", bound=nn.Module)

#: what a folder in diffusers' layout consists of, per role; nothing else is ever fetched
_AUTOENCODER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
_FOLDER_FILES = {
    "autoencoder": _AUTOENCODER_FILES + tuple(f"vae/{name}" for name in _AUTOENCODER_FILES),
    "diffusion": (
        "model_index.json", "scheduler/*.json", "tokenizer/*", "text_encoder/config.json",
        "text_encoder/model.safetensors",
        *(f"{part}/{name}" for part in ("unet", "vae") for name in _AUTOENCODER_FILES),
    ),
    "editor": (
        "model_index.json", "scheduler/*.json", "tokenizer/*", "ip-adapter*_sd15*.safetensors",
        *(
            f"{part}/{name}"
            for part in ("unet", "transformer", "vae", "text_encoder", "image_encoder")
            for name in ("config.json", "*.safetensors", "*.safetensors.index.json")
        ),
    ),
    "adapter": ("ip-adapter_sd15.safetensors", "image_encoder/config.json",
                "image_encoder/model.safetensors"),
    "denoiser": (
        "model_index.json", "config.json", "scheduler_config.json", "scheduler/*.json",
        "unet/config.json",
        *(
            f"{part}diffusion_pytorch_model.{suffix}"
            for part in ("", "unet/")
            for suffix in ("safetensors", "bin")
        ),
    ),
    "parser": ("config.json", "preprocessor_config.json", "model.safetensors"),
}  # fmt: skip

#: (path, modification time, size) -> digest of files that were read already
_DIGESTS: dict[tuple[str, int, int], str] = {}


class WeightStore:
    """Finds cards and weights.

    Args:
        folder: Where to look first; may hold further cards.
        download: Whether `find` may fetch what is nowhere on this machine.
    """

    def __init__(self, folder: Path | None = None, *, download: bool = False) -> None:
        self.folder = folder
        self.download = download

    def places(self) -> list[Path]:
        """The folders that are searched, in order, whether they exist or not."""
        package = Path(__file__).parent
        shipped = package / "_checkpoints"
        if not shipped.is_dir():
            shipped = package.parent / "checkpoints"
        variable = os.environ.get("SHIELDS_CHECKPOINTS")
        asked = [self.folder, Path(variable) if variable else None]
        return [place for place in asked if place is not None] + [shipped, self.cache()]

    @staticmethod
    def cache() -> Path:
        """The user's cache, where `pull` puts files."""
        return Path(user_cache_dir("shields"))

    def _cards(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for place in self.places():
            for path in sorted(place.glob("*.toml")):
                found.setdefault(path.stem, path)
        return found

    def names(self) -> list[str]:
        """Names of all cards, sorted."""
        return sorted(self._cards())

    def card(self, name: str) -> Card:
        """Read the card of that name; the first place that has one wins."""
        cards = self._cards()
        if name not in cards:
            raise UnknownName(f"no card is called {name!r}; {did_you_mean(name, cards)}")
        return Card.read(cards[name])

    def find(self, card: Card) -> Path:
        """Return the weights file, its digest checked, or the folder in diffusers' layout.

        Raises:
            WeightsError: It is nowhere, and says which places were tried; or it is damaged.
        """
        tried = []
        for place in self._candidates(card):
            if place.is_file() if card.file else _is_folder_of_weights(place):
                _check_digest(card, place)
                return place
            tried.append(str(place))
        if not card.file:
            snapshot = self._snapshot(card, local=True)
            if snapshot is not None:
                return snapshot
            tried.append("the cache of Hugging Face")
        if self.download:
            return self.pull(card)
        get = f"it cannot be fetched; `shields models show {card.name}` says where it comes from"
        if card.name == card.repository:  # made up for an id that was typed
            get = f"is the name right? `hf download {card.name}` fetches it"
        elif card.address:
            get = f"`shields models pull {card.name}` fetches it"
        raise WeightsError(
            f"the weights of {card.name!r} are not on this machine; tried: {', '.join(tried)}; "
            f"{get}"
        )

    def _candidates(self, card: Card) -> list[Path]:
        places = self.places()
        if not card.file:
            return [place / card.name for place in places]
        # torchvision and facenet-pytorch keep what they fetched there, under the same names.
        hub = [Path(torch.hub.get_dir()) / "checkpoints"] if card.url else []
        return [place / card.file for place in places + hub]

    def state_dict(self, card: Card) -> dict[str, Tensor]:
        """Find the weights file and read it."""
        return read_state_dict(self.find(card))

    def verify(self, card: Card) -> Path:
        """Check that the weights are there and whole: digest, size, every number finite."""
        source = self.find(card)
        files = [source] if source.is_file() else sorted(source.rglob("*.safetensors"))
        if not files:
            raise WeightsError(f"{source} holds no weights")
        if card.bytes and source.is_file() and source.stat().st_size != card.bytes:
            raise WeightsError(
                f"{source} has {source.stat().st_size} bytes, its card says {card.bytes}"
            )
        for path in files:
            read_state_dict(path)
        return source

    def pull(self, card: Card) -> Path:
        """Fetch the weights: a file into `cache()`, a folder into Hugging Face's own cache.

        Raises:
            WeightsError: There is no address, or the transfer failed; nothing half-written stays.
        """
        if not card.address:
            raise WeightsError(f"{card.name!r} has no address to fetch it from: {card.source}")
        try:
            if not card.file:
                snapshot = self._snapshot(card, local=False)
                assert snapshot is not None, "only a local look-up comes back empty"
                return snapshot
            target = self.cache() / card.file
            target.parent.mkdir(parents=True, exist_ok=True)
            # Writes aside and moves into place when the digest is right.
            torch.hub.download_url_to_file(
                card.address, str(target), hash_prefix=card.sha256 or None, progress=False
            )
        except (URLError, OSError, RuntimeError, ValueError) as error:
            by_hand = self.cache() / (card.file or card.name)
            raise WeightsError(
                f"{card.name!r} could not be fetched from {card.address} ({error}); "
                f"by hand: put it at {by_hand}"
            ) from error
        return target

    def _snapshot(self, card: Card, *, local: bool) -> Path | None:
        """The folder of a Hugging Face repository; None where `local` and not fetched yet."""
        from huggingface_hub import snapshot_download

        inside = f"{card.subfolder}/" if card.subfolder else ""
        patterns = [inside + name for name in _FOLDER_FILES.get(card.role, _AUTOENCODER_FILES)]
        try:
            folder = snapshot_download(
                card.repository,
                revision=card.revision or None,
                allow_patterns=patterns,
                local_files_only=local,
            )
        # Of its own, of the HTTP client beneath, of the disk: the types are many and change.
        except Exception as error:
            if local:
                return None
            raise OSError(str(error).partition("\n")[0]) from error
        source = Path(folder) / card.subfolder
        whole = any(source.glob("**/*.safetensors")) or any(source.glob("**/*.bin"))
        return source if whole or not local else None


def digest(path: Path) -> str:
    """SHA-256 of a file; a file that did not change is read once a process."""
    status = path.stat()
    key = (str(path.resolve()), status.st_mtime_ns, status.st_size)
    if key not in _DIGESTS:
        with path.open("rb") as stream:
            _DIGESTS[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _DIGESTS[key]


def _is_folder_of_weights(place: Path) -> bool:
    return any(place.glob("*.json")) or any(place.glob("*.safetensors"))


def _check_digest(card: Card, path: Path) -> None:
    if not (card.sha256 and path.is_file()):
        return
    try:
        found = digest(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not found.startswith(card.sha256):
        raise WeightsError(
            f"{path} is not the file that card {card.name!r} describes: sha256 {found}, expected "
            f"{card.sha256}; delete it, or write a card of another name for it"
        )


def read_state_dict(path: Path, parts: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read a state dict in float32 on the CPU, from safetensors or a pickle of tensors alone.

    A `state_dict` inside is unwrapped; a `module.` before **every** key is dropped.

    Args:
        path: The file.
        parts: Names under which the wanted network may be stored in a checkpoint of several, the
            best first; the rest of the file is not looked at. A bare state dict is read as ever.

    Raises:
        WeightsError: The file is damaged, holds anything but tensors or none of the parts, or a
            value is not finite.
    """
    # torch and safetensors each raise many types on a damaged file; none may get through.
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, Exception) as error:
        reason = str(error).strip().partition("\n")[0]
        if "weights only" in reason.lower().replace(
            "_", " "
        ):  # torch's advice is to open the file unsafely
            reason = "it is no file of tensors, or one that asks to run code"
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors and is not opened ({reason}); save its "
            "state dict as safetensors"
        ) from error
    content, prefix = _unwrapped(content, parts, path)
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict but a {type(content).__name__}")
    if all(str(key).startswith("module.") for key in content):
        content = {str(key).removeprefix("module."): value for key, value in content.items()}
    return {str(key): _checked(value, f"{prefix}{key}", path) for key, value in content.items()}


def _unwrapped(content: Any, parts: Sequence[str], path: Path) -> tuple[Any, str]:  # noqa: ANN401
    """Take one network out of a checkpoint, and say what stands before its keys."""
    if not isinstance(content, Mapping):
        return content, ""
    inner = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    for part in parts:
        if inner.get(part):
            return inner[part], f"{part}."
    if "state_dict" in inner:
        return inner["state_dict"], ""
    if parts and inner:
        raise WeightsError(
            f"{path} holds no {' or '.join(map(repr, parts))} but "
            f"{', '.join(sorted(map(str, content)))}; save the network's own state dict"
        )
    return content, ""


def _checked(value: object, key: str, path: Path) -> Tensor:
    if not isinstance(value, Tensor):
        raise WeightsError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
    if not value.is_floating_point():
        return value
    if not bool(torch.isfinite(value).all()):
        raise WeightsError(f"{path}: {key!r} holds values that are not finite")
    return value.float()


def read_table(path: Path, complaint: str) -> dict[str, Any]:
    """Read a JSON file of settings that lies beside weights.

    Args:
        path: The file.
        complaint: What is said before the reason where it cannot be read.

    Raises:
        WeightsError: It is absent, damaged, or something else than a table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{complaint}: {error}") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{path} is not a table of settings")
    return table


def build(network: type[Network], card: Card) -> Network:
    """Construct a network from its card's `[config]`, leaving global random state alone."""
    try:
        with torch.random.fork_rng(devices=[]):
            return network(**card.config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"card {card.name!r}: {network.__name__} cannot be built from its [config]: {error}"
        ) from error


def load_strictly(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Fill a network; every key must be there, none may be left over, all shapes must agree."""
    own = network.state_dict()
    shapes = [
        f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": shapes,
    }
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})"
        for what, keys in faults.items()
        if keys
    ]
    if said:
        raise WeightsError(
            f"the weights of {name!r} do not fit {type(network).__name__}: {'; '.join(said)}"
        )
    network.load_state_dict(dict(state), strict=True)
