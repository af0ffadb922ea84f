"""`lorafold compare`: every method on your model and data."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    DeviceOption,
    JsonOption,
    ModelOption,
    emit,
    messages,
    rows_or_quickstart,
)
from lorafold.step.reading import load_recipe


def command(
    out: Annotated[
        Path,
        typer.Option(
            help="Where rows are kept as they finish; the same command goes on from them."
        ),
    ],
    model: ModelOption = "smollm2",
    data: Annotated[
        str | None, typer.Option(help="Training examples; without it the quickstart's task.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out examples; without it a tenth of the data.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Comma-separated, as in lora,dora; by default all for the objective."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of each method.")] = 1,
    config: Annotated[
        Path | None,
        typer.Option(help="A recipe in YAML for all; without rates in it each method has its own."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="One recipe field for all methods, as in --set steps=40."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write a self-contained page with plots.")
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train every method on the same data with the same budget, and measure what the choice between
    them turns on.

    Trainable parameters, adapter bytes, tokens/s, peak memory, held-out loss and exact match,
    forgetting outside the task, latency over the base's attached and merged, whether it merges
    (proved by folding), whether it adds modules. Texts with labels are compared with --set
    objective=classify.
    """
    from dataclasses import asdict

    from lorafold.comparing.measure import Task
    from lorafold.comparing.report import markdown, page, table
    from lorafold.comparing.run import compare, known_methods, methods_for
    from lorafold.quickstart.story import RECIPE
    from lorafold.step.fitting import without

    recipe = load_recipe(config, sets or (), defaults=None if data else RECIPE)
    rows, held_out, source = rows_or_quickstart(data, eval_data, recipe)
    task, console = Task(model, rows, held_out, source, recipe, device), messages()
    names = known_methods(methods.split(",")) if methods else methods_for(recipe.objective)
    for name in names:
        if notice := without(recipe.model_copy(update={"method": name})):
            console.print(notice, highlight=False)
    found = compare(
        task,
        list(names),
        range(seeds),
        out,
        lambda row, done, total: console.print(
            f"{done}/{total} {row.method}: loss {row.loss:.4f}, {row.train_seconds:.0f} s of"
            " training",
            highlight=False,
        ),
    )
    (out / "table.md").write_text(markdown(found), encoding="utf-8")
    if html:
        page(found, f"Methods on {model}, {source}", html)
    if not json:
        console.print(table(found))
    emit(json, {"rows": [asdict(row) for row in found]}, markdown(found))
