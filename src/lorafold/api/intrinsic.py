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
    columns: opt.Columns = None,
    smallest: Annotated[int, opt.Option(min=1)] = 16,
    largest: Annotated[int, opt.Option(min=1)] = 65536,
    share: Annotated[float, opt.Option(min=0.0, max=1.0)] = 0.9,
    recipe: Annotated[
        "Recipe | None", opt.RecipeOptions(without=("method",), defaults=opt.of_quickstart)
    ] = None,
    console: opt.Progress = None,
    **opening: Unpack[opt.Computing],
) -> "Intrinsic":
    """Find the intrinsic dimension of a task: the dimension of the smallest random subspace of the
    weights in which training reaches 90% of the improvement of full training.

    The search bisects powers of 2, which takes about five runs besides the full one. All matrices
    are trained in one subspace, by Fastfood projections with a learned scale each (arXiv
    2012.13255). A low dimension means that the base nearly has the task already, so that an adapter
    of small rank is enough.

    Args:
        smallest: The smallest dimension to try.
        largest: The largest dimension to try.
        share: The share of the improvement of full training that a dimension must reach.
        recipe: The recipe of all runs, whose method is ignored.

    Raises LorafoldError as `lf.train`, for a directory that has another search in it, and where
    full training does not lower the held-out loss.

    Examples:
        lorafold intrinsic --out search
        lorafold intrinsic --out mine --data demo/train.jsonl --steps 50
        lorafold intrinsic --out narrow --smallest 64 --largest 4096
    """
    from functools import partial

    from lorafold.api.arguments import as_path, as_recipe, or_quiet
    from lorafold.api.task_rows import train_and_test
    from lorafold.data.batches import epoch_size
    from lorafold.data.row_store import Rows
    from lorafold.files.atomic import check_folder
    from lorafold.files.claims import check_token
    from lorafold.inspecting.intrinsic import search
    from lorafold.quickstart.story import RECIPE
    from lorafold.recipe.fitting import settled_length
    from lorafold.recipe.recipe import Recipe
    from lorafold.resolve import Base
    from lorafold.training.request import RunRequest

    if smallest > largest:
        raise LorafoldError(f"--smallest: found {smallest}, expected at most --largest {largest}")
    check_folder(as_path(out))
    check_token(as_path(out))
    console = or_quiet(console)
    recipe = as_recipe(recipe, Recipe() if data else RECIPE, trains=True)
    rows, held_out, source = train_and_test(data, eval_data, recipe, columns, console)
    base = Base(model, **opening)
    recipe = settled_length(recipe, base, 0, console)
    # what is held out measures here, and so chooses no step
    steps = recipe.total_steps(epoch_size(Rows.of(rows).parts))
    recipe = recipe.model_copy(update={"steps": steps})

    def tell(point: "SubspaceRun") -> None:
        console.print(
            f"dimension {point.dimension}: loss {point.loss:.4f}, {point.reached:.1%} of the"
            " improvement of full training",
            highlight=False,
        )

    request = RunRequest(base, as_path(out), recipe, rows, source, eval_rows=held_out)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    return search(request, smallest, largest, share, tell, say)
