"""`lorafold compose`: one adapter from several, and the interference between their tasks."""

from enum import StrEnum
from typing import Annotated

import typer

from lorafold.cli.common import Adapters, JsonOption, Opening, Output, SeedOption, emit, messages
from lorafold.cli.groups import grouped

EPILOG = """Ways to compose. linear: the weighted average, exact. task-arithmetic: the weighted sum,
exact; a negative weight removes a task. svd: the average, cut to the largest rank. ties: keep the
largest fifth of each matrix, elect a sign for each entry, and average the entries that have it.
dare, dare-ties: drop a random half of the entries and rescale the others, then average as linear or
as ties. magnitude: keep the largest fifth and average. lorahub: search for the weights on examples,
without gradients. mixture: keep the adapters and train gates for them (--gates global, layer or
token).

All ways but mixture give one LoRA. linear and task-arithmetic concatenate the factors, so the rank
is the sum of the adapters' ranks unless --rank cuts it. The others compute dense updates, of which
an SVD keeps a rank; the result states how much of the update was lost."""
EXAMPLES = (
    "lorafold compose demo/adapter adapter --storage fp32 --out sum",
    "lorafold compose demo/adapter adapter --storage fp32 --how svd --out cut",
    "lorafold compose demo/adapter adapter --storage fp32 --data demo/test.jsonl \\\n"
    "    --how linear --how ties --out ways",
)


class Gates(StrEnum):
    """What a mixture's gates depend on."""

    shared = "global"  # a keyword in Python
    layer = "layer"
    token = "token"


@grouped
def command(
    adapters: Adapters,
    output: Output,
    opening: Opening,
    how: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "The way to compose, from the list below; several are compared, each in"
                " OUT/WAY.  [default: linear]"
            )
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help=(
                "The weight of an adapter, for each of them in order. Without it the way's"
                " default."
            )
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cut every module's update to this rank."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="The share of the entries that ties, dare and magnitude keep."),
    ] = None,
    gates: Annotated[
        Gates,
        typer.Option(
            help=(
                "The gates of a mixture: one for each adapter (global), for each adapter and layer"
                " (layer), or computed from each token (token)."
            )
        ),
    ] = Gates.shared,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Rows of a task to measure on, for each task."),
    ] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Rows that lorahub and mixture learn from, for each task."
                " Without it half of the rows of each --data."
            )
        ),
    ] = None,
    evaluations: Annotated[
        int, typer.Option(min=1, help="How many choices of weights lorahub measures.")
    ] = 40,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the recipe by which a mixture's gates are trained, as in steps=40.",
        ),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option(help="Generate completions for the exact match, or measure only the loss."),
    ] = True,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Make one adapter from the weight updates of several, and measure the interference between
    their tasks.

    Ranks, target modules and methods may differ. With --data the base, each adapter alone and each
    composition are evaluated on every task. The geometry of the updates (cosine, shared subspaces,
    sign conflict) shows where they oppose each other.
    """
    from lorafold.api.compose import compose
    from lorafold.composing.ways import RECIPE
    from lorafold.recipe.reading import load_recipe

    result = compose(
        adapters.some,
        output.out,
        model=opening.model,
        how=how or "linear",
        weights=weight or (),
        rank=rank,
        density=density,
        gates=gates.value,
        data=data or (),
        examples=examples or (),
        recipe=load_recipe(None, sets or (), defaults=RECIPE),
        evaluations=evaluations,
        completions=completions,
        seed=seed,
        overwrite=output.overwrite,
        console=messages(),
        **opening.how,
    )
    emit(json, result.as_json(), str(result))
