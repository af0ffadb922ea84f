"""`lorafold extract`: an adapter from the difference between a fine-tuned model and its base."""

from typing import Annotated

import typer

from lorafold.cli.common import BASE, JsonOption, Output, emit
from lorafold.cli.groups import grouped


@grouped
def command(
    tuned: Annotated[str, typer.Option(help="The fine-tuned model: a directory or a hub id.")],
    output: Output,
    rank: Annotated[int, typer.Option(min=1, help="The rank of every module's update.")],
    base: Annotated[
        str,
        typer.Option(
            rich_help_panel=BASE,
            help="The model before fine-tuning: smollm2 (embedded), a directory or a hub id.",
        ),
    ] = "smollm2",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            rich_help_panel=BASE,
            help="Run Python code that comes with the models. It gets all the rights you have.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Make a LoRA adapter of the difference between a fine-tuned model and its base: the best of
    its rank, for every linear layer of the blocks.

    One tensor at a time is in memory, so the models may be larger than the memory. Other tensors
    that differ (norms, embeddings) are listed and left out.
    """
    from lorafold.inspecting.resize import extract
    from lorafold.models.sources import resolve_model

    result = extract(
        resolve_model(base),
        resolve_model(tuned),
        output.out,
        rank=rank,
        overwrite=output.overwrite,
        trust_remote_code=trust_remote_code,
    )
    emit(json, result.as_json(), str(result))
