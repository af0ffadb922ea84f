"""What commands do with their verbs beyond calling them and printing what they return.

A runner takes the verb as a partial with all that is typed; its keywords are options of the command
besides those of the verb.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafold.api.options import Option
from lorafold.cli.commands import Json, emit, plain
from lorafold.errors import LorafoldError

Run = partial[Any]
CLUSTER = "Cluster"
On = Annotated[
    str | None,
    Option(
        "Start this command on a Ray cluster that runs already (RAY_ADDRESS).",
        panel=CLUSTER,
        rare=True,
        metavar="ray",
    ),
]
Workers = Annotated[
    int,
    Option(
        "How often --on starts it; each shares the work in --out.", panel=CLUSTER, rare=True, min=1
    ),
]
Wide = Annotated[
    bool, Option("Print all figures, in Markdown, however wide the table is.", rare=True)
]


def summarized(run: Run, *, json: Json = False) -> None:
    """Print what the result says of itself in a few lines."""
    result = run()
    emit(json, result.as_json(), result.summary())


def train(
    run: Run,
    *,
    preview: bool = False,
    html: Annotated[Path | None, Option(rare=True)] = None,
    json: Json = False,
) -> None:
    """Train, or show the rows as a run will see them.

    Args:
        preview: Print the first rows as the model will see them, with their tools and turns, mark
            the tokens that count in the loss, say what is found in all rows, and stop.
        html: With `preview`: write the rows as a page that needs no other file.
    """
    from lorafold.api import train as verbs

    asked = run.keywords
    if not preview:
        if html is not None:
            raise LorafoldError("--html writes the page of --preview; expected both")
        result = run()
        from lorafold.cli.next_commands import after_training

        told = [str(result), *after_training(result, asked["recipe"], asked.get("over", ()))]
        return emit(json, asdict(result), "\n".join(told))
    if "plot" in asked:
        raise LorafoldError("--plot draws a run, and --preview starts none; expected one of them")
    alone = {"out", "resume", "overwrite"}  # of a run that is made
    shared = {name: value for name, value in asked.items() if name not in alone}
    findings = verbs.preview(**shared, html=html)
    if json:
        emit(json, {"data": findings.as_json()}, "")


def generate(run: Run, *, json: Json = False) -> None:
    """Print the completion token by token, and then the speed and the calls of tools in it."""
    import time

    from lorafold import engine
    from lorafold.api.generate import prepared
    from lorafold.data.calls import parse_calls
    from lorafold.data.control_tokens import IN_PROMPT, is_marked
    from lorafold.data.messages import tools_of
    from lorafold.generation import stream

    asked = {**run.keywords}
    most, console, tools = asked.pop("max_new_tokens"), asked["console"], asked.get("tools")
    choice = engine.Sampling(temperature=asked.pop("temperature"), seed=asked.pop("seed"))
    ready = prepared(prompts=[asked.pop("prompts")], **asked)
    [text] = ready.texts
    if is_marked(text):
        console.print(IN_PROMPT, highlight=False, markup=False, soft_wrap=True)
    pieces: list[str] = []
    start = time.perf_counter()
    completion = stream(ready.model, ready.tokenizer, text, most, choice)
    while True:
        try:
            pieces.append(next(completion))
        except StopIteration as end:
            count = len(end.value.tokens) if end.value else 0
            break
        if not json:
            typer.echo(pieces[-1], nl=False)
    speed = count / (time.perf_counter() - start)
    result: dict[str, Any] = {"text": "".join(pieces), "tokens_per_second": speed}
    if tools:
        try:
            result["tool_calls"] = parse_calls(result["text"], ready.tokenizer, tools_of(tools))
        except LorafoldError as error:
            result["tool_calls"] = None
            console.print(str(error), highlight=False, markup=False)
    # without --json the text is on stdout already, and this ends its line
    emit(json, result, "")
    for call in result.get("tool_calls") or ():
        function = call["function"]
        told = f"calls {function['name']} {function['arguments']}"
        console.print(told, highlight=False, markup=False)
    console.print(f"{count} tokens, {speed:.1f} tokens/s", highlight=False)


def chat(run: Run, *, json: Json = False) -> None:
    """Talk in the terminal."""
    from lorafold.cli.chat import Session, piped, typed

    console = run.keywords["console"]
    with run() as talk:
        session = Session(talk, console)
        if talk.adapters:
            session.answering()
        session.run(typed(console) if sys.stdin.isatty() else piped())
    if json:
        emit(True, {"messages": talk.conversation(), "adapters": talk.active}, "")


def score(run: Run, *, json: Json = False) -> None:
    """Print the scores, unless they go to a file, and the figures."""
    found = run()
    if "out" not in run.keywords:
        for row in found.rows:
            typer.echo(row.as_json() if json else str(row))
    emit(json, found.as_json(), str(found))


def inspect(run: Run, *, json: Json = False) -> None:
    """Print the table to stderr, and the advice."""
    from lorafold.inspecting.report import table

    found = run()
    if not json:
        told = table(found)
        run.keywords["console"].print(told, highlight=False, markup=False, soft_wrap=True)
    emit(json, found.as_json(), str(found))


def estimate(run: Run, *, cheatsheet: bool = False, json: Json = False) -> None:
    """Print the estimate, or rules of thumb.

    Args:
        cheatsheet: Print common rules of thumb next to estimates, in Markdown, and stop.
    """
    if not cheatsheet:
        return plain(run, json=json)
    from lorafold.memory.cheatsheet import markdown

    typer.echo(markdown())


def on_cluster(run: Run, on: str, workers: int) -> None:
    """Print what a worker elsewhere printed."""
    from lorafold.cli.cluster import table

    typer.echo(table(on, workers, run.keywords.get("out")))


def intrinsic(run: Run, *, on: On = None, workers: Workers = 2, json: Json = False) -> None:
    """Search here, or on a cluster."""
    if on is not None:
        return on_cluster(run, on, workers)
    plain(run, json=json)


def compare(
    run: Run, *, on: On = None, workers: Workers = 2, wide: Wide = False, json: Json = False
) -> None:
    """Measure here, or on a cluster, and print the figures that decide or all."""
    if on is not None:
        return on_cluster(run, on, workers)
    from lorafold.comparing.report import deciding

    found = run()
    emit(json, found.as_json(), str(found) if wide else deciding(found.rows))


def fragility(
    run: Run,
    *,
    on: On = None,
    workers: Workers = 2,
    fail_under: float | None = None,
    wide: Wide = False,
    json: Json = False,
) -> None:
    """Measure here, or on a cluster, and judge a finished adapter.

    Args:
        fail_under: With `tuned`: exit with code 1 if less than this share is kept, such as 0.8.
    """
    if on is not None:
        return on_cluster(run, on, workers)
    if fail_under is not None and "tuned" not in run.keywords:
        raise LorafoldError("--fail-under: needs --tuned, the finished adapter that it judges")
    from lorafold.robustness.report import deciding, markdown

    found = run()
    told = f"{markdown(found) if wide else deciding(found)}\n\n{found}"
    emit(json, found.as_json(), told)
    if fail_under is not None and (failed := found.under(fail_under)):
        typer.echo(failed, err=True)
        raise typer.Exit(1)


def recipe(run: Run, *, json: Json = False) -> None:
    """Print the report to stderr, and the recipe unless it goes to a file."""
    translation, out = run()
    config = "recipe.yaml" if out is None else str(out)
    if not json:
        typer.echo(translation.report(config), err=True)
    text = translation.to_yaml(config).rstrip("\n") if out is None else f"recipe: {out}"
    emit(json, translation.as_json() | {"out": None if out is None else str(out)}, text)


def doctor(run: Run, *, json: Json = False) -> None:
    """Print the report; the exit code says whether something needed is broken."""
    report = run()
    emit(json, report.as_json(), str(report))
    if report.broken:
        raise typer.Exit(1)


def serve(run: Run) -> None:
    """Serve until it is stopped."""
    run()


def new_key(run: Run) -> None:
    """Print the key to stdout, and where its hash went to stderr."""
    key, told = run()
    typer.echo(key)
    typer.echo(told, err=True)


RUNNERS: dict[str, Callable[..., None]] = {
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "merge": summarized,
    "export": summarized,
    "serve new-key": new_key,
    "score": score,
    "inspect": inspect,
    "compare": compare,
    "intrinsic": intrinsic,
    "fragility": fragility,
    "estimate": estimate,
    "recipe": recipe,
    "doctor": doctor,
}
