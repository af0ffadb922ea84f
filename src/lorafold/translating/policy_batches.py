"""Readers of the batch of TRL's GRPOConfig and RLOOConfig: it counts completions there, and here
the prompts that each get a group of them. It is counted for one process.
"""

from __future__ import annotations

from math import ceil, gcd
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.translating.convert import integer
from lorafold.translating.rules import Outcome, Reader, Settings, changed, taken


def count(key: str, settings: Settings, least: int = 1) -> int:
    """A number of things. LorafoldError names the key where it is less than `least`."""
    found = settings.read(key, integer)
    if found < least:
        raise LorafoldError(f"{key}: found {found}, expected {least} or more")
    return found


def completions(settings: Settings) -> int:
    """The completions of an optimizer step of one process."""
    micro = count("per_device_train_batch_size", settings)
    return micro * count("gradient_accumulation_steps", settings)


def prompts(settings: Settings) -> int:
    """The prompts of an optimizer step, whole groups of completions."""
    return ceil(completions(settings) / count("num_generations", settings, 2))


def batch(value: Any, settings: Settings) -> Outcome:
    """`per_device_train_batch_size` times accumulation, in groups, becomes the batch of prompts."""
    found, rows = completions(settings), prompts(settings)
    size = count("num_generations", settings, 2)
    if found == rows * size:
        return taken(f"{found} completions of one process, {size} a prompt", batch=rows)
    return changed(
        f"{found} completions of one process are not whole groups of {size}: for N processes"
        f" --batch is N*{found}/{size}",
        batch=rows,
    )


def accumulation(value: Any, settings: Settings) -> Outcome:
    """`gradient_accumulation_steps` become micro-batches of whole groups."""
    found, rows = count("gradient_accumulation_steps", settings), prompts(settings)
    if rows % found == 0:
        return taken(accumulate=found)
    return changed("a micro-batch has whole groups here", accumulate=gcd(rows, found))


def draws_for(factor: str) -> Reader:
    """The reader of `steps_per_generation`, in micro-batches, or of `generation_batch_size`, in
    completions: how many updates learn from what is drawn at once.

    `factor` is the key whose value is that of one micro-batch; empty for one.
    """

    def read(value: Any, settings: Settings) -> Outcome:
        drawn = integer(value) / (count(factor, settings) if factor else 1)
        if drawn <= count("gradient_accumulation_steps", settings):
            return taken("a step learns from what it draws")
        return changed("several updates learn from one draw there; here each draws for itself")

    return read
