"""Divides a model among the processes of a run (`step.sharding`), or says why it can't be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from lorafold.errors import LorafoldError
from lorafold.machine.allocator import freed_blocks_returned
from lorafold.machine.processes import Processes
from lorafold.objectives.objective import Objective
from lorafold.recipe.recipe import Recipe
from lorafold.step.adamw import in_words
from lorafold.step.sharding import sharded
from lorafold.step.shards import owners
from lorafold.training.loop import Job


def check_dividable(recipe: Recipe, objective: Objective) -> None:
    """Raise LorafoldError for a run whose processes do not all pass through the model alike."""
    if recipe.strategy != "ddp" and not objective.passes_alike:
        raise LorafoldError(
            f"strategy fsdp: found objective {recipe.objective}, expected one that draws no"
            " completions and has gradients of all; or strategy ddp"
        )


def owned_here(
    model: nn.Module, recipe: Recipe, processes: Processes
) -> Callable[[nn.Parameter], bool]:
    """Whether this process will own a parameter, of any shape, once the model is divided."""
    if recipe.strategy == "ddp":
        return lambda p: True
    owner_of = owners(model, processes.count)
    return lambda p: owner_of.get(p, processes.index) == processes.index


@contextmanager
def divided(job: Job) -> Iterator[str]:
    """Divide the model until the `with` block ends; yield what there is to say of it."""
    if job.recipe.strategy == "ddp":
        yield ""
    elif job.processes.count == 1:
        yield "strategy fsdp: one process has all weights; several would divide them"
    else:
        # what is whole for a moment must not stay in the process
        with freed_blocks_returned(), sharded(job.adapter.model, job.processes) as job.layout:
            yield (
                f"strategy fsdp: of {in_words(job.layout.whole)} of weights process 0 of"
                f" {job.processes.count} keeps {in_words(job.layout.kept)}, and at most"
                f" {in_words(job.layout.largest)} are whole at a time"
            )
