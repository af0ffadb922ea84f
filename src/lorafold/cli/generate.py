"""`lorafold generate`: the completion of one prompt, token by token."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafold.cli.common import Adapters, JsonOption, Opening, Sampling, emit, messages
from lorafold.cli.groups import grouped
from lorafold.errors import LorafoldError

EXAMPLES = (
    'lorafold generate demo/adapter --prompt "a table for two at Noma at 7pm"',
    'lorafold generate --prompt "What is a low-rank adapter?" --max-new-tokens 40',
    'lorafold generate demo/adapter --prompt "a table for two" --temperature 0.7',
)


@grouped
def command(
    prompt: Annotated[
        str,
        typer.Option(help="The user's message, which the model's chat template renders."),
    ],
    adapters: Adapters,
    opening: Opening,
    sampling: Sampling,
    tools: Annotated[
        Path | None,
        typer.Option(help="A JSON file with a list of functions that the model may call."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Complete one prompt. The text goes to stdout as it is generated, the speed to stderr.

    With --tools, the calls in it are read back: they are listed on stderr, and in the JSON, which
    has null for calls that can't be read.
    """
    import time

    from lorafold import engine
    from lorafold.api.generate import rendered
    from lorafold.api.opened import opened
    from lorafold.data.calls import parse_calls, read_tools
    from lorafold.data.control_tokens import IN_PROMPT, allow, is_marked
    from lorafold.data.messages import tools_of
    from lorafold.generation import stream
    from lorafold.opening import base_for
    from lorafold.peft.saved import open_all

    console = messages()
    offered = read_tools(tools) if tools else []
    found = open_all(adapters.paths)
    base = base_for(opening.model, found, console, **opening.how)
    model, tokenizer = opened(base, found, console=console)
    if sampling.allow_control_tokens:
        allow(tokenizer)
    text = rendered(prompt, sampling.system, tokenizer, offered)
    if is_marked(text):
        console.print(IN_PROMPT, highlight=False, markup=False, soft_wrap=True)
    pieces: list[str] = []
    start = time.perf_counter()
    choice = engine.Sampling(temperature=sampling.temperature, seed=sampling.seed)
    completion = stream(model, tokenizer, text, sampling.max_new_tokens, choice)
    while True:
        try:
            pieces.append(next(completion))
        except StopIteration as end:
            count = len(end.value.tokens) if end.value else 0
            break
        if not json:
            typer.echo(pieces[-1], nl=False)
    speed = count / (time.perf_counter() - start)
    result: dict[str, object] = {"text": "".join(pieces), "tokens_per_second": speed}
    calls: list[dict[str, Any]] = []
    if tools:
        try:
            calls = parse_calls("".join(pieces), tokenizer, tools_of(offered))
            result["tool_calls"] = calls
        except LorafoldError as error:
            result["tool_calls"] = None
            console.print(str(error), highlight=False, markup=False)
    # without --json the text is on stdout already, and this ends its line
    emit(json, result, "")
    for call in calls:
        function = call["function"]
        told = f"calls {function['name']} {function['arguments']}"
        console.print(told, highlight=False, markup=False)
    console.print(f"{count} tokens, {speed:.1f} tokens/s", highlight=False)
