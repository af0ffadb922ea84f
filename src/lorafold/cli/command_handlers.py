"""Command runners, for commands that do more than call their function and print the result.

A runner gets the function as a partial with all arguments. The runner's keyword arguments are
further options of the command.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafold.api.options import Option
from lorafold.cli.commands import Json, emit, print_result
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


def print_summary(run: Run, *, json: Json = False) -> None:
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

    rows, out = ", ".join(map(str, run.keywords["data"])), run.keywords["out"]
    where = "" if preview else f"; the adapter will be in {out}"
    typer.echo(f"lorafold {version('lorafold')}: reading {rows}{where}", err=True)
    if not preview:
        if html is not None:
            raise LorafoldError("--html: requires --preview, whose rows it writes")
        result = run()
        from lorafold.cli.cli_only import after_training

        keywords = run.keywords
        lines = [str(result), *after_training(result, keywords["recipe"], keywords.get("over", ()))]
        return emit(json, result.as_json(), "\n".join(lines))
    if "plot" in run.keywords:
        raise LorafoldError("--plot: can't be combined with --preview, which trains nothing")
    run_only = {"out", "resume", "overwrite", "verbose"}
    shared = {name: value for name, value in run.keywords.items() if name not in run_only}
    findings = verbs.preview(**shared, html=html)
    if json:
        emit(json, {"data": findings.as_json()}, "")


def generate(run: Run, *, json: Json = False) -> None:
    from time import perf_counter

    from lorafold import engine
    from lorafold.api.generate import prepare_prompts
    from lorafold.data.control_tokens import PROMPT_REMARK, is_marked
    from lorafold.data.messages import openai_tools
    from lorafold.data.tool_calls import parse_calls
    from lorafold.generation import stream

    keywords = {**run.keywords}
    limit, console = keywords.pop("max_new_tokens"), keywords["console"]
    sampling = engine.Sampling(temperature=keywords.pop("temperature"), seed=keywords.pop("seed"))
    rendered = prepare_prompts(keywords.pop("model", None), [keywords.pop("prompts")], **keywords)
    [text] = rendered.texts
    if is_marked(text):
        print_lines(console, PROMPT_REMARK)
    pieces = []
    start = perf_counter()
    completion = stream(rendered.model, rendered.tokenizer, text, limit, sampling)
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
    if tools := keywords.get("tools"):
        try:
            calls = parse_calls(result["text"], rendered.tokenizer, openai_tools(tools))
            result["tool_calls"] = calls
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
    from lorafold.cli.chat import Session, read_piped, read_typed

    console = run.keywords["console"]
    with run() as opened:
        session = Session(opened, console)
        if opened.adapters:
            session.answering()
        session.run(read_typed(console) if sys.stdin.isatty() else read_piped())
    if json:
        emit(True, {"messages": opened.conversation(), "adapters": opened.active}, "")


def score(run: Run, *, json: Json = False) -> None:
    scored = run()
    if "out" not in run.keywords:
        for row in scored.rows:
            typer.echo(row.as_json() if json else str(row))
    emit(json, scored.as_json(), str(scored))


def inspect(run: Run, *, json: Json = False) -> None:
    from lorafold.inspecting.report import table

    inspection = run()
    if not json:
        print_lines(run.keywords["console"], table(inspection))
    emit(json, inspection.as_json(), str(inspection))


def estimate(run: Run, *, cheatsheet: bool = False, json: Json = False) -> None:
    """Print the estimate, or rules of thumb.

    Args:
        cheatsheet: Print common rules of thumb next to estimates, in Markdown, and exit.
    """
    if not cheatsheet:
        return print_result(run, json=json)
    from lorafold.memory.cheatsheet import markdown

    typer.echo(markdown())


def on_cluster(run: Run, on: str, workers: int) -> None:
    from lorafold.cli.cluster import run_and_collect

    typer.echo(run_and_collect(on, workers, run.keywords.get("out")))


def intrinsic(run: Run, *, on: On = None, workers: Workers = 2, json: Json = False) -> None:
    if on is not None:
        return on_cluster(run, on, workers)
    print_result(run, json=json)


def compare(
    run: Run, *, on: On = None, workers: Workers = 2, wide: Wide = False, json: Json = False
) -> None:
    if on is not None:
        return on_cluster(run, on, workers)
    from lorafold.comparing.report import short_report

    comparison = run()
    emit(json, comparison.as_json(), str(comparison) if wide else short_report(comparison.rows))


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
        fail_under: With `tuned`: exit with code 1 if less than this share of the alignment's effect
            is kept, for example 0.8.
    """
    if on is not None:
        return on_cluster(run, on, workers)
    if fail_under is not None and "tuned" not in run.keywords:
        raise LorafoldError("--fail-under: requires --tuned, the finished adapter to check")
    from lorafold.fragility_study.report import markdown, short_report

    study = run()
    emit(json, study.as_json(), f"{markdown(study) if wide else short_report(study)}\n\n{study}")
    if fail_under is not None and (failed := study.under(fail_under)):
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


HANDLERS = (train, generate, chat, serve, score, inspect, compare, intrinsic, fragility, estimate)
RUNNERS: dict[str, Callable[..., None]] = {
    **{runner.__name__: runner for runner in (*HANDLERS, recipe, doctor)},
    **dict.fromkeys(("merge", "export"), print_summary),
    "serve new-key": new_key,
}
