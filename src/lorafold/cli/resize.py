"""`lorafold resize`: the best adapter of another rank for the same update."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import JsonOption, Opening, Output, OverOption, emit, messages
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
    over: OverOption = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="The rank of every module, or less where an update has less."),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="The share of each update's energy to keep, as in 0.95, instead of --rank."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows, as for train, to measure the change of the loss on.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longer rows are cut to this many tokens.")
    ] = 1024,
    json: JsonOption = False,
) -> None:
    """Give an adapter another rank by singular value decomposition. No other adapter of that rank
    is closer to it.

    The result is plain LoRA in PEFT's format, whatever the method was. The error is the share of
    the update's (Frobenius) norm that is lost. `lorafold inspect` shows which rank is enough.
    """
    from lorafold.api.arguments import as_rows
    from lorafold.api.opened import opened
    from lorafold.errors import LorafoldError
    from lorafold.inspecting.loss import losses_of
    from lorafold.inspecting.resize import resize
    from lorafold.models.sources import resolve_model

    if (rank is None) == (energy is None):
        found = "neither" if rank is None else "both"
        raise LorafoldError(f"--rank, --energy: found {found}, expected exactly one of them")
    if energy is not None and not 0 < energy <= 1:
        raise LorafoldError(f"--energy: found {energy:g}, expected a share above 0, at most 1")
    console = messages()
    rows = None if data is None else as_rows(data, None, console)
    result = resize(
        resolve_model(opening.model, opening.revision),
        adapter,
        output.out,
        over=over or (),
        rank=rank,
        energy=energy,
        overwrite=output.overwrite,
        allow_other_base=opening.allow_other_base,
        trust_remote_code=opening.trust_remote_code,
    )
    figures, text = result.as_json(), str(result)
    if rows is not None:
        below = over or []
        # their base, and what they lie over, were checked when they were read
        how = opening.how | {"allow_other_base": True}
        stack = [*below, adapter, output.out]
        model, tokenizer = opened(opening.model, stack, console=console, **how)
        figures |= losses_of(model, tokenizer, rows, max_length, len(below))
        text += f"\n  loss {figures['loss_before']:.4f} before, {figures['loss_after']:.4f} after"
    emit(json, figures, text)
