"""Divides a model among the processes of a run (`step.sharding`), or says why it can't be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lorafold.errors import LorafoldError
from lorafold.machine.memory import freed_blocks_returned
from lorafold.machine.processes import Processes
from lorafold.objectives.objective import Objective
from lorafold.recipe.recipe import Recipe
from lorafold.step.adamw import in_words
from lorafold.step.replicated import Replicated
from lorafold.step.sharding import Sharded


def check_dividable(recipe: Recipe, objective: Objective) -> None:
    """Raise LorafoldError for a run whose processes do not all pass through the model alike."""
    if recipe.strategy != "ddp" and not objective.passes_alike:
        raise LorafoldError(
            f"strategy fsdp: found objective {recipe.objective}, expected one that draws no"
            " completions; or strategy ddp"
        )


def layout_of(recipe: Recipe, processes: Processes) -> Replicated:
    """How the tensors of a run lie among its processes."""
    divides = recipe.strategy == "fsdp" and processes.count > 1
    return Sharded(processes) if divides else Replicated(processes)


@contextmanager
def divided(layout: Replicated, model: nn.Module, recipe: Recipe) -> Iterator[str]:
    """Divide the model until the `with` block ends; yield what there is to say of it."""
    if not isinstance(layout, Sharded):
        alone = "strategy fsdp: one process has all weights; several would divide them"
        yield alone if recipe.strategy == "fsdp" else ""
        return
    # what is whole for a moment must not stay in the process
    with freed_blocks_returned(), layout.dividing(model):
        yield (
            f"strategy fsdp: of {in_words(layout.whole)} of weights process 0 of"
            f" {layout.processes.count} keeps {in_words(layout.kept)}, and at most"
            f" {in_words(layout.largest)} are whole at a time"
        )
