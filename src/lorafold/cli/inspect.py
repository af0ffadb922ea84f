"""`lorafold inspect`: what an adapter learnt, and how much of it is real."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    BaseOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    TrustRemoteCodeOption,
    emit,
    messages,
)
from lorafold.cli.loaded import AllowOtherBaseOption, load_adapted

EPILOG = """How to read it. Effective rank: so many directions hold 90, 95 or 99% of an update's
energy (its squared singular values); where that is far below the nominal rank, `lorafold resize`
saves the rest. Relative norm: how large the update is beside the base. Amplification: how large it
is beside what the base does in the update's own directions. phi, with --against: the share of one
subspace that lies in another, 1 at most. Barrier: how far the loss rises between two adapters above
the straight line, in nats."""


def command(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A saved adapter (PEFT's format), of any method that changes matrices."
        ),
    ],
    model: ModelOption = "smollm2",
    against: Annotated[
        Path | None,
        typer.Option(help="A second adapter of the same base: other rank, seed or data."),
    ] = None,
    directions: Annotated[
        Path | None,
        typer.Option(
            help=(
                "Vectors of the residual stream's size by name (safetensors), as probes or an SAE's"
                " decoder."
            )
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Examples, as for train: the loss along base + t dW, and between two adapters."
        ),
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            min=1, help="Of the data, only so many: each point of a path is one pass over them."
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
                "Also what needs the SVD of every base matrix: intruders, place in its spectrum."
                " Slow once."
            ),
        ),
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with maps, spectra and tables: one file.")
    ] = None,
    base: BaseOption = "auto",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_other_base: AllowOtherBaseOption = False,
    json: JsonOption = False,
) -> None:
    """Look inside an update: its true rank, its place in the base, the tokens it reads and writes,
    the loss along it.

    Works from the adapter's factors and the base's files; the model itself is loaded for --data
    only.
    """
    from lorafold.data.rows import read_rows
    from lorafold.inspecting.paths import measured_paths
    from lorafold.inspecting.report import page, table
    from lorafold.inspecting.run import inspect
    from lorafold.inspecting.words import of_paths
    from lorafold.models.sources import resolve_model

    console, examples = messages(), None if data is None else read_rows(data)[:rows]
    with console.status("sites") as status:
        found = inspect(
            resolve_model(model, revision),
            adapter,
            against=against,
            directions=directions,
            full=full,
            allow_other_base=allow_other_base,
            trust_remote_code=trust_remote_code,
            progress=lambda done, total: status.update(f"site {done} of {total}"),
        )
    if found["tokens_left_out"]:
        console.print(found["tokens_left_out"], highlight=False, markup=False, soft_wrap=True)
    if examples is not None:
        adapters = [adapter] if against is None else [adapter, against]
        loaded, tokenizer = load_adapted(
            model, adapters, base, device, revision, trust_remote_code, allow_other_base, console
        )
        with console.status("losses along the paths"):
            found["paths"] = measured_paths(loaded, tokenizer, examples, max_length)
        found["advice"] += of_paths(found["paths"])
    if html:
        page(found, html)
    if not json:
        console.print(table(found))
    emit(json, found, "\n".join(found["advice"]))
