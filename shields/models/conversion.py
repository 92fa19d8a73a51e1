"""Official weights files -> checked safetensors where the store finds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from shields.errors import ConfigError, OutputError, WeightsError
from shields.files import aside
from shields.models import architecture

if TYPE_CHECKING:
    from torch import Tensor

    from shields.weights import Card

__all__ = ["convert"]


def convert(card: Card, source: Path, target: Path) -> Path:
    """Read an official file as the card's architecture lays it out, and save it as safetensors.

    The file is loaded strictly, so one that fits here is one that works; nothing in it is run.

    Args:
        card: Says which network it is, and how many attributes it has.
        source: What its authors published.
        target: The safetensors file to write; it appears whole or not at all.

    Raises:
        ConfigError: The target is no safetensors file, or exists.
        WeightsError: The source is damaged or holds another network.
        MissingPackage: It is a Keras file and h5py is not installed.
        OutputError: The target cannot be written.
    """
    if target.suffix != ".safetensors":
        raise ConfigError(f"the converted file must end in .safetensors, got {target.name}")
    if target.exists():
        raise ConfigError(f"{target} exists; delete it or name another file")
    if not source.is_file():
        raise WeightsError(f"there is no file {source}")
    state = _state(card, source)
    try:
        with aside(target) as part:
            save_file({key: value.contiguous() for key, value in state.items()}, part)
            part.chmod(0o644)  # safetensors makes it its owner's alone
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}") from error
    return target


def _state(card: Card, source: Path) -> dict[str, Tensor]:
    if source.suffix in {".h5", ".hdf5"}:
        if card.architecture != "relgan":
            raise WeightsError(f"{source} is a Keras file; only RelGAN's can be converted")
        from shields.models.keras import convert_relgan

        state, attributes, sign = convert_relgan(source)
        said = (card.config.get("sign", sign), len(card.config.get("attributes", attributes)))
        if said != (sign, len(attributes)):
            raise WeightsError(
                f"{source} has {len(attributes)} attributes and sign {sign}, the card "
                f"{card.name!r} says {said[1]} and {said[0]}; write a card of its own for it"
            )
        return state
    if card.architecture == "relgan" and card.config.get("sign") == 1:
        raise WeightsError(
            f"{source}: the card {card.name!r} describes Keras weights, where +1 adds an "
            "attribute; the authors' PyTorch weights need a card of their own with sign = -1"
        )
    loaded: Any = architecture(card).load(source, card)
    own: dict[str, Tensor] = loaded.network.state_dict()
    return own
