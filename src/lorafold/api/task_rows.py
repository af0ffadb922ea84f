"""Training and held-out rows of the commands that measure on a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafold.api.arguments import as_rows, source_of
from lorafold.api.options import ColumnNames, Data
from lorafold.data.batches import split
from lorafold.data.json_input import Row
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.quickstart.task import rows as quickstart_rows
from lorafold.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

STEPS, TESTED = 60, 100  # of the quickstart's task: steps with new rows, held-out rows


def train_and_test(
    data: Data | None,
    eval_data: Data | None,
    recipe: Recipe,
    columns: ColumnNames | None,
    console: Console,
    rewarded: bool = False,
) -> tuple[Sequence[Row], Sequence[Row], str]:
    """(training rows, held-out rows, source); the quickstart's task if `data` is None. `rewarded`
    also accepts objectives that are measured by rewards.
    """
    fitting = [n for n, one in OBJECTIVES.items() if one.compared and (rewarded or not one.draws)]
    if recipe.objective not in fitting:
        raise LorafoldError(
            f"objective: found {recipe.objective}, expected one that this command supports:"
            f" {' or '.join(fitting)}"
        )
    if recipe.streaming:
        raise LorafoldError("streaming: only for lorafold train; this command keeps rows in memory")
    if data is None:
        train = quickstart_rows("train", recipe.batch * (recipe.steps or STEPS), 0)
        return train, quickstart_rows("test", TESTED, 0), "the quickstart's task"
    objective = recipe.objective
    rows = as_rows(data, columns, console, weighted=True, objective=objective)
    if eval_data is not None:
        return rows, as_rows(eval_data, columns, console, objective=objective), source_of(data)
    return *split(rows, recipe.eval_fraction or 0.1, recipe.seed), source_of(data)
