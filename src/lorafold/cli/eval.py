"""`lorafold eval`: loss, perplexity and exact match of a model or adapter on rows."""

from typing import Annotated

import typer

from lorafold.cli.common import (
    Adapters,
    ColumnsOption,
    DataOption,
    JsonOption,
    Opening,
    columns_of,
    emit,
    messages,
)
from lorafold.cli.groups import grouped


@grouped
def command(
    data: DataOption,
    adapters: Adapters,
    opening: Opening,
    columns: ColumnsOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=(
                "Longer rows are cut to this many tokens for the loss. Without it 1,024, or as many"
                " as the model has positions."
            ),
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most tokens of a completion. Without it those of the longest reference.",
        ),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option(help="Generate completions for the exact match, or measure only the loss."),
    ] = True,
    json: JsonOption = False,
) -> None:
    """Measure loss, perplexity and exact match on held-out rows, with 95% intervals.

    The loss counts completions only. Exact match is the share of greedy completions that equal the
    reference, surrounding whitespace aside; rows of plain text have none. On rows of text and label
    the model is a classifier, and exact match is its accuracy.

    On rows of preferences these are of the chosen completions. Besides there are the share of pairs
    whose chosen completion the model finds more likely, and against the model without the last
    adapter the reward accuracy and margin, the change of both log-probabilities, and the KL.
    """
    from lorafold.api.evaluate import evaluate

    result = evaluate(
        opening.model,
        data,
        columns=columns_of(columns),
        adapters=adapters.paths,
        max_length=max_length,
        completions=completions,
        max_new_tokens=max_new_tokens,
        console=messages(),
        **opening.how,
    )
    emit(json, result.as_json(), str(result))
