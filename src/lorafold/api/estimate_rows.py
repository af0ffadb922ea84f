"""The memory setting of a run on your rows: its largest micro-batch, as the run itself finds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lorafold.api.arguments import as_rows, source_of, with_rewards
from lorafold.api.options import ColumnNames, Data, RewardSources
from lorafold.memory.presets import check_fields, recipe_in
from lorafold.memory.trace import Setting
from lorafold.recipe.fields import OF_MEMORY, OF_ROWS
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base

if TYPE_CHECKING:
    from rich.console import Console


def setting_on_rows(
    base: Base,
    mode: str,
    recipe: Recipe,
    data: Data,
    rewards: RewardSources,
    columns: ColumnNames | None,
    console: Console,
) -> Setting:
    """The setting of the largest micro-batch in the first steps of `lorafold train`."""
    check_fields(recipe, OF_MEMORY | OF_ROWS | {"batch", "max_length"})
    recipe, functions = with_rewards(recipe_in(mode, recipe), rewards)
    rows = as_rows(data, columns, console, weighted=True, objective=recipe.objective)
    from lorafold.training.request import RunRequest
    from lorafold.training.setup import largest_setting, set_up

    with TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        request = RunRequest(base, out, recipe, rows, source_of(data), rewards=functions)
        found = largest_setting(set_up(request, console))
    return replace(found, checkpointing=recipe.gradient_checkpointing is True)
