"""`shields list` and `shields models`: what there is, and whether its weights are at hand."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from shields import cli_check
from shields.cli_common import AsJson, WeightsDir, errors, out, plain, store_at, write_json
from shields.errors import ShieldsError, UnknownName, WeightsError

if TYPE_CHECKING:
    from shields.protectors.base import ProtectorConfig
    from shields.weights import Card, WeightStore

__all__ = ["app", "list_entries"]

#: kind -> where its registry stands; nothing is imported before somebody asks
KINDS = {
    "protectors": ("shields.protectors", "PROTECTORS"),
    "detectors": ("shields.models", "DETECTORS"),
    "transforms": ("shields.transforms", "TRANSFORMS"),
}
#: kind -> role of the cards that it lists
NETWORKS = {
    "manipulators": "manipulator",
    "editors": "editor",
    "recognizers": "recognizer",
    "autoencoders": "autoencoder",
    "perceptual": "perceptual",
    "diffusions": "diffusion",
    "adapters": "adapter",
    "parsers": "parser",
    "generators": "generator",
    "denoisers": "denoiser",
    "classifiers": "classifier",
}


def _registry(kind: str) -> Mapping[str, Any]:
    from importlib import import_module

    module, name = KINDS[kind]
    registry: Mapping[str, Any] = getattr(import_module(module), name)
    return registry


def _first_line(entry: object) -> str:
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def _described(kind: str) -> Iterator[tuple[str, str]]:
    registry = _registry(kind)
    for name in registry:
        try:
            yield name, _first_line(registry[name])
        except ShieldsError as error:  # a method whose package is absent is still worth listing
            yield name, str(error)


def list_entries(
    what: Annotated[
        str,
        typer.Argument(
            metavar="[KIND|METHOD]",
            help=f"{', '.join([*KINDS, *NETWORKS])}; or a protector, for its settings.",
        ),
    ] = "protectors",
    weights_dir: WeightsDir = None,
    as_json: AsJson = False,
) -> None:
    """List what can be used, or the settings of one method.

    [cyan]shields list[/]  the protectors;
    [cyan]shields list manipulators[/]  networks that forge faces, their licences and sources;
    [cyan]shields list facelock[/]  what --set and --preset can say to it.
    """
    from shields.registry import did_you_mean

    with errors(as_json=as_json):
        if what in NETWORKS:
            _list_networks(what, store_at(weights_dir), as_json=as_json)
            return
        if what in KINDS:
            found = dict(_described(what))
            if as_json:
                write_json({what: found})
            else:
                out.print(_table(("name", "what it does"), found.items()))
            return
        protectors = _registry("protectors")
        if what not in protectors:
            hint = did_you_mean(what, [*KINDS, *NETWORKS, *protectors])
            raise UnknownName(f"neither a kind nor a protector is called {what!r}; {hint}")
        _show_method(what, protectors[what], as_json=as_json)


def _list_networks(kind: str, store: WeightStore, *, as_json: bool) -> None:
    """List the cards of a role, and what installed packages add to it."""
    from shields.models import plugins

    role = NETWORKS[kind]
    rows = {}
    for name in store.names():
        card = store.card(name)
        if card.role == role:
            state, _ = _state(store, card)
            rows[name] = {**_brief(card), "weights": state, "from": card.address or card.source}
    for name, address in plugins(role).items():
        rows[name] = {"name": name, "role": role, "summary": f"plug-in {address}", "licence": "",
                      "weights": "its own", "from": address}  # fmt: skip
    if as_json:
        write_json({kind: rows})
        return
    # A line for each fact: in a table, addresses and licences would be cut to shreds.
    for name, row in rows.items():
        out.print(f"[bold]{plain(name)}[/]  weights: {row['weights']}")
        for fact in ("summary", "licence", "from"):
            out.print(plain(f"    {fact}: {row[fact] or 'not stated'}"))
    if role == "manipulator":
        out.print("or your own: module:factory, see `shields.models.manipulation.wrap`")


def _show_method(name: str, protector: Any, *, as_json: bool) -> None:  # noqa: ANN401  any protector
    config: ProtectorConfig = protector.Config()
    presets = {
        preset: _difference(config, make()) for preset, make in protector.Config.presets().items()
    }
    notes = _field_notes(protector.Config)
    if as_json:
        document = {
            "name": name,
            "description": inspect.getdoc(protector),
            "paper": protector.paper,
            "networks": dict(protector.NETWORKS),
            "settings": config.to_dict(),
            "presets": presets,
        }
        write_json(document)
        return
    out.print(f"[bold]{plain(name)}[/]  {plain(_first_line(protector))}  {protector.paper}")
    lines = [
        (setting, str(value), notes.get(setting, "")) for setting, value in config.to_dict().items()
    ]
    out.print(_table(("setting", "default", "meaning"), lines))
    for preset, change in presets.items():
        text = ", ".join(f"{key}={value}" for key, value in change.items()) or "the defaults"
        out.print(f"preset [bold]{plain(preset)}[/]: {plain(text)}")
    for role, network in protector.NETWORKS.items():
        out.print(f"{role}: {network}", markup=False)


def _difference(config: ProtectorConfig, other: ProtectorConfig) -> dict[str, Any]:
    default = config.to_dict()
    return {key: value for key, value in other.to_dict().items() if value != default[key]}


def _field_notes(config: type) -> dict[str, str]:
    """The `#:` comments above the fields of a dataclass and of those it inherits from."""
    notes: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        pending: list[str] = []
        for line in inspect.getsource(kind).splitlines():
            text = line.strip()
            if text.startswith("#:"):
                pending.append(text.removeprefix("#:").strip())
                continue
            name, colon, _ = text.partition(":")
            if pending and colon and name.isidentifier():
                notes[name] = " ".join(pending)
            pending = []
    return notes


def _table(head: tuple[str, ...], lines: Any) -> Table:  # noqa: ANN401  rows of any iterable
    table = Table(*head, box=None, header_style="bold", pad_edge=False)
    for line in lines:
        table.add_row(*(plain(cell) for cell in line))
    return table


app = typer.Typer(
    help="Networks and their weights: list, show, pull, convert, verify, check.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


app.command()(cli_check.check)
app.command()(cli_check.convert)


def _state(store: WeightStore, card: Card) -> tuple[str, str | None]:
    """Whether a card's weights are here, and where; `verify` is for their content."""
    if ":" in card.architecture:  # a factory of the user's, which knows where its weights are
        return "its own", None
    try:
        return "here", str(store.find(card))
    except WeightsError as error:
        return ("missing" if "not on this machine" in str(error) else "damaged"), None


