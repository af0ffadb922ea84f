"""Tells whether a setting fits in a device's memory, the largest batch and length that do, and
which single changes would make it fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lorafold.memory.estimate import estimate
from lorafold.memory.trace import Setting
from lorafold.models.quantizations import DEFAULT, Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROWS = 4096  # the largest batch that is looked for
TRACED = 2**14  # tokens up to which a setting is traced; beyond, its bytes are extrapolated


@dataclass(frozen=True)
class Advice:
    """Whether a setting fits, with how many bytes to spare (negative: how many are missing).

    `batch` is the largest batch that fits at the setting's length, up to 4096, and `length` the
    largest length at its batch, up to the model's context; 0 if not even 1 fits, and None for the
    rows of a run, which have lengths of their own. `changes` are
    single changes that would make it fit, the least harmful first, each with the bytes that the
    changed setting takes.
    """

    fits: bool
    spare: int
    batch: int | None
    length: int | None
    changes: list[tuple[str, int]]


def advise(config: PreTrainedConfig, setting: Setting, memory: int) -> Advice:
    """Advise on a setting for a device."""

    @cache
    def total(batch: int, length: int) -> int:
        return estimate(config, replace(setting, rows=(length,) * batch)).total

    context = getattr(config.get_text_config(), "max_position_embeddings", None) or TRACED
    spare = memory - total(setting.batch, setting.length)
    batch = largest(
        lambda n: total(n, setting.length), setting.batch, memory, ROWS, TRACED // setting.length
    )
    length = largest(
        lambda n: total(setting.batch, n), setting.length, memory, context, TRACED // setting.batch
    )
    changes = []
    if spare < 0:
        smaller = [(name, estimate(config, changed).total) for name, changed in changes_of(setting)]
        smaller += (
            [(f"batch {batch}", total(batch, setting.length))] if 0 < batch < setting.batch else []
        )
        smaller += (
            [(f"length {length}", total(setting.batch, length))]
            if 1 < length < setting.length
            else []
        )
        changes = [(name, taken) for name, taken in smaller if taken <= memory]
    return Advice(spare >= 0, spare, batch, length, changes)


def advise_on_rows(config: PreTrainedConfig, setting: Setting, memory: int) -> Advice:
    """As `advise`, for the rows of a run, which keep their number and lengths."""
    spare = memory - estimate(config, setting).total
    tried = changes_of(setting) if spare < 0 else ()
    taken = [(name, estimate(config, changed).total) for name, changed in tried]
    return Advice(spare >= 0, spare, None, None, [one for one in taken if one[1] <= memory])


def changes_of(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield (name, changed setting) for changes that keep the batch and the length, the least
    harmful first.
    """
    if setting.spec is None:
        yield from quantized(setting)
        return
    if not setting.checkpointing:
        yield "gradient checkpointing", replace(setting, checkpointing=True)
    in_place = setting.spec.trains_base
    # 16-bit weights that are trained need stochastic rounding, which only adamw has
    if setting.optimizer == "adamw" and not (in_place and setting.base.dtype.itemsize == 2):
        yield "optimizer adamw8bit", replace(setting, optimizer="adamw8bit")
        if in_place:
            yield "storage bf16", replace(setting, base=Storage(torch.bfloat16))
    if not in_place:
        yield from quantized(setting)
        if not setting.checkpointing:
            yield from (
                (f"{name} and gradient checkpointing", replace(s, checkpointing=True))
                for name, s in quantized(setting)
            )
    spec: Any = setting.spec
    if "rank" in {field.name for field in fields(spec)}:
        yield from (
            (f"rank {r}", replace(setting, spec=replace(spec, rank=r)))
            for r in (spec.rank // 2, spec.rank // 4)
            if r
        )


def quantized(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield the setting on the least base that is made, unless its own is quantized already."""
    if setting.base.quantization is None:
        yield f"storage {DEFAULT}", replace(setting, base=Storage(torch.bfloat16, DEFAULT))


def largest(total: Callable[[int], int], start: int, memory: int, most: int, traced: int) -> int:
    """Return the largest n up to `most` whose total fits in memory, or 0 if not even 1 does.

    Totals are nearly affine in n, so n is found on the line through two of them. An n of at most
    four times a traced one is traced to check it; beyond `traced` the line is trusted.
    """
    low, high = (start // 2, start) if start > 3 else (2, 4)
    while True:
        slope = (total(high) - total(low)) / (high - low)
        n = min(most, int(low + (memory - total(low)) / slope))
        if n <= 4 * high or 4 * high > traced:
            break
        low, high = high, 4 * high
    while 0 < n <= 4 * high and total(n) > memory:
        n -= max(1, n // 64)
    return max(0, n)
