"""Divides a model among the processes of a run (`step.sharding`), or says why it can't be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorafold.core.spec import Spec
from lorafold.errors import LorafoldError
from lorafold.objectives.objective import Objective
from lorafold.recipe.recipe import Recipe
from lorafold.step.adamw import in_words
from lorafold.step.sharding import sharded
from lorafold.training.loop import Job


def check_dividable(recipe: Recipe, spec: Spec, objective: Objective) -> None:
    """Raise LorafoldError for a run whose processes do not all pass through the model alike, or
    that trains what would be divided.
    """
    if recipe.strategy == "ddp":
        return
    if spec.trains_base:
        why = f"method {recipe.method}", "one that leaves the base's weights as they are"
    elif not objective.passes_alike:
        why = (
            f"objective {recipe.objective}",
            "one that draws no completions and has gradients of all",
        )
    else:
        return
    raise LorafoldError(f"strategy fsdp: found {why[0]}, expected {why[1]}; or strategy ddp")


@contextmanager
def divided(job: Job) -> Iterator[str]:
    """Divide the model until the `with` block ends; yield what there is to say of it."""
    if not job.divided:
        yield "strategy fsdp: one process has all weights; several would divide them"
        return
    with sharded(job.adapter.model, job.processes) as found:
        yield (
            f"strategy fsdp: of {in_words(found.whole)} of frozen weights each of"
            f" {job.processes.count} processes keeps {in_words(found.kept)}, and at most"
            f" {in_words(found.largest)} are whole at a time"
        )
