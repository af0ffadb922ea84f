"""Options that several commands share, and where output goes.

Messages and progress go to stderr; the result goes to stdout: a line for people, or with --json one
JSON object as the last line.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.step.recipe import Recipe

ModelOption = Annotated[
    str,
    typer.Option(
        help=(
            "The base: smollm2 (embedded), a directory, a .gguf file, or a hub id as in owner/name."
        )
    ),
]
AdapterOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        help="A saved adapter (PEFT's format); repeat the option to put several on the base.",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        help=(
            "Examples: JSONL, Parquet or a hub dataset. Rows: messages, prompt + completion, text,"
            " or text + label."
        )
    ),
]
OutOption = Annotated[
    Path,
    typer.Option(
        help="Where the result goes: a new directory that appears only once it is complete."
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace what an earlier run wrote there, once the new is complete."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:N or mps; without it the fastest kind that is there."),
]
BaseOption = Annotated[
    str,
    typer.Option(
        help=(
            "How the base's weights are held: nf4, int8, bf16, fp32, or auto: packed as while"
            " training, else 16 or 32 bits."
        )
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**32 - 1,
        help="Seed of everything drawn at random: the same seed, the same result.",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a hub model; a commit pins it for good."),
]
TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a model brings along. Off: it has the rights that you have.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object, the last line of stdout."),
]


def messages() -> "Console":
    """The console for messages and progress: stderr, so that stdout holds the result alone."""
    from rich.console import Console

    return Console(stderr=True)


def rows_or_quickstart(
    data: str | None, eval_data: str | None, recipe: "Recipe"
) -> tuple[list[Any], list[Any], str]:
    """Training rows, held-out rows and where they are from: files, a tenth held out if there is but
    one, or the quickstart's task.
    """
    from lorafold.data.batches import split
    from lorafold.data.rows import read_rows
    from lorafold.quickstart.task import rows

    if data is None:
        return (
            rows("train", recipe.batch * (recipe.steps or 60), 0),
            rows("test", 100, 0),
            "the quickstart's task",
        )
    train, held_out = (
        (read_rows(data), read_rows(eval_data))
        if eval_data
        else split(read_rows(data), 0.1, recipe.seed)
    )
    return train, held_out, data


def emit(json: bool, result: Mapping[str, Any], text: str) -> None:
    """Print the result: `text` for people or, with `json`, one line of JSON, in which a number that
    is not finite is null.
    """
    if json:
        from pydantic_core import to_json

        text = to_json(dict(result), inf_nan_mode="null").decode()
    typer.echo(text)
