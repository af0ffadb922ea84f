"""`lorafold intrinsic`: how few numbers does a task take?"""

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
from lorafold.errors import LorafoldError
from lorafold.step.reading import load_recipe


def command(
    out: Annotated[
        Path,
        typer.Option(help="Where the search is kept as it goes; the same command goes on from it."),
    ],
    model: ModelOption = "smollm2",
    data: Annotated[
        str | None, typer.Option(help="Training examples; without it the quickstart's task.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out examples; without it a tenth of the data.")
    ] = None,
    smallest: Annotated[int, typer.Option(min=1, help="The smallest dimension looked at.")] = 16,
    largest: Annotated[int, typer.Option(min=1, help="The largest.")] = 65536,
    share: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="How much of full training's gain counts as getting there."
        ),
    ] = 0.9,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A recipe in YAML for all runs; without rates in it each method has its own."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="One recipe field for all runs, as in --set steps=40."),
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Find the intrinsic dimension of a task: train in random subspaces of the weights until one
    does 90% of what full training does.

    Powers of 2 are bisected: some five runs besides the full one. All matrices move in one
    subspace, by Fastfood projections with a learned scale each (arXiv 2012.13255). A task of few
    dimensions is one that the base nearly knows: expect a small rank to do.
    """
    if smallest > largest:
        raise LorafoldError(f"--smallest {smallest}: expected at most --largest, {largest}")
    from dataclasses import asdict

    from lorafold.inspecting.intrinsic import search
    from lorafold.quickstart.story import RECIPE
    from lorafold.training.request import Request

    recipe = load_recipe(config, sets or (), defaults=None if data else RECIPE)
    rows, held_out, source = rows_or_quickstart(data, eval_data, recipe)
    console = messages()
    request = Request(model, out, recipe, rows, source, eval_rows=held_out, device=device)
    found = search(
        request,
        smallest,
        largest,
        share,
        lambda p: console.print(
            f"dimension {p.dimension}: loss {p.loss:.4f}, {p.reached:.1%} of full training's gain",
            highlight=False,
        ),
    )
    says = (
        f"more than {found.points[-1].dimension}"
        if found.dimension is None
        else f"{found.dimension}, to a factor of 2"
    )
    text = (
        f"held-out loss: {found.base_loss:.4f} before, {found.full_loss:.4f} after full"
        f" training\nintrinsic dimension: {says}"
    )
    emit(json, asdict(found), text)
