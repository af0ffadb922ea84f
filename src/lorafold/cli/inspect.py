"""`lorafold inspect`: figures of an adapter's update, and advice on its rank."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import Adapters, JsonOption, Opening, OverOption, emit, messages
from lorafold.cli.groups import grouped
from lorafold.cli.pages import page_option

EPILOG = """How to read the figures. Effective rank: the number of directions that hold 90, 95 or
99% of an update's energy (its squared singular values). If it is far below the nominal rank,
`lorafold resize` can make the adapter smaller. Relative norm: the norm of the update divided by
that of the base. Amplification: the norm of the update divided by that of the base in the update's
own directions. phi, with --against: the share of one subspace that lies in another, at most 1.
Barrier: how far the loss between two adapters rises above the straight line between their losses,
in nats."""
EXAMPLES = (
    "lorafold inspect demo/adapter",
    "lorafold inspect demo/adapter --full --html inside.html",
    "lorafold inspect demo/adapter --data demo/test.jsonl --rows 16",
)


@grouped
def command(
    adapters: Adapters,
    opening: Opening,
    over: OverOption = None,
    against: Annotated[
        Path | None,
        typer.Option(help="A second adapter of the same base: another rank, seed or task."),
    ] = None,
    directions: Annotated[
        Path | None,
        typer.Option(
            help=(
                "A safetensors file of named vectors in the residual stream, such as probes or the"
                " decoder of a sparse autoencoder."
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
            min=1, help="How many rows of the data to use, once for each point of a line."
        ),
    ] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=(
                "Longer rows are cut to this many tokens. Without it 1,024, or as many as the model"
                " has positions."
            ),
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help=(
                "Also compare with the base's spectrum: intruder dimensions, and which of the"
                " base's directions change. It takes the SVD of every base matrix, which is slow"
                " the first time."
            ),
        ),
    ] = False,
    html: Annotated[
        Path | None, page_option("Also write heat maps, spectra and tables as one HTML file.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Measure an adapter's update: its effective rank, its relation to the base, the tokens that it
    reads and writes, and the loss along it.

    The figures come from the adapter's factors and the base's files. Only --data loads the model
    itself.
    """
    from lorafold.api.inspect import inspect
    from lorafold.inspecting.report import page, table

    console = messages()
    result = inspect(
        adapters.one,
        opening.model,
        over=over or (),
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
        console.print(table(found), highlight=False, markup=False, soft_wrap=True)
    emit(json, found, str(result))
