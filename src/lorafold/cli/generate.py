"""`lorafold generate`: the completion of one prompt, token by token."""

from typing import Annotated

import typer

from lorafold.cli.common import AdapterOption, JsonOption, Opening, Sampling, emit, messages
from lorafold.cli.groups import grouped


@grouped
def command(
    prompt: Annotated[
        str,
        typer.Option(help="The user's message, which the model's chat template renders."),
    ],
    opening: Opening,
    sampling: Sampling,
    adapter: AdapterOption = None,
    json: JsonOption = False,
) -> None:
    """Complete one prompt. The text goes to stdout as it is generated, the speed to stderr."""
    import time

    from lorafold.api.generate import rendered
    from lorafold.api.opened import opened
    from lorafold.generation import stream

    console = messages()
    model, tokenizer = opened(opening.model, adapter or (), console=console, **opening.how)
    text = rendered(prompt, sampling.system, tokenizer)
    pieces: list[str] = []
    start = time.perf_counter()
    length, temperature = sampling.max_new_tokens, sampling.temperature
    for piece in stream(model, tokenizer, text, length, temperature, sampling.seed):
        pieces.append(piece)
        if not json:
            typer.echo(piece, nl=False)
    speed = len(pieces) / (time.perf_counter() - start)
    # without --json the text is on stdout already, and this ends its line
    emit(json, {"text": "".join(pieces), "tokens_per_second": speed}, "")
    console.print(f"{len(pieces)} tokens, {speed:.1f} tokens/s", highlight=False)
