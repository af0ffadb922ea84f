"""`lf.compose`: one adapter from several, and the interference between their tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from lorafold.api import options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.composing.run import Composition
    from lorafold.data.sources import Row
    from lorafold.recipe.recipe import Recipe


def _of_gates(_: Any) -> "Recipe":
    from lorafold.composing.methods import RECIPE

    return RECIPE


@dataclass(frozen=True)
class Learning:
    """How lorahub finds weights, and a mixture its gates.

    Args:
        gates: The gates of a mixture: one for each adapter (global), for each adapter and layer
            (layer), or computed from each token (token).
        examples: Rows that lorahub and mixture learn from, for each task. Default: half of the rows
            of each `data`.
        evaluations: How many choices of weights lorahub measures.
        recipe: The recipe by which a mixture's gates are trained.
    """

    gates: Literal["global", "layer", "token"] = "global"
    examples: Annotated[opt.Tasks, opt.Option(kind=list[str])] = ()
    evaluations: Annotated[int, opt.Option(min=1)] = 40
    recipe: Annotated[
        "Recipe | None",
        opt.RecipeOptions(
            names=(),
            config=False,
            sets="A field of the recipe by which a mixture's gates are trained, as in steps=40.",
            defaults=_of_gates,
        ),
    ] = None


@opt.verb
def compose(
    adapters: opt.SomeAdapters,
    out: opt.Out,
    *,
    model: opt.Model = None,
    how: str | Sequence[str] = "linear",
    weights: Annotated[Sequence[float], opt.Option(flag="--weight")] = (),
    rank: Annotated[int | None, opt.Option(min=1)] = None,
    density: float | None = None,
    learning: Learning = Learning(),
    data: Annotated[opt.Tasks, opt.Option(kind=list[str])] = (),
    completions: opt.Completions = True,
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    console: opt.Progress = None,
    **opening: Unpack[opt.Opening],
) -> "Composition":
    """Make one adapter from the weight updates of several, and measure the interference between
    their tasks.

    Ranks, target modules and methods may differ. With `data` the base, each adapter alone and each
    composition are evaluated on every task. The geometry of the updates (cosine, shared subspaces,
    sign conflict) shows where they oppose each other.

    Args:
        how: The way to compose, from the list below; several are compared, each in OUT/WAY.
        weights: The weight of an adapter, for each of them in order. Default: the way's.
        rank: Cut every module's update to this rank.
        density: The share of the entries that ties, dare and magnitude keep.
        learning: How weights and gates are learned.
        data: Rows of a task to measure on, for each task.

    Raises LorafoldError, with nothing written, for everything that is wrong with the arguments, an
    adapter or rows.

    Examples:
        lorafold compose demo/adapter adapter --storage fp32 --out sum
        lorafold compose demo/adapter adapter --storage fp32 --how svd --out cut
        lorafold compose demo/adapter adapter --storage fp32 --data demo/test.jsonl \\
            --how linear --how ties --out ways

    Notes:
        Ways to compose. linear: the weighted average, exact. task-arithmetic: the weighted sum,
        exact; a negative weight removes a task. svd: the average, cut to the largest rank. ties:
        keep the largest fifth of each matrix, elect a sign for each entry, and average the entries
        that have it. dare, dare-ties: drop a random half of the entries and rescale the others,
        then average as linear or as ties. magnitude: keep the largest fifth and average. lorahub:
        search for the weights on examples, without gradients. mixture: keep the adapters and train
        gates for them (--gates global, layer or token).

        All ways but mixture give one LoRA. linear and task-arithmetic concatenate the factors, so
        the rank is the sum of the adapters' ranks unless `rank` cuts it. The others compute dense
        updates, of which an SVD keeps a rank; the result states how much of the update was lost.
    """
    from functools import partial

    from lorafold.api.arguments import as_path, as_paths, as_recipe, or_quiet
    from lorafold.api.loaded_model import opened
    from lorafold.composing import run
    from lorafold.composing.methods import RECIPE
    from lorafold.composing.request import ComposeRequest
    from lorafold.peft.saved import open_all
    from lorafold.recipe.fitting import settled_length
    from lorafold.resolve import base_for

    saved, console = open_all(as_paths(adapters)), or_quiet(console)
    base = base_for(model, saved, console, **opening)
    before = sum(one.spec.positions for one in saved)
    recipe = settled_length(as_recipe(learning.recipe, RECIPE), base, before, console)
    request = ComposeRequest(
        base,
        saved,
        (how,) if isinstance(how, str) else tuple(how),
        as_path(out),
        weights=tuple(weights),
        rank=rank,
        density=density,
        seed=seed,
        tasks=by_name(data, console),
        examples=by_name(learning.examples, console),
        recipe=recipe,
        gates=learning.gates,
        evaluations=learning.evaluations,
        completions=completions,
        overwrite=overwrite,
    )
    return run.compose(request, partial(opened, base, saved, console=console), console)


def by_name(tasks: opt.Tasks, console: "Console") -> dict[str, Sequence["Row"]]:
    """Rows by the name of their task; that of a file is the last part of its path. The console is
    told which keys of the rows are ignored.
    """
    from collections.abc import Mapping

    from lorafold.api.arguments import as_rows
    from lorafold.composing.updates import names

    if not isinstance(tasks, Mapping):
        sources = [str(source) for source in tasks]
        tasks = dict(zip(names(sources), sources, strict=True))
    return {name: as_rows(rows, None, console) for name, rows in tasks.items()}
