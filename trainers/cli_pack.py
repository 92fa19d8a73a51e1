"""`shields train pack`: cut the faces out of photos once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shields.errors import ShieldsError

__all__ = ["pack"]


def pack(
    source: Annotated[
        list[str],
        typer.Argument(
            help="Photos: a folder, a tar, a WebDataset ('shard-{0000..0012}.tar'), a data set of "
            "Hugging Face (Parquet, Arrow), or CelebAMask-HQ; or a pack, to add masks to."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    size: Annotated[int, typer.Option(help="Side of a packed face, pixels.")] = 160,
    margin: Annotated[float, typer.Option(help="Side of the cut, in face boxes.")] = 1.8,
    labels: Annotated[
        Path | None,
        typer.Option(help="A CSV with a column `file` and labels; else the source's own fields."),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN:YES|NO", help="A label to keep; may be repeated."),
    ] = None,
    identity: Annotated[
        str, typer.Option(help="The source's field that names a person; else folders tell.")
    ] = "",
    masks: Annotated[
        str,
        typer.Option(
            metavar="landmarks|parser:NAME|source", help="Keep a map of each face's parts."
        ),
    ] = "",
    heat: Annotated[
        str,
        typer.Option(
            metavar="METHOD:RECOGNIZER",
            help="Keep a heat map of each face, such as grad-cam++:face-embedder.",
        ),
    ] = "",
    device: Annotated[str, typer.Option(help="Where masks and heat maps are computed.")] = "cpu",
) -> None:
    """Cut the faces out of photos once, so that training never decodes an image again."""
    from trainers.pack import Attribute
    from trainers.pack import pack as run

    try:
        attributes = [Attribute.parse(text) for text in attribute or []]
        report = run(
            source, output, size=size, margin=margin, labels=labels, attributes=attributes,
            identity=identity, masks=masks, heat=heat, device=device,
        )  # fmt: skip
    except ShieldsError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    told = f", {report.labelled} with labels" if attributes else ""
    typer.echo(f"{report.faces} faces of {report.identities} people in {output}{told}")
    if report.resumed:
        typer.echo(f"{report.resumed} photos had been done before", err=True)
    for name, reason in report.skipped.items():
        typer.echo(f"left out {name}: {reason}", err=True)
    if report.skipped:
        typer.echo(f"left out {len(report.skipped)} in all", err=True)
