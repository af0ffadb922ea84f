"""`lf.intrinsic`: the intrinsic dimension of a task."""

from typing import TYPE_CHECKING, Annotated, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.inspecting.intrinsic import Intrinsic, SubspaceRun
    from lorafold.recipe.recipe import Recipe


@opt.verb
def intrinsic(
    out: opt.StudyOut,
    *,
    model: opt.OnlyModel = "smollm2",
    data: opt.StudyRows = None,
    eval_data: opt.HeldOut = None,
    smallest: opt.Count = 16,
    largest: opt.Count = 65536,
    share: Annotated[float, opt.Option(min=0.0, max=1.0)] = 0.9,
    recipe: Annotated[
        "Recipe | None", opt.RecipeOptions(without=("method",), default=opt.QUICKSTART)
    ] = None,
    console: opt.Progress = None,
    **base_options: Unpack[opt.StudyOptions],
) -> "Intrinsic":
    """Find the intrinsic dimension of a task: the dimension of the smallest random subspace of the
    weights in which training reaches 90% of the improvement of full training.

    The search bisects powers of 2 in about five runs after the full one. All matrices are trained
    in one subspace, by Fastfood projections with one learned scale each (arXiv 2012.13255). If the
    dimension is low, the base model almost solves the task already, and a small rank is enough.

    Args:
        smallest: The smallest dimension to try.
        largest: The largest dimension to try.
        share: The share of full training's improvement that a dimension must reach.
        recipe: The recipe of all runs; its method is ignored.

    Raises LorafoldError as `lf.train` does, for a directory that contains another search, and if
    full training does not reduce the held-out loss.

    Examples:
        lorafold lab intrinsic --out search
        lorafold lab intrinsic --out mine --data demo/train.jsonl --steps 50
        lorafold lab intrinsic --out narrow --smallest 64 --largest 4096
    """
    from functools import partial

    from lorafold.api import arguments as args
    from lorafold.data.batches import epoch_size
    from lorafold.data.row_store import Rows
    from lorafold.files.terminal import print_lines
    from lorafold.inspecting.intrinsic import search
    from lorafold.quickstart.run import RECIPE
    from lorafold.recipe.recipe import Recipe
    from lorafold.recipe.resolve_settings import resolve_length
    from lorafold.resolve import Base
    from lorafold.training.inputs import RunRequest

    if (smallest - 1).bit_length() > largest.bit_length() - 1:
        raise LorafoldError(
            f"smallest, largest: found {smallest} and {largest}, expected a power of 2 between them"
        )
    study, console = args.as_study_path(out), args.console_or_quiet(console)
    recipe = args.as_recipe(recipe, Recipe() if data else RECIPE, trains=True)
    reading = args.as_reading(base_options)
    opening: opt.DeviceOptions = base_options
    rows, held_out, source = args.train_and_test(data, eval_data, recipe, reading, console)
    base = Base(model, **opening)
    recipe = resolve_length(recipe, base, 0, console)
    # held-out rows measure here, so they must not select the number of steps
    steps = recipe.total_steps(epoch_size(Rows.of(rows).parts))
    recipe = recipe.model_copy(update={"steps": steps})

    def print_run(point: "SubspaceRun") -> None:
        reached = f"{point.reached:.1%} of the improvement of full training"
        print_lines(console, f"dimension {point.dimension}: loss {point.loss:.4f}, {reached}")

    request = RunRequest(base, study, recipe, rows, source, eval_rows=held_out)
    return search(request, smallest, largest, share, print_run, partial(print_lines, console))
