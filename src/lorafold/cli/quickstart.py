"""`lorafold quickstart`: train, evaluate, inspect and merge an adapter of the embedded model."""

import os
import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from lorafold.cli.common import DeviceOption, JsonOption, emit, messages

EXAMPLES = (
    "lorafold quickstart --out demo",
    "lorafold quickstart --out demo --overwrite",
    "lorafold quickstart --out again --device cpu --json",
)


def command(
    out: Annotated[
        Path, typer.Option(help="The directory for data, adapter and merged model.")
    ] = Path("quickstart"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run wrote to OUT.")
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train the embedded model, of 135M parameters, on a task that it can't do: in minutes on a
    laptop, without network.

    A request such as "book a table for four at Chez Luigi on Friday at 8pm" becomes strict JSON.
    The model is evaluated on unseen rows before and after, and the adapter (in PEFT's format) and a
    merged plain model are written to OUT.
    """
    from dataclasses import asdict

    from lorafold.quickstart.story import MODEL, quickstart

    story = quickstart(out, messages(), overwrite=overwrite, device=device)
    found = (
        f"exact match on unseen rows: {story.exact_match_before:.1%} before,"
        f" {story.exact_match_after:.1%} after"
    )
    emit(
        json,
        asdict(story),
        f"{found}; {story.train_seconds:.0f} s of training, {story.seconds:.0f} s in all\n"
        'ask it for "a table for four at Chez Luigi on Friday at 8pm" in the browser, beside the'
        f" base:\n  {_this_command()} serve --model {MODEL} --adapters {quote(str(out))} --open",
    )


def _this_command() -> str:
    """The command as it was typed, which need not be on the PATH."""
    typed = sys.argv[0]
    return quote(typed) if os.path.basename(typed) == "lorafold" and os.sep in typed else "lorafold"
