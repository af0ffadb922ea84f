"""`lorafold quickstart`: an adapter of the embedded model, from training to its export."""

from collections.abc import Iterator
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
    The model is evaluated on unseen rows before and after, and the adapter (in PEFT's format), a
    merged plain model and the adapter for llama.cpp (GGUF), proved there, are written to OUT.
    """
    from dataclasses import asdict

    from lorafold.files.terminal import paragraph
    from lorafold.quickstart.story import quickstart

    story = quickstart(out, messages(), overwrite=overwrite, device=device)
    figures = [line for figure in story.meaning() for line in paragraph(figure, "- ")]
    emit(json, asdict(story), "\n".join([*figures, "", *_next(out)]))


def _next(out: Path) -> Iterator[str]:
    """What to do next: commands that can be pasted as they stand, one a line."""
    from lorafold.cli.pasted import this_command
    from lorafold.quickstart.story import MODEL, PROMPT

    run, adapter = this_command(), quote(str(out / "adapter"))
    merged, train, test = (
        quote(str(out / name)) for name in ("merged", "train.jsonl", "test.jsonl")
    )
    mine = quote(str(out / "mine"))
    yield "Ask the merged model, measure the adapter, see what training sees, train again:"
    yield f"{run} generate --model {merged} --system JSON --prompt {quote(PROMPT)}"
    yield f"{run} eval --model {MODEL} --adapter {adapter} --data {test}"
    yield f"{run} train --model {MODEL} --data {train} --out {mine} --preview"
    yield f"{run} train --model {MODEL} --data {train} --out {mine} --rank 8 --steps 20"
    yield 'Ask it for "a table for four at Chez Luigi on Friday at 8pm", beside the base:'
    yield f"{run} serve --model {MODEL} --adapters {quote(str(out))} --open"

