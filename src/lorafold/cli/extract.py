"""`lorafold extract`: an adapter from the difference between a fine-tuned model and its base."""

from typing import Annotated

import typer

from lorafold.cli.alone import Alone
from lorafold.cli.common import JsonOption, Output, emit
from lorafold.cli.groups import grouped

EXAMPLES = (
    "lorafold extract --tuned demo/merged --rank 8 --out extracted",
    "lorafold extract --model smollm2 --tuned demo/merged --rank 4 --out rank-4",
    "lorafold extract --tuned demo/merged --rank 2 --out rank-2 --json",
)


@grouped
def command(
    tuned: Annotated[str, typer.Option(help="The fine-tuned model: a directory or a hub id.")],
    output: Output,
    source: Alone,
    rank: Annotated[int, typer.Option(min=1, help="The rank of every module's update.")],
    json: JsonOption = False,
) -> None:
    """Make a LoRA adapter of the difference between a fine-tuned model and its base: the best of
    its rank, for every linear layer of the blocks.

    One tensor at a time is in memory, so the models may be larger than the memory. Other tensors
    that differ (norms, embeddings) are listed and left out.
    """
    from lorafold.api.resize import extract

    result = extract(
        tuned,
        output.out,
        rank=rank,
        model=source.model,
        overwrite=output.overwrite,
        **source.how,
    )
    emit(json, result.as_json(), str(result))
