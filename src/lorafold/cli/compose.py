"""`lorafold compose`: one adapter from many, and what they do to each other."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import JsonOption, Opening, Output, SeedOption, emit, messages
from lorafold.cli.groups import grouped

EPILOG = """Ways to compose. linear: the weighted average, exact. task-arithmetic: the weighted sum,
exact; a negative weight takes a task away. svd: the average, cut to the largest rank. ties: keep
each matrix's largest fifth, elect signs, and take the mean of those that agree. dare, dare-ties:
drop a random half and rescale the rest, then average, or elect. magnitude: keep the largest fifth
and average. lorahub: search for the weights on examples, without gradients. mixture: frozen
adapters under gates that are trained (--gates global, layer or token).

All but mixture give one LoRA. linear and task-arithmetic concatenate the factors, so their rank is
the sum of the adapters' ranks, and --rank cuts it. The others make dense updates, which an SVD
brings back to a rank: the result says how much of the update was lost."""


class Gates(StrEnum):
    """What a mixture's gates depend on."""

    shared = "global"  # a keyword in Python
    layer = "layer"
    token = "token"


@grouped
def command(
    adapter: Annotated[
        list[Path],
        typer.Option(
            help=(
                "A saved adapter of additive updates (LoRA, VeRA, LoHa ...). Repeat the option for"
                " each."
            )
        ),
    ],
    output: Output,
    opening: Opening,
    how: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "The way to compose, from the list below. Repeat the option to compare several,"
                " each in OUT/WAY.  [default: linear]"
            )
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One weight for each adapter, in order. Without it the way's own."),
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
            help="A mixture has one gate an adapter (global), one a layer, or a router a token."
        ),
    ] = Gates.shared,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Rows of a task to measure on. Repeat the option for each task."),
    ] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            help=(
                "Rows that lorahub and mixture learn from, a file for each task. Without it half"
                " of the rows of each --data."
            )
        ),
    ] = None,
    evaluations: Annotated[
        int, typer.Option(min=1, help="How often lorahub measures a choice of weights.")
    ] = 40,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the recipe that a mixture's gates are trained by, as in steps=40.",
        ),
    ] = None,
    answers: Annotated[
        bool, typer.Option(help="Generate completions for the exact match, or measure loss alone.")
    ] = True,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Make one adapter from several, in the space of their weight updates, and measure what they do
    to each other.

    Ranks, target modules and methods may differ. With --data the base, each adapter alone and each
    composition are evaluated on every task, and the geometry of the updates (cosine, shared
    subspaces, sign conflict) says where the tasks collide.
    """
    from lorafold.api.compose import compose
    from lorafold.composing.mixture import RECIPE
    from lorafold.step.reading import load_recipe

    result = compose(
        adapter,
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
        completions=answers,
        seed=seed,
        overwrite=output.overwrite,
        console=messages(),
        **opening.how,
    )
    emit(json, result.as_json(), str(result))
