"""The setting of a run on one's own rows, whose memory is estimated: that of its largest
micro-batch, found as a run finds it before it starts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lorafold.api.arguments import as_rows, source_of, with_rewards
from lorafold.api.options import Data, Named, Rewarding
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
    rewards: Rewarding,
    columns: Named | None,
    console: Console,
) -> Setting:
    """The setting of the largest micro-batch of the first steps that `lorafold train` would do.

    Args:
        base: The model, of which only configuration and tokenizer are read.
        mode: As `setting_of` takes it, other than inference.
        recipe: The recipe, `batch` and `max_length` among it.
        data: The training rows.
        rewards: What judges completions, for an objective that draws them.
        columns: The keys of the rows under other names.
        console: For what a run says of its rows.

    Raises LorafoldError as `lorafold train` does, before its model is loaded.
    """
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
