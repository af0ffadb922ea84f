"""`lorafold score`: the scores that a reward model gives rows."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import Adapters, DataOption, JsonOption, Opening, emit, messages
from lorafold.cli.groups import grouped
from lorafold.errors import LorafoldError

EXAMPLES = (
    "lorafold train --objective reward --data pairs.jsonl --out judge",
    "lorafold score judge --data pairs.jsonl",
    "lorafold score judge --data pairs.jsonl --out scores.jsonl",
)


@grouped
def command(
    data: DataOption,
    adapters: Adapters,
    opening: Opening,
    columns: ColumnsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new file for the scores, one JSON object a row. Without it they are printed."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file OUT.")] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=(
                "Longer texts are cut to this many tokens. Without it 1,024, or as many as the"
                " model has positions."
            ),
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score rows with a reward model: an adapter of --objective reward, or a whole model.

    Of rows of preferences both completions are scored, and accuracy, margin, calibration and the
    bias to length follow, with 95% intervals. Of other rows the whole text is scored, to the end of
    the assistant's last turn.
    """
    if out is not None and out.exists() and (out.is_dir() or not overwrite):
        what = "is a directory; expected a new file" if out.is_dir() else "exists"
        raise LorafoldError(f"{out} {what}" + "; pass --overwrite to replace it" * out.is_file())
    from lorafold.api.score import score

    found = score(
        opening.model,
        data,
        columns=columns_of(columns),
        adapters=adapters.paths,
        max_length=max_length,
        console=messages(),
        **opening.how,
    )
    if out is not None:
        found.write(out)
    else:
        for row in found.rows:
            typer.echo(row.as_json() if json else str(row))
    emit(json, found.as_json(), str(found))
