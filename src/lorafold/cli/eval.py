"""`lorafold eval`: how good a model or adapter is on a file of examples."""

from typing import Annotated

import typer

from lorafold.cli.common import (
    AdapterOption,
    BaseOption,
    DataOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    TrustRemoteCodeOption,
    emit,
    messages,
)
from lorafold.cli.loaded import AllowOtherBaseOption, load_adapted


def command(
    data: DataOption,
    model: ModelOption = "smollm2",
    adapter: AdapterOption = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longer rows are cut to this many tokens for the loss.")
    ] = 1024,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Limit of an answer; without it the longest reference."),
    ] = None,
    answers: Annotated[
        bool, typer.Option(help="Generate answers for the exact match, or not.")
    ] = True,
    base: BaseOption = "auto",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_other_base: AllowOtherBaseOption = False,
    json: JsonOption = False,
) -> None:
    """Loss, perplexity and exact match on held-out examples, with 95% intervals.

    The loss counts completions only. Exact match is the share of greedy answers equal to the
    reference, surrounding whitespace aside; rows of plain text have none. On rows of text and label
    the model is a classifier, and exact match is its accuracy.
    """
    from lorafold.data.rows import is_labelled, read_rows
    from lorafold.evaluation import evaluate

    console, rows = messages(), read_rows(data)
    adapted, tokenizer = load_adapted(
        model,
        adapter or (),
        base,
        device,
        revision,
        trust_remote_code,
        allow_other_base,
        console,
        classify=is_labelled(rows),
    )
    result = evaluate(
        adapted,
        tokenizer,
        rows,
        max_length,
        generate=answers,
        max_new_tokens=max_new_tokens,
        console=console,
    )
    emit(json, result.as_json(), str(result))
