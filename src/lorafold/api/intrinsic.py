"""`lf.intrinsic`: the intrinsic dimension of a task."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Columns, Data, as_path, or_quiet, recipe_to_train
from lorafold.api.task import train_and_test
from lorafold.data.batches import epoch_size
from lorafold.data.stored import Rows
from lorafold.errors import LorafoldError
from lorafold.files.atomic import check_folder
from lorafold.files.claims import check_token
from lorafold.inspecting.intrinsic import Intrinsic, Point, search
from lorafold.opening import Base
from lorafold.quickstart.story import RECIPE
from lorafold.recipe.fitting import settled_length
from lorafold.recipe.recipe import Recipe
from lorafold.training.request import Request

if TYPE_CHECKING:
    from rich.console import Console


def intrinsic(
    out: str | Path,
    *,
    model: str | Path = "smollm2",
    data: Data | None = None,
    eval_data: Data | None = None,
    columns: Columns | None = None,
    smallest: int = 16,
    largest: int = 65536,
    share: float = 0.9,
    recipe: Recipe | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Intrinsic:
    """Find the dimension of the smallest random subspace of the weights in which training reaches a
    share of the improvement of full training.

    Args:
        out: The directory of the search. A second call continues after what is in it.
        model: A name or path as `lf.load_model` takes it.
        data: Training rows; None takes the quickstart's task.
        eval_data: Held-out rows; None holds out the recipe's `eval_fraction`, or a tenth.
        columns: The keys of the rows under other names, as in {"prompt": "question"}.
        smallest: The dimension to begin with.
        largest: The dimension to end with, if none before reaches the share.
        share: The share to reach, above 0 and at most 1.
        recipe: The recipe of all runs, whose method is ignored.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        console: A rich console for one line a dimension; None is quiet.

    Raises LorafoldError as `lf.train`, for a directory that has another search in it, and where
    full training does not lower the held-out loss.
    """
    if smallest > largest:
        raise LorafoldError(f"--smallest: found {smallest}, expected at most --largest {largest}")
    check_folder(as_path(out))
    check_token(as_path(out))
    console, recipe = or_quiet(console), recipe_to_train(recipe, Recipe() if data else RECIPE)
    rows, held_out, source = train_and_test(data, eval_data, recipe, columns, console)
    base = Base(model, device=device, revision=revision, trust_remote_code=trust_remote_code)
    recipe = settled_length(recipe, base, 0, console)
    # what is held out measures here, and so chooses no step
    steps = recipe.total_steps(epoch_size(Rows.of(rows).parts))
    recipe = recipe.model_copy(update={"steps": steps})

    def tell(point: Point) -> None:
        console.print(
            f"dimension {point.dimension}: loss {point.loss:.4f}, {point.reached:.1%} of the"
            " improvement of full training",
            highlight=False,
        )

    request = Request(base, as_path(out), recipe, rows, source, eval_rows=held_out)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    return search(request, smallest, largest, share, tell, say)
