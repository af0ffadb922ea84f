"""What a training run will hold, said before it starts, and whether it then recomputes its
activations.

    memory: 0.97 GB at the peak of a step (activations 0.61 GB, weights 0.27 GB); 21.40 GB free

`gradient_checkpointing: auto` turns it on where a step would not fit without. Where nothing fits
the run is warned, with what would help, and goes on: an estimate is no verdict on a machine. It
is of this machine, whose CPU may multiply 16-bit matrices in fp32 (the line then says so). It
follows the CPU's rules also for a GPU, which holds less in attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from lorafold.core.spec import Spec
from lorafold.data.batches import batches, labelled, micro_batches
from lorafold.data.examples import Example
from lorafold.errors import LorafoldError
from lorafold.memory.advice import changes_of
from lorafold.memory.terms import Estimate, estimate
from lorafold.memory.trace import Setting
from lorafold.models.storage import Storage
from lorafold.ops.arithmetic import CPU, widens
from lorafold.step.adamw import in_words
from lorafold.step.recipe import Recipe

STEPS = 1000  # of a run, looked through for the one that holds most
SHARE = 0.9  # of the free memory that a step may take: the process, kernels and gaps have the rest


def planned(
    recipe: Recipe,
    spec: Spec,
    storage: Storage,
    examples: Sequence[Any],
    beside: Callable[[Any], Mapping[str, Any]],
    classes: int = 0,
    processes: int = 1,
    device: torch.device = CPU,
) -> Setting:
    """The part of a step that holds most, of the run's first thousand steps, with the recipe's
    method and optimizer, on that device of this machine.
    """
    packed = recipe.packing and not classes
    steps = islice(
        batches(
            len(examples), recipe.batch, min(STEPS, recipe.total_steps(len(examples))), recipe.seed
        ),
        STEPS,
    )
    runs = [
        micro_batches(
            [examples[i] for i in rows[::processes]],
            recipe.accumulate,
            recipe.max_length if packed else None,
        )
        for rows in steps
    ]
    heaviest = max((part for run in runs for part in run), key=lambda part: weight(part, packed))
    return Setting(
        storage,
        spec,
        recipe.targets,
        beside,
        rows=tuple(len(e.ids) for e in heaviest),
        labelled=None if classes else sum(labelled(e) for e in heaviest if isinstance(e, Example)),
        packed=packed,
        classes=classes,
        optimizer="adamw" if recipe.optimizer == "auto" else recipe.optimizer,
        accumulating=any(len(run) > 1 for run in runs),
        widened=widens(storage.dtype, device),
    )


def weight(part: Sequence[Any], packed: bool) -> int:
    """The tokens that are computed."""
    lengths = [len(e.ids) for e in part]
    return sum(lengths) if packed else len(lengths) * max(lengths)


def settle(
    config: PreTrainedConfig,
    setting: Setting,
    asked: bool | Literal["auto"],
    free: int,
    console: Console,
) -> bool:
    """Print what the setting holds, of so many free bytes, and say whether its activations are to
    be recomputed.
    """

    def fits(found: Estimate) -> bool:
        return found.total <= SHARE * free

    setting = replace(setting, checkpointing=asked is True)
    why = ""
    try:
        found = estimate(config, setting)
        if asked == "auto" and not fits(found):
            setting = replace(setting, checkpointing=True)
            why = f"; gradient checkpointing is on, without it it would be {in_words(found.total)}"
            found = estimate(config, setting)
        console.print(
            f"memory: {summary(found)}{', 16-bit products in fp32' * setting.widened};"
            f" {in_words(free)} free{why}",
            highlight=False,
            soft_wrap=True,
        )
        if not fits(found):
            words = [
                word for word, changed in changes_of(setting) if fits(estimate(config, changed))
            ]
            would = (
                f"it would with {' or '.join(words)}"
                if words
                else "a smaller batch, max_length or model would help"
            )
            console.print(
                f"warning: a step may not fit in memory; {would}", highlight=False, soft_wrap=True
            )
    except LorafoldError as error:
        console.print(
            f"memory: no estimate: {error}", highlight=False, soft_wrap=True, markup=False
        )
        return asked is True
    return setting.checkpointing


def summary(found: Estimate) -> str:
    most = sorted(found.terms.items(), key=lambda term: -term[1])[:2]
    return (
        f"{in_words(found.total)} at the peak of a step"
        f" ({', '.join(f'{name} {in_words(n)}' for name, n in most)})"
    )
