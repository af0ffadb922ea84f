"""`lorafold resize`: the best adapter of another rank."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import JsonOption, Opening, Output, emit, messages
from lorafold.cli.groups import grouped


@grouped
def command(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="A saved adapter in PEFT's format, of any method that changes matrices."
        ),
    ],
    output: Output,
    opening: Opening,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The rank of every module; fewer where an update has no more."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="Instead of a rank, the share of each update's energy to keep, as in 0.95."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows, as for train: the error in loss is measured as well.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")
    ] = 1024,
    json: JsonOption = False,
) -> None:
    """Give an adapter another rank by singular value decomposition: no adapter of that rank lies
    nearer to it.

    The result is plain LoRA in PEFT's format, whatever the method was. The error is the share of
    the update's (Frobenius) norm that is lost. `lorafold inspect` tells which rank would do.
    """
    from lorafold.api.opened import opened
    from lorafold.data.rows import read_rows
    from lorafold.errors import LorafoldError
    from lorafold.inspecting.loss import losses_of
    from lorafold.inspecting.resize import resize
    from lorafold.models.sources import resolve_model

    if (rank is None) == (energy is None):
        raise LorafoldError("expected either --rank or --energy")
    if energy is not None and not 0 < energy <= 1:
        raise LorafoldError(f"--energy {energy}: expected a share above 0, at most 1")
    rows = None if data is None else read_rows(data)
    result = resize(
        resolve_model(opening.model, opening.revision),
        adapter,
        output.out,
        rank=rank,
        energy=energy,
        overwrite=output.overwrite,
        allow_other_base=opening.allow_other_base,
        trust_remote_code=opening.trust_remote_code,
    )
    found, text = result.as_json(), str(result)
    if rows is not None:
        model, tokenizer = opened(
            opening.model, [adapter, output.out], console=messages(), **opening.how
        )
        found |= losses_of(model, tokenizer, rows, max_length)
        text += f"\n  loss {found['loss_before']:.4f} before, {found['loss_after']:.4f} after"
    emit(json, found, text)
