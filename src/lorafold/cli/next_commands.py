"""Commands to go on with, ready to paste."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from shutil import which
from typing import TYPE_CHECKING

from lorafold.objectives import OBJECTIVES
from lorafold.peft.config import CONFIG
from lorafold.recipe.recipe import FEW

if TYPE_CHECKING:
    from lorafold.recipe.recipe import Recipe
    from lorafold.training.finish import Trained


def this_command() -> str:
    """The command that runs lorafold from this directory: its name if it is on the PATH, else its
    path as typed, else this Python.
    """
    typed, found = Path(sys.argv[0]), which("lorafold")
    if typed.name != "lorafold" or not typed.is_file():
        return f"{quote(sys.executable)} -m lorafold"
    return "lorafold" if found and typed.samefile(found) else quote(str(typed))


def after_training(
    result: "Trained", recipe: "Recipe", over: Sequence[str | Path]
) -> Iterator[str]:
    """Commands to go on with after training on top of the adapters `over`."""
    if recipe.steps is None and not recipe.stops and result.steps < FEW:
        yield (
            f"{result.steps} steps are few to learn from; if the answers are poor, run the same"
            " command with --epochs auto"
        )
    if not OBJECTIVES[recipe.objective].head and Path(result.adapter, CONFIG).is_file():
        adapters = " ".join(quote(str(one)) for one in (*over, result.adapter))
        yield f"talk to it: {this_command()} chat {adapters}"
