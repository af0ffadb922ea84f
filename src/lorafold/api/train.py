"""`lf.train`: train an adapter; `lf.preview`: the rows of such a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from lorafold.api import options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.data.row_checks import Findings
    from lorafold.recipe.recipe import Recipe
    from lorafold.training.finish import Trained
    from lorafold.training.inputs import RunRequest

OfRun = Annotated["Recipe | None", opt.RecipeOptions()]
Shown = Annotated[
    "Console | Literal[False] | None",
    opt.Option(
        "A rich console for progress and messages. None prints them if stderr is a terminal, and in"
        " a notebook; False prints nothing.",
        python_only=True,
    ),
]


class RunInputs(opt.Stacking, total=False):
    """The inputs of a run besides its recipe, base model and training rows."""

    eval_data: Annotated[
        opt.Data | None,
        opt.Option("Held-out rows. Default: hold out `eval_fraction` of the rows.", kind=str),
    ]
    rewards: opt.Rewards
    columns: opt.Columns
    init_adapter: Annotated[
        str | Path | None,
        opt.Option("Initialize from this saved adapter, with its method and targets.", rare=True),
    ]
    over: Annotated[
        opt.Paths,
        opt.Option(
            "Train on top of this saved adapter, which stays frozen. For an adapter stack, repeat"
            " the option, with the bottom adapter first.",
            rare=True,
            default=(),
        ),
    ]


@opt.verb
def train(
    recipe: OfRun = None,
    *,
    data: opt.TrainingRows,
    out: opt.Out,
    model: opt.Model = None,
    plot: Annotated[str | Path | None, opt.Option(rare=True)] = None,
    resume: bool = False,
    overwrite: opt.Overwrite = False,
    console: Shown = None,
    **asked: Unpack[RunInputs],
) -> "Trained":
    """Train one adapter on your data and write it in PEFT format.

    The default recipe works for most tasks: a 4-bit base model (QLoRA), LoRA of rank 16 on all
    linear layers of the blocks, alpha 2r, dropout 0.05, learning rates 2e-4 for A and 3e-3 for B
    (LoRA+), a cosine schedule with 3% warm-up, AdamW, and the loss on completions only.

    Args:
        recipe: All choices of the run. None uses the defaults (`lf.Recipe()`).
        plot: Also plot the run's curves to one HTML file. You can do that later with `lorafold
            history`.
        resume: Continue a run that was stopped or killed from its last checkpoint, in OUT.run.

    Raises LorafoldError for anything wrong with the arguments, before weights are loaded if
    possible, and Interrupted after SIGINT or SIGTERM, once a checkpoint is written.

    Examples:
        lorafold train --data demo/train.jsonl --out adapter --preview
        lorafold train --data demo/train.jsonl --out adapter
        lorafold train --data demo/train.jsonl --out small --rank 8 --plot small.html
    """
    from rich.console import Console

    from lorafold.api.arguments import as_page, or_shown
    from lorafold.runtime.devices import device_of_rank
    from lorafold.runtime.processes import detect_launch, process_group

    place = None if plot is None else as_page(plot, "plot")
    console, here = or_shown(console), detect_launch()
    if here.world > 1:
        asked["device"] = device_of_rank(asked.get("device"), here)
    with process_group(here, asked.get("device")) as processes:
        if not processes.first:  # only rank 0 prints
            console = Console(quiet=True)
        request = requested(
            recipe, data, out, model, asked, console, resume=resume, overwrite=overwrite
        )
        from lorafold.training import run

        result = run.train(request, console, processes)
    if place is not None and here.is_main:
        from lorafold.files.terminal import print_lines
        from lorafold.inspecting.history import read_history
        from lorafold.inspecting.history_page import page

        page(read_history(request.out), place)
        print_lines(console, f"page: {place}")
    return result


@opt.verb
def preview(
    recipe: OfRun = None,
    *,
    data: opt.TrainingRows,
    model: opt.Model = None,
    html: str | Path | None = None,
    console: opt.Progress = None,
    **asked: Unpack[RunInputs],
) -> "Findings":
    """Print the first rows as the model will see them, including tools and turns, highlight the
    tokens that count in the loss, and return a check of all rows. Nothing is trained.

    Args:
        recipe: The recipe of the run. None uses the defaults (`lf.Recipe()`).
        html: Write the rows to one HTML file.

    Raises LorafoldError as `lf.train` does before it loads weights.
    """
    from lorafold.api.arguments import as_page, or_quiet

    place, console = as_page(html), or_quiet(console)
    request = requested(recipe, data, "", model, asked, console)
    from lorafold.training.preview import show

    return show(request, console, html=place)


def requested(
    recipe: "Recipe | None",
    data: opt.Data,
    out: str | Path,
    model: opt.Model,
    asked: RunInputs,
    console: "Console",
    **more: Any,
) -> "RunRequest":
    """The request for a run; `more` are its other fields."""
    from lorafold.api.arguments import (
        as_path,
        as_paths,
        as_recipe,
        as_rows,
        as_stream,
        source_of,
        with_rewards,
    )
    from lorafold.recipe.recipe import Recipe

    run, functions = as_recipe(recipe, Recipe(), trains=True), tuple[Any, ...]()
    if rewards := asked.pop("rewards", ()):
        run, functions = with_rewards(run, rewards)
    columns, held_out = asked.pop("columns", None), asked.pop("eval_data", None)
    rows = (
        as_stream(data, columns, console, run.objective)
        if run.streaming
        else as_rows(data, columns, console, weighted=True, objective=run.objective)
    )
    if held_out is not None:
        held_out = as_rows(held_out, columns, console, objective=run.objective)
    from lorafold.peft.provenance import RecordedBase
    from lorafold.resolve import base_for
    from lorafold.training.inputs import RunRequest

    stack, first = asked.pop("over", ()), asked.pop("init_adapter", None)
    over = () if stack == () else tuple(as_paths(stack))
    start = None if first is None else as_path(first, "init_adapter")
    below = [] if model else [*map(RecordedBase.read, (*over, *([start] if start else [])))]
    return RunRequest(
        base_for(model, below, console, **asked),
        as_path(out),
        run,
        rows,
        source_of(data),
        held_out,
        start,
        over=over,
        rewards=functions,
        **more,
    )