@app.command(name="list")
def list_cards(weights_dir: WeightsDir = None, as_json: AsJson = False) -> None:
    """List the cards, and whether their weights are on this machine."""
    with errors(as_json=as_json):
        store = store_at(weights_dir)
        rows = []
        for name in store.names():
            card = store.card(name)
            state, path = _state(store, card)
            rows.append({**_brief(card), "state": state, "path": path})
        if as_json:
            write_json({"models": rows, "places": [str(place) for place in store.places()]})
            return
        lines = [(row["name"], row["role"], row["state"], row["summary"]) for row in rows]
        out.print(_table(("name", "role", "weights", "summary"), lines))
        out.print("searched: " + ", ".join(str(place) for place in store.places()), markup=False)


def _brief(card: Card) -> dict[str, Any]:
    return {"name": card.name, "role": card.role, "licence": card.licence, "summary": card.summary}


@app.command()
def show(name: str, weights_dir: WeightsDir = None, as_json: AsJson = False) -> None:
    """Show a card: what the network is, where it comes from, its licence, what was measured."""
    with errors(as_json=as_json):
        store = store_at(weights_dir)
        card = store.card(name)
        state, path = _state(store, card)
        facts = dataclasses.asdict(card) | {"address": card.address, "weights": state, "path": path}
        if as_json:
            write_json(facts)
            return
        lines = [(key, str(value)) for key, value in facts.items() if value]
        out.print(_table(("field", "value"), lines))


@app.command()
def pull(name: str, weights_dir: WeightsDir = None, as_json: AsJson = False) -> None:
    """Fetch the weights of a card into the user cache; the only command that downloads."""
    with errors(as_json=as_json):
        store = store_at(weights_dir, download=True)
        card = store.card(name)
    with errors(as_json=as_json, code=1):
        path = store.find(card)
        if as_json:
            write_json({"name": name, "path": str(path)})
        else:
            out.print(f"{name}: {path}", markup=False)


@app.command(name="verify")
def verify_weights(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Cards; all that are here.")
    ] = None,
    weights_dir: WeightsDir = None,
    as_json: AsJson = False,
) -> None:
    """Check weights against their cards: digest, size, every number finite.

    Exits 1 where weights are damaged, or absent though they were named.
    """
    with errors(as_json=as_json):
        store = store_at(weights_dir)
        results, good = {}, True
        for name in names or store.names():
            card = store.card(name)
            try:
                results[name] = f"good: {store.verify(card)}"
            except WeightsError as error:
                absent = _state(store, card)[0] == "missing"
                results[name] = f"missing: {error}" if absent else f"damaged: {error}"
                good = good and absent and not names
    if as_json:
        write_json({"ok": good, "models": results})
    else:
        out.print(_table(("name", "weights"), results.items()))
    if not good:
        raise typer.Exit(1)
