"""Command runners, for commands that do more than call their function and print the result.

A runner gets the function as a partial with all arguments; its keywords are further options of the
command.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafold.api.options import Option
from lorafold.cli.commands import Json, emit, plain
from lorafold.errors import LorafoldError
from lorafold.files.terminal import print_lines

Run = partial[Any]
CLUSTER = "Cluster"
On = Annotated[
    str | None,
    Option(
        "Run this command on a Ray cluster that is already running (RAY_ADDRESS).",
        panel=CLUSTER,
        rare=True,
        metavar="ray",
    ),
]
Workers = Annotated[
    int,
    Option(
        "The number of workers that --on starts; they share the work in --out.",
        panel=CLUSTER,
        rare=True,
        min=1,
    ),
]
Wide = Annotated[bool, Option("Print all figures as a Markdown table of any width.", rare=True)]


def summarized(run: Run, *, json: Json = False) -> None:
    result = run()
    emit(json, result.as_json(), result.summary())


def train(
    run: Run,
    *,
    preview: bool = False,
    html: Annotated[Path | None, Option(rare=True)] = None,
    json: Json = False,
) -> None:
    """Train, or preview the rows of a run.

    Args:
        preview: Print the first rows as the model will see them, including tools and turns,
            highlight the tokens that count in the loss, report on all rows, and exit.
        html: With `preview`: also write the rows to one HTML file.
    """
    from lorafold.api import train as verbs

    if not preview:
        if html is not None:
            raise LorafoldError("--html: requires --preview, whose rows it writes")
        result = run()
        from lorafold.cli.other_commands import after_training

        asked = run.keywords
        lines = [str(result), *after_training(result, asked["recipe"], asked.get("over", ()))]
        return emit(json, result.as_json(), "\n".join(lines))
    if "plot" in run.keywords:
        raise LorafoldError("--plot: can't be combined with --preview, which trains nothing")
    of_runs = {"out", "resume", "overwrite"}
    shared = {name: value for name, value in run.keywords.items() if name not in of_runs}
    findings = verbs.preview(**shared, html=html)
    if json:
        emit(json, {"data": findings.as_json()}, "")


def generate(run: Run, *, json: Json = False) -> None:
    from time import perf_counter

    from lorafold import engine
    from lorafold.api.generate import prepare_prompts
    from lorafold.data.calls import parse_calls
    from lorafold.data.control_tokens import IN_PROMPT, is_marked
    from lorafold.data.messages import tools_of
    from lorafold.generation import stream

    asked = {**run.keywords}
    most, console, tools = asked.pop("max_new_tokens"), asked["console"], asked.get("tools")
    choice = engine.Sampling(temperature=asked.pop("temperature"), seed=asked.pop("seed"))
    ready = prepare_prompts(asked.pop("model", None), [asked.pop("prompts")], **asked)
    [text] = ready.texts
    if is_marked(text):
        print_lines(console, IN_PROMPT)
    pieces = []
    start = perf_counter()
    completion = stream(ready.model, ready.tokenizer, text, most, choice)
    while True:
        try:
            pieces.append(next(completion))
        except StopIteration as end:
            count = len(end.value.tokens) if end.value else 0
            break
        if not json:
            typer.echo(pieces[-1], nl=False)
    speed = count / (perf_counter() - start)
    result: dict[str, Any] = {"text": "".join(pieces), "tokens_per_second": speed}
    if tools:
        try:
            result["tool_calls"] = parse_calls(result["text"], ready.tokenizer, tools_of(tools))
        except LorafoldError as error:
            result["tool_calls"] = None
            print_lines(console, str(error))
    # without --json the text is already on stdout, and this only ends the line
    emit(json, result, "")
    for call in result.get("tool_calls") or ():
        function = call["function"]
        print_lines(console, f"function call: {function['name']} {function['arguments']}")
    print_lines(console, f"{count} tokens, {speed:.1f} tokens/s")


def chat(run: Run, *, json: Json = False) -> None:
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
    scored = run()
    if "out" not in run.keywords:
        for row in scored.rows:
            typer.echo(row.as_json() if json else str(row))
    emit(json, scored.as_json(), str(scored))


def inspect(run: Run, *, json: Json = False) -> None:
    from lorafold.inspecting.report import table

    found = run()
    if not json:
        print_lines(run.keywords["console"], table(found))
    emit(json, found.as_json(), str(found))


def estimate(run: Run, *, cheatsheet: bool = False, json: Json = False) -> None:
    """Print the estimate, or rules of thumb.

    Args:
        cheatsheet: Print common rules of thumb next to estimates, in Markdown, and exit.
    """
    if not cheatsheet:
        return plain(run, json=json)
    from lorafold.memory.cheatsheet import markdown

    typer.echo(markdown())


def on_cluster(run: Run, on: str, workers: int) -> None:
    from lorafold.cli.cluster import table

    typer.echo(table(on, workers, run.keywords.get("out")))


def intrinsic(run: Run, *, on: On = None, workers: Workers = 2, json: Json = False) -> None:
    if on is not None:
        return on_cluster(run, on, workers)
    plain(run, json=json)


def compare(
    run: Run, *, on: On = None, workers: Workers = 2, wide: Wide = False, json: Json = False
) -> None:
    if on is not None:
        return on_cluster(run, on, workers)
    from lorafold.comparing.report import short_report

    found = run()
    emit(json, found.as_json(), str(found) if wide else short_report(found.rows))


def fragility(
    run: Run,
    *,
    on: On = None,
    workers: Workers = 2,
    fail_under: float | None = None,
    wide: Wide = False,
    json: Json = False,
) -> None:
    """Measure on this machine, or on a cluster, and judge a finished adapter.

    Args:
        fail_under: With `tuned`: exit with code 1 if less than this share is kept, for example 0.8.
    """
    if on is not None:
        return on_cluster(run, on, workers)
    if fail_under is not None and "tuned" not in run.keywords:
        raise LorafoldError("--fail-under: requires --tuned, the finished adapter to check")
    from lorafold.fragility_study.report import markdown, short_report

    found = run()
    emit(json, found.as_json(), f"{markdown(found) if wide else short_report(found)}\n\n{found}")
    if fail_under is not None and (failed := found.under(fail_under)):
        typer.echo(failed, err=True)
        raise typer.Exit(1)


def recipe(run: Run, *, json: Json = False) -> None:
    translation, out = run()
    config = "recipe.yaml" if out is None else str(out)
    if not json:
        typer.echo(translation.report(config), err=True)
    text = translation.to_yaml(config).rstrip("\n") if out is None else f"recipe: {out}"
    emit(json, translation.as_json() | {"out": None if out is None else str(out)}, text)


def doctor(run: Run, *, json: Json = False) -> None:
    report = run()
    emit(json, report.as_json(), str(report))
    if report.broken:
        raise typer.Exit(1)


def serve(run: Run) -> None:
    run()


def new_key(run: Run) -> None:
    key, message = run()
    typer.echo(key)
    typer.echo(message, err=True)


OWN = (train, generate, chat, serve, score, inspect, compare, intrinsic, fragility, estimate)
RUNNERS: dict[str, Callable[..., None]] = {
    **{runner.__name__: runner for runner in (*OWN, recipe, doctor)},
    **dict.fromkeys(("merge", "export"), summarized),
    "serve new-key": new_key,
}
