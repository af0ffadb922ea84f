"""Commands to go on with, printed so that they can be pasted as they stand."""

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
    """What runs lorafold from this directory: its name where that is on the PATH, else what was
    typed, else this Python.
    """
    typed, found = Path(sys.argv[0]), which("lorafold")
    if typed.name != "lorafold" or not typed.is_file():
        return f"{quote(sys.executable)} -m lorafold"
    return "lorafold" if found and typed.samefile(found) else quote(str(typed))


def after_training(
    result: "Trained", recipe: "Recipe", over: Sequence[str | Path]
) -> Iterator[str]:
    """What to do with a new adapter, and what if it learned too little.

    Args:
        over: the adapters that it lies over.
    """
    if recipe.steps is None and not recipe.stops and result.steps < FEW:
        yield (
            f"{result.steps} steps are few to learn by; if its answers are poor: the same command"
            " with --epochs auto"
        )
    if not OBJECTIVES[recipe.objective].head and Path(result.adapter, CONFIG).is_file():
        adapters = " ".join(quote(str(one)) for one in (*over, result.adapter))
        yield f"talk to it: {this_command()} chat {adapters}"
