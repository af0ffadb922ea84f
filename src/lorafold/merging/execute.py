"""Carries out the plan of a merge: folds tensor by tensor, for a writer of any format.

    folded = execute(planned, partial(write_shards, out))

Memory: the adapters, and at most three times the largest changed tensor in fp32, whatever the size
of the model; where transformers computes a parameter from several tensors (`folding`), three and a
half times that parameter, and the rounded tensors that are not written yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lorafold.fold.rounding import Rounding, Sums
from lorafold.merging.folding import Folding
from lorafold.merging.plan import Plan

Progress = Callable[[int, int], None]  # bytes written, bytes in all
Values = Callable[[str], Tensor | None]  # new values by name; None: those of the plan's entry
Written = Callable[[str, int], None]  # name and bytes of a tensor, after it was written
# A format of merged models. It writes the tensors of `Plan.layout`, asks once for each of them, and
# writes what else its format takes: `plan.config`, `plan.checkpoint.other_files()`.
Writer = Callable[[Plan, Values, Written], None]


@dataclass(frozen=True)
class Folded:
    """What was done: the inner products of the update and its rounding errors, the number of
    tensors by the way they were rounded, the tensors added to untie weights, the biases added, and
    the size of the vocabulary if it grew.
    """

    sums: Sums
    rounded: dict[str, int]
    untied: tuple[str, ...]
    biases: tuple[str, ...]
    vocabulary: int | None


def execute(
    plan: Plan,
    writer: Writer,
    rounding: Rounding = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Folded:
    """Write the merged model.

    Args:
        plan: What changes, and in which files.
        writer: Writes it in a format.
        rounding: nearest, stochastic or auto.
        seed: The seed of stochastic rounding.
        progress: Called as progress(bytes written, bytes in all) after each tensor.

    Raises LorafoldError if a folded value does not fit its dtype, and as the writer does.
    """
    folding, total, done = Folding(plan, rounding, seed), plan.weight_bytes, 0

    def written(_: str, size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    writer(plan, folding.new_values, written)
    biases = tuple(name for name, like in plan.added.items() if like.name == name)
    untied = tuple(name for name in plan.added if name not in biases)
    return Folded(folding.sums, dict(folding.rounded), untied, biases, plan.vocabulary)
