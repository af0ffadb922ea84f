"""The rows of a verb: read from a file, a directory or a hub dataset, or given as a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorafold.composing.updates import names
from lorafold.data.batches import split
from lorafold.data.rows import Row, check_rows, read_rows
from lorafold.quickstart.task import rows as quickstart_rows
from lorafold.step.recipe import Recipe

Rows = str | Path | Sequence[Row]
Tasks = Mapping[str, Rows] | Sequence[str | Path]  # rows by the name of a task, or files
STEPS, TESTED = 60, 100  # of the quickstart's task: steps with new rows, held-out rows


def as_rows(data: Rows) -> list[Row]:
    """The rows as a list, after they are read, if a source is named, and checked.

    Raises LorafoldError for bad rows and for a source that can't be read.
    """
    if isinstance(data, (str, Path)):
        return read_rows(str(data))
    return check_rows(enumerate(data, 1), source_of(data))


def source_of(data: Rows) -> str:
    """The source of the rows, for records and messages."""
    return str(data) if isinstance(data, (str, Path)) else "rows given in Python"


def train_and_test(
    data: Rows | None, eval_data: Rows | None, recipe: Recipe
) -> tuple[list[Row], list[Row], str]:
    """(training rows, held-out rows, the source of the training rows).

    Args:
        data: Training rows; None takes the quickstart's task.
        eval_data: Held-out rows; None holds out a tenth of the data.
        recipe: For the seed that chooses the held-out rows, and the rows that the task needs.

    Raises LorafoldError as `as_rows`.
    """
    if data is None:
        train = quickstart_rows("train", recipe.batch * (recipe.steps or STEPS), 0)
        return train, quickstart_rows("test", TESTED, 0), "the quickstart's task"
    if eval_data is not None:
        return as_rows(data), as_rows(eval_data), source_of(data)
    return *split(as_rows(data), 0.1, recipe.seed), source_of(data)


def by_name(tasks: Tasks) -> dict[str, list[Row]]:
    """Rows by the name of their task; that of a file is the last part of its path."""
    if not isinstance(tasks, Mapping):
        sources = [str(source) for source in tasks]
        tasks = dict(zip(names(sources), sources, strict=True))
    return {name: as_rows(rows) for name, rows in tasks.items()}
