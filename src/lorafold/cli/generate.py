"""`lorafold generate`: one answer to one prompt, as it is written."""

from typing import Annotated

import typer

from lorafold.cli.common import (
    AdapterOption,
    BaseOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    SeedOption,
    TrustRemoteCodeOption,
    emit,
    messages,
)
from lorafold.cli.loaded import AllowOtherBaseOption, load_adapted


def command(
    prompt: Annotated[
        str,
        typer.Option(
            help="What to ask; it goes through the model's chat template as the user's message."
        ),
    ],
    model: ModelOption = "smollm2",
    adapter: AdapterOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="A system message before the prompt; the chat template's own without it."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The answer ends after this many tokens at the latest.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="0 takes the likeliest token each time; higher is more varied."),
    ] = 0.0,
    seed: SeedOption = 0,
    base: BaseOption = "auto",
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_other_base: AllowOtherBaseOption = False,
    json: JsonOption = False,
) -> None:
    """One answer to one prompt: the text streams to stdout, the speed goes to stderr."""
    import time

    from lorafold.data.render import render
    from lorafold.generation import stream

    console = messages()
    adapted, tokenizer = load_adapted(
        model, adapter or (), base, device, revision, trust_remote_code, allow_other_base, console
    )
    asked = [{"role": "system", "content": system}] if system is not None else []
    text = render([*asked, {"role": "user", "content": prompt}], tokenizer, for_generation=True)
    pieces: list[str] = []
    start = time.perf_counter()
    for piece in stream(adapted, tokenizer, text, max_new_tokens, temperature, seed):
        pieces.append(piece)
        if not json:
            typer.echo(piece, nl=False)
    speed = len(pieces) / (time.perf_counter() - start)
    # without --json the text is there already, and this its line end
    emit(json, {"text": "".join(pieces), "tokens_per_second": speed}, "")
    console.print(f"{len(pieces)} tokens, {speed:.1f} tokens/s", highlight=False)
