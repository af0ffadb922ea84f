"""`lorafold intrinsic`: the intrinsic dimension of a task."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.alone import ComputingAlone
from lorafold.cli.cluster import Cluster
from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import HeldOutOption, JsonOption, OptionalDataOption, emit, messages
from lorafold.cli.groups import grouped
from lorafold.cli.recipe_options import RecipeFlags, of_recipe
from lorafold.recipe.recipe import Recipe

EXAMPLES = (
    "lorafold intrinsic --out search",
    "lorafold intrinsic --out mine --data demo/train.jsonl --steps 50",
    "lorafold intrinsic --out narrow --smallest 64 --largest 4096",
)


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
    cluster: Cluster,
    computing: ComputingAlone,
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
    json: JsonOption = False,
) -> None:
    """Find the intrinsic dimension of a task: the dimension of the smallest random subspace of the
    weights in which training reaches 90% of the improvement of full training.

    The search bisects powers of 2, which takes about five runs besides the full one. All matrices
    are trained in one subspace, by Fastfood projections with a learned scale each (arXiv
    2012.13255). A low dimension means that the base nearly has the task already, so that an adapter
    of small rank is enough.
    """
    if (table := cluster.table(out)) is not None:
        return typer.echo(table)
    from lorafold.api.intrinsic import intrinsic
    from lorafold.quickstart.story import RECIPE

    found = intrinsic(
        out,
        model=computing.model,
        data=data,
        eval_data=eval_data,
        columns=columns_of(columns),
        smallest=smallest,
        largest=largest,
        share=share,
        recipe=flags.recipe(None if data else RECIPE),
        console=messages(),
        **computing.how,
    )
    emit(json, found.as_json(), str(found))
