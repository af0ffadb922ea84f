"""`lorafold intrinsic`: the intrinsic dimension of a task."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    ColumnsOption,
    DeviceOption,
    HeldOutOption,
    JsonOption,
    ModelOption,
    OptionalDataOption,
    columns_of,
    emit,
    messages,
)
from lorafold.cli.groups import grouped
from lorafold.cli.recipe_options import RecipeFlags, of_recipe
from lorafold.errors import LorafoldError
from lorafold.recipe.recipe import Recipe


@of_recipe(Recipe.model_fields.keys() - {"method"})
class Flags(RecipeFlags):
    """The recipe of all runs."""


@grouped
def command(
    out: Annotated[
        Path,
        typer.Option(
            help="The directory of the search. The same command continues it after a stop."
        ),
    ],
    flags: Flags,
    model: ModelOption = "smollm2",
    data: OptionalDataOption = None,
    eval_data: HeldOutOption = None,
    columns: ColumnsOption = None,
    smallest: Annotated[int, typer.Option(min=1, help="The smallest dimension to try.")] = 16,
    largest: Annotated[int, typer.Option(min=1, help="The largest dimension to try.")] = 65536,
    share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="The share of the improvement of full training that a dimension must reach.",
        ),
    ] = 0.9,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Find the intrinsic dimension of a task: the dimension of the smallest random subspace of the
    weights in which training reaches 90% of the improvement of full training.

    The search bisects powers of 2, which takes about five runs besides the full one. All matrices
    are trained in one subspace, by Fastfood projections with a learned scale each (arXiv
    2012.13255). A low dimension means that the base nearly has the task already, so that an adapter
    of small rank is enough.
    """
    if smallest > largest:
        raise LorafoldError(f"--smallest: found {smallest}, expected at most --largest {largest}")
    from dataclasses import asdict

    from lorafold.api.task import train_and_test
    from lorafold.inspecting.intrinsic import search
    from lorafold.quickstart.story import RECIPE
    from lorafold.training.request import Request

    recipe = flags.recipe(None if data else RECIPE)
    console = messages()
    rows, held_out, source = train_and_test(
        data, eval_data, recipe, columns_of(columns), console
    )
    request = Request(model, out, recipe, rows, source, eval_rows=held_out, device=device)
    found = search(
        request,
        smallest,
        largest,
        share,
        lambda p: console.print(
            f"dimension {p.dimension}: loss {p.loss:.4f}, {p.reached:.1%} of the improvement of"
            " full training",
            highlight=False,
        ),
    )
    dimension = (
        f"more than {found.points[-1].dimension}"
        if found.dimension is None
        else f"{found.dimension}, to a factor of 2"
    )
    text = (
        f"held-out loss: {found.base_loss:.4f} before, {found.full_loss:.4f} after full"
        f" training\nintrinsic dimension: {dimension}"
    )
    emit(json, asdict(found), text)
