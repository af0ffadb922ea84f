"""`lorafold compare`: every method on your model and data."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    DeviceOption,
    HeldOutOption,
    JsonOption,
    ModelOption,
    OptionalDataOption,
    emit,
    messages,
)
from lorafold.cli.groups import grouped
from lorafold.cli.recipe_options import RecipeFlags, of_recipe
from lorafold.step.recipe import Recipe


@of_recipe(Recipe.model_fields.keys() - {"method", "seed"})
class Flags(RecipeFlags):
    """The recipe of all runs."""


@grouped
def command(
    out: Annotated[
        Path,
        typer.Option(
            help="The directory for rows as they finish. The same command goes on from them."
        ),
    ],
    flags: Flags,
    model: ModelOption = "smollm2",
    data: OptionalDataOption = None,
    eval_data: HeldOutOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="The methods, as in lora,dora. Without it all that are for the objective.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="The number of seeds of each method.")] = 1,
    html: Annotated[
        Path | None, typer.Option(help="Also write the table with plots as one HTML file.")
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train every method on the same data with the same budget, and measure what the choice between
    them depends on.

    Trainable parameters, adapter bytes, tokens/s, peak memory, held-out loss and exact match,
    forgetting outside the task, latency attached and merged over the base's, whether it merges
    (proved by folding), whether it adds modules. Texts with labels are compared with --objective
    classify. Unless the recipe sets a learning rate, each method has its own.
    """
    from lorafold.api.compare import compare
    from lorafold.comparing.report import page, table
    from lorafold.quickstart.story import RECIPE

    console = messages()
    found = compare(
        out,
        model=model,
        data=data,
        eval_data=eval_data,
        methods=methods.split(",") if methods else (),
        seeds=seeds,
        recipe=flags.recipe(None if data else RECIPE),
        device=device,
        console=console,
    )
    if html:
        page(found.rows, f"Methods on {model}, {found.source}", html)
    if not json:
        console.print(table(found.rows))
    emit(json, found.as_json(), str(found))
