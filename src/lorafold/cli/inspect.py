"""`lorafold inspect`: what an adapter learnt, and how much of it is real."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import JsonOption, Opening, emit, messages
from lorafold.cli.groups import grouped

EPILOG = """How to read it. Effective rank: the number of directions that hold 90, 95 or 99% of an
update's energy (its squared singular values). Where that is far below the nominal rank, `lorafold
resize` makes the adapter smaller. Relative norm: the size of the update beside the base's.
Amplification: the size of the update beside what the base does in the update's own directions. phi,
with --against: the share of one subspace that lies in another, at most 1. Barrier: how far the loss
between two adapters rises above the straight line between theirs, in nats."""


@grouped
def command(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A saved adapter in PEFT's format, of any method that changes matrices."
        ),
    ],
    opening: Opening,
    against: Annotated[
        Path | None,
        typer.Option(help="A second adapter of the same base: another rank, seed or task."),
    ] = None,
    directions: Annotated[
        Path | None,
        typer.Option(
            help=(
                "A safetensors file of vectors of the residual stream's width, by name, such as"
                " probes or the decoder of a sparse autoencoder."
            )
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows, as for train, for the loss along base + t dW and between two adapters."
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            min=1, help="Only so many rows of the data. Each point of a path is one pass over them."
        ),
    ] = 64,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")
    ] = 1024,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help=(
                "Also what needs the SVD of every base matrix: intruder dimensions, and the"
                " update's place in the base's spectrum. The first time is slow."
            ),
        ),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write maps, spectra and tables as one HTML file."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Look inside an update: its true rank, its place in the base, the tokens it reads and writes,
    and the loss along it.

    This works from the adapter's factors and the base's files. The model itself is loaded for
    --data only.
    """
    from lorafold.api.inspect import inspect
    from lorafold.inspecting.report import page, table

    console = messages()
    result = inspect(
        adapter,
        opening.model,
        against=against,
        directions=directions,
        data=data,
        rows=rows,
        max_length=max_length,
        full=full,
        console=console,
        **opening.how,
    )
    found = result.as_json()
    if html:
        page(found, html)
    if not json:
        console.print(table(found))
    emit(json, found, str(result))
