"""`lorafold resize`: the best adapter of another rank for the same update."""

from typing import Annotated

import typer

from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import Adapters, JsonOption, Opening, Output, OverOption, emit, messages
from lorafold.cli.groups import grouped

EXAMPLES = (
    "lorafold resize demo/adapter --rank 4 --out rank-4",
    "lorafold resize demo/adapter --energy 0.95 --out most",
    "lorafold resize demo/adapter --rank 4 --out measured --data demo/test.jsonl",
)


@grouped
def command(
    adapters: Adapters,
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
    columns: ColumnsOption = None,
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
    json: JsonOption = False,
) -> None:
    """Give an adapter another rank by singular value decomposition. No other adapter of that rank
    is closer to it.

    The result is plain LoRA in PEFT's format, whatever the method was. The error is the share of
    the update's (Frobenius) norm that is lost. `lorafold inspect` shows which rank is enough.
    """
    from lorafold.api.resize import resize

    result = resize(
        adapters.one,
        output.out,
        model=opening.model,
        over=over or (),
        rank=rank,
        energy=energy,
        data=data,
        columns=columns_of(columns),
        max_length=max_length,
        overwrite=output.overwrite,
        console=messages(),
        **opening.how,
    )
    emit(json, result.as_json(), str(result))
