"""Options of the commands that can have their work done by several processes or machines."""

from __future__ import annotations

import socket
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from shields.errors import ConfigError

if TYPE_CHECKING:
    from shields.spread import Workers

__all__ = ["Engine", "EngineName", "GpusPerWorker", "RayAddress", "WorkerCount", "workers_of"]

_PANEL = "Many processes or machines"


class Engine(StrEnum):
    """Who works photos off."""

    serial = "serial"
    ray = "ray"


EngineName = Annotated[
    Engine,
    typer.Option(
        help="serial: this process; ray: several, here or on a cluster, one of which may die "
        "(pip install 'shields\\[ray]').",
        rich_help_panel=_PANEL,
    ),
]
WorkerCount = Annotated[
    int | None,
    typer.Option(
        "--workers",
        metavar="N",
        help="Processes. [dim]default: as many as there is room for[/]",
        rich_help_panel=_PANEL,
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        metavar="SHARE",
        help="0.25 lets four processes share a GPU. [dim]default: 1 where --device is one, or 0[/]",
        rich_help_panel=_PANEL,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="HOST:PORT",
        help="A cluster that runs already, or auto. All its machines see the present folder, the "
        "photos and --out under the same paths. [dim]default: Ray runs here, for this command[/]",
        rich_help_panel=_PANEL,
    ),
]


def workers_of(
    engine: Engine, count: int | None, gpus: float | None, address: str | None, device: str
) -> Workers | None:
    """Who works things off besides this process; None where it does so itself.

    Raises:
        ConfigError: There are no such workers or cluster, or an option goes with another engine.
        DeviceError: There is no such device.
    """
    from shields.shield import choose_device
    from shields.spread import Workers

    if engine is Engine.serial:
        options = {"--workers": count, "--gpus-per-worker": gpus, "--ray-address": address}
        for option, value in options.items():
            if value is not None:
                raise ConfigError(f"{option} is for --engine ray; add that, or leave it out")
        return None
    if gpus is None:
        gpus = float(choose_device(device).type == "cuda")
    if address is not None:
        _check_answer(address)
    return Workers(count=count, gpus=gpus, address=address)


def _check_answer(address: str) -> None:
    """Find out at once what Ray would find out after minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto", or what Ray refuses by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"nothing answers at --ray-address {address} ({error}); start it by `ray start --head`"
        ) from error
