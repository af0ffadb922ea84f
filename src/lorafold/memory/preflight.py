"""Estimates the memory of a training run before it starts, and decides whether to use gradient
checkpointing.

If a step does not fit, the run only warns, because the estimate may be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from heapq import nlargest
from itertools import islice
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from lorafold.data.batches import BatchFeed, micro_batches, num_targets
from lorafold.data.preference_examples import BranchedRow
from lorafold.data.prefix_forest import MAX_SIZE, batches_by_prefix, prefix_forest
from lorafold.errors import LorafoldError, NoTarget
from lorafold.files.terminal import format_bytes, print_lines
from lorafold.memory.estimate import changes_of, estimate
from lorafold.memory.trace import MemorySetting
from lorafold.models.fake import fake_model, without_values
from lorafold.objectives.objective import Objective, OnPolicy
from lorafold.ops.arithmetic import CPU, widens
from lorafold.recipe.recipe import Recipe
from lorafold.runtime.assumed_device import kind_of_device

NUM_CHECKED_STEPS = 64  # the steps with the most tokens, of those inspected in advance
USABLE_SHARE = 0.9  # of the free memory: the rest is for memory outside the estimate


def largest_batch(
    recipe: Recipe,
    feed: BatchFeed,
    objective: Objective,
    setting: MemorySetting,
    processes: int = 1,
    device: torch.device = CPU,
    held_out: Any = None,
    shares: bool = False,
) -> MemorySetting:
    """The setting of the largest micro-batch in the run's first steps."""
    packed, outputs = bool(recipe.packing) and objective.packs, objective.outputs
    shares = shares and packed and recipe.packing == "auto"
    draws = objective.draws(feed, held_out) if isinstance(objective, OnPolicy) else None
    largest: Sequence[int] = ()
    max_size, num_labelled, max_tokens, accumulating = -1, 0, 0, False
    capacity = recipe.max_length if packed else None
    steps: Iterable[Sequence[Any]] = (
        [objective.trained(example) for example in examples[::processes]]
        for examples in islice(feed.after(0), feed.num_previewed)
    )
    if shares:  # finding shared prefixes takes a millisecond or more per step
        steps = nlargest(NUM_CHECKED_STEPS, steps, key=lambda examples: sum(documents(examples)))
    n = recipe.accumulate
    for examples in steps:
        # shared prefixes are only used if they save enough tokens
        alone, merged = documents(examples), documents(examples, True)
        if shared := shares and sum(merged) <= MAX_SIZE * sum(alone):
            # a prompt, or a whole row, may be shared
            parts = batches_by_prefix(
                examples, n, recipe.max_length,
                lambda e: e.shared if isinstance(e, BranchedRow) else e.ids, lambda e: len(e.ids),
            )  # fmt: skip
        else:
            parts = micro_batches(examples, n, capacity)
        accumulating = accumulating or len(parts) > 1
        for part in parts:
            lengths = documents(part, True) if shared else [len(e.ids) for e in part]
            size = sum(lengths) if packed else len(part) * max(lengths)  # with padding
            if size > max_size:
                max_size, largest = size, documents(part, shared)
                num_labelled = sum(map(num_targets, part))
        max_tokens = max(max_tokens, sum(documents(examples, shared)))
    rows = tuple(largest)
    # shorter completions leave room for more of them
    more = max(0, min(recipe.max_length, max_tokens) - sum(rows)) if draws and packed else 0
    return replace(
        setting,
        rows=(*rows, more) if more else rows,
        labelled=None if outputs else num_labelled + more,
        packed=packed,
        classes=outputs,
        loss=objective.traced,
        optimizer="adamw" if recipe.optimizer == "auto" else recipe.optimizer,
        accumulating=accumulating,
        draws=draws,
        widened=widens(setting.base.dtype, device),
        device_kind=kind_of_device(device),
        processes=processes,
        strategy=recipe.strategy,
        resident=device.type == "cpu",
    )


def documents(examples: Sequence[Any], shared: bool = False) -> tuple[int, ...]:
    """The number of tokens computed for each document of a micro-batch. If `shared`, the tokens of
    a shared prefix count once.
    """
    if shared:
        pairs = [
            pair
            for e in examples
            for pair in (
                [(document, len(e.shared)) for document in e.documents()]
                if isinstance(e, BranchedRow)
                else [(e, len(e.ids))]
            )
        ]
        tree = prefix_forest([d for d, _ in pairs], [n for _, n in pairs])
        return tuple(n - start for n, start in zip(tree.lens, tree.starts, strict=True))
    return tuple(
        n for e in examples for n in (e.lengths if isinstance(e, BranchedRow) else (len(e.ids),))
    )


def choose_checkpointing(
    config: PreTrainedConfig,
    setting: MemorySetting,
    checkpointing: bool | Literal["auto"],
    free: int,
    console: Console,
) -> tuple[bool, str]:
    """Prints the memory estimate. Returns whether to use gradient checkpointing, and, if no
    estimate was possible, a line to print after the model is loaded, because loading may raise a
    better error.
    """
    setting = replace(setting, checkpointing=checkpointing is True)
    limit, reason = USABLE_SHARE * free, ""
    try:
        needed = estimate(config, setting)
        if checkpointing == "auto" and needed.total > limit:
            setting = replace(setting, checkpointing=True)
            reason = (
                "; gradient checkpointing is on, because a step without it would take"
                f" {format_bytes(needed.total)}"
            )
            needed = estimate(config, setting)
        peak = f"{format_bytes(needed.total)} at the peak of a step"
        print_lines(console, f"memory: {peak}; {format_bytes(free)} free{reason}")
        print_lines(console, "16-bit matmuls run in fp32" * setting.widened, detail=True)
        if needed.total > limit:
            changes = [n for n, s in changes_of(setting) if estimate(config, s).total <= limit]
            helps = f"it would fit with {' or '.join(changes)}"
            remedy = helps if changes else "try a smaller batch, max_length or model"
            print_lines(console, f"warning: a step may not fit in memory; {remedy}")
    except LorafoldError as error:
        if isinstance(error, NoTarget):
            check_targets(config, setting)
        return checkpointing is True, f"memory: no estimate: {error}"
    return setting.checkpointing, ""


def check_targets(config: PreTrainedConfig, setting: MemorySetting) -> None:
    """Raises NoTarget if the full model has no module that matches the run's targets, or one that
    the method can't adapt. The model of an estimate can't decide this, because it has only a few
    blocks.
    """
    blocks, trusted = config.get_text_config().num_hidden_layers, setting.trust_remote_code
    with without_values():
        model = fake_model(config, setting.base, blocks, setting.classes, trusted)
        try:
            setting.attach(model)
        except LorafoldError as error:  # other errors are left to the run
            if isinstance(error, NoTarget):
                raise
