"""`lf.compose`: combine adapters into one, and measure the interference between their tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

from lorafold.api import options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.composing.run import Composition
    from lorafold.data.json_input import Row
    from lorafold.data.row_sources import Reading
    from lorafold.recipe.recipe import Recipe


@dataclass(frozen=True)
class Learning:
    """Options for lorahub's search for weights, and for training a mixture's gates.

    Args:
        gates: The gates of a mixture: one per adapter (global), one per adapter and layer (layer),
            or computed from each token (token).
        examples: Rows of one task, from which lorahub and mixture learn; repeat the option for each
            task. Default: half of the rows of each `data`. In Python, a mapping or list as for
            `data`.
        evaluations: The number of combinations of weights that lorahub tries.
        recipe: The recipe for training a mixture's gates.
    """

    gates: Literal["global", "layer", "token"] = "global"
    examples: Annotated[opt.Tasks, opt.Option(kind=list[str])] = ()
    evaluations: opt.Count = 40
    recipe: Annotated[
        "Recipe | None",
        opt.RecipeOptions(
            names=(),
            config=False,
            sets="A field of the recipe for training a mixture's gates, for example steps=40.",
            default="lorafold.composing.methods:RECIPE",
        ),
    ] = None


@opt.verb
def compose(
    adapters: Annotated[opt.Paths, opt.Option(saved="some")],
    out: opt.Out,
    *,
    model: opt.Model = None,
    how: str | Sequence[str] = "linear",
    weights: Annotated[Sequence[float], opt.Option(flag="--weight")] = (),
    rank: opt.OptionalCount = None,
    density: float | None = None,
    learning: Learning = Learning(),
    data: Annotated[opt.Tasks, opt.Option(kind=list[str])] = (),
    completions: opt.Completions = True,
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    console: opt.Progress = None,
    **base_options: Unpack[opt.RowsOptions],
) -> "Composition":
    """Combine several adapters into one, and measure the interference between their tasks.

    Adapters may differ in rank, target modules and method. With `data`, the base model, each
    adapter and each composition are evaluated on every task. The geometry of the updates (cosine
    similarity, shared subspaces, sign conflicts) shows which of them oppose each other.

    Args:
        adapters: The saved adapters to combine, in PEFT format.
        how: A composing method, from the list below. Repeat it to compare several; each gets a
            subdirectory of OUT. In Python, a name or a list of names.
        weights: The weight of an adapter; repeat it for each adapter, in order. Default: the
            composing method's. In Python, a list of numbers.
        rank: Truncate the update of each module to this rank.
        density: The share of entries that ties, dare, dare-ties and magnitude keep.
        learning: Options for learning weights and gates.
        data: Rows of a task to evaluate on; repeat it for each task. In Python, a mapping from
            names of tasks to rows, or a list of files.

    Raises LorafoldError, with nothing written, for invalid arguments, adapters or rows.

    Examples:
        lorafold lab compose demo/adapter adapter --quantization fp32 --out sum
        lorafold lab compose demo/adapter adapter --quantization fp32 \\
            --how svd --out cut
        lorafold lab compose demo/adapter adapter --quantization fp32 \\
            --data demo/test.jsonl --how linear --how ties --out ways

    Notes:
        Composing methods. linear: the weighted average, exact. task-arithmetic: the weighted sum,
        exact; a negative weight removes a task. svd: the average, truncated to the largest rank.
        ties: keep the largest fifth of each matrix, elect a sign for each entry, and average the
        entries that agree. dare, dare-ties: drop a random half of the entries and rescale the rest,
        then average as linear or ties do. magnitude: keep the largest fifth and average. lorahub:
        search for weights on examples, without gradients. mixture: keep the adapters and train
        gates for them.

        Every method but mixture writes one LoRA adapter. linear, task-arithmetic and lorahub
        concatenate the factors, so the ranks add up unless `rank` truncates the result. The others
        truncate the updates by SVD and report how much was lost.
    """
    from functools import partial

    from lorafold.api.arguments import as_path, as_reading, as_recipe, console_or_quiet
    from lorafold.api.model_arguments import load_with_adapters, resolve_base
    from lorafold.composing import run
    from lorafold.composing.methods import RECIPE
    from lorafold.composing.request import ComposeRequest
    from lorafold.recipe.resolve_settings import resolve_length

    console = console_or_quiet(console)
    reading = as_reading(base_options)
    base, saved = resolve_base(model, adapters, console, **base_options)
    num_virtual = sum(one.spec.positions for one in saved)
    request = ComposeRequest(
        base,
        saved,
        (how,) if isinstance(how, str) else tuple(how),
        as_path(out),
        weights=tuple(weights),
        rank=rank,
        density=density,
        seed=seed,
        tasks=rows_by_task(data, reading, console),
        examples=rows_by_task(learning.examples, reading, console),
        recipe=resolve_length(as_recipe(learning.recipe, RECIPE), base, num_virtual, console),
        gates=learning.gates,
        evaluations=learning.evaluations,
        completions=completions,
        overwrite=overwrite,
    )
    return run.compose(request, partial(load_with_adapters, base, saved, console=console), console)


def rows_by_task(
    tasks: opt.Tasks, reading: "Reading", console: "Console"
) -> dict[str, Sequence["Row"]]:
    """Returns the rows of each task. A task given as a file is named after the file."""
    from collections.abc import Mapping

    from lorafold.api.arguments import as_rows
    from lorafold.composing.updates import short_names

    if not isinstance(tasks, Mapping):
        sources = [str(source) for source in tasks]
        tasks = dict(zip(short_names(sources), sources, strict=True))
    return {name: as_rows(rows, reading, console) for name, rows in tasks.items()}
