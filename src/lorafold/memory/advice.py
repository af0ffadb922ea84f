"""Will it fit? The verdict, the largest batch and length that do, and the smallest change that
would make a setting fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from lorafold.memory.terms import estimate
from lorafold.memory.trace import Setting
from lorafold.models.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROWS = 4096  # more are not looked for
TRACED = 2**14  # tokens up to which larger settings are traced, and not extrapolated


@dataclass(frozen=True)
class Advice:
    """fits: with `spare` bytes left (negative: short of). batch, length: the largest that fit, the
    other left as it is, up to 4096 rows and the model's own context; 0: not even one.

    changes: what would make it fit, each alone, the least harmful first, with the bytes it then
    takes.
    """

    fits: bool
    spare: int
    batch: int
    length: int
    changes: list[tuple[str, int]]


def advise(config: PreTrainedConfig, setting: Setting, memory: int) -> Advice:
    """For a device on which tensors may take `memory` bytes."""

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
        smaller = [(word, estimate(config, changed).total) for word, changed in changes_of(setting)]
        smaller += (
            [(f"batch {batch}", total(batch, setting.length))] if 0 < batch < setting.batch else []
        )
        smaller += (
            [(f"length {length}", total(setting.batch, length))]
            if 1 < length < setting.length
            else []
        )
        changes = [(word, held) for word, held in smaller if held <= memory]
    return Advice(spare >= 0, spare, batch, length, changes)


def changes_of(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """What may be changed without training on less at a time, the least harmful first."""
    if setting.spec is None:
        yield from packed(setting)
        return
    if not setting.checkpointing:
        yield "gradient checkpointing", replace(setting, checkpointing=True)
    in_place = setting.spec.trains_base
    # weights that are trained in 16 bits need the optimizer that rounds stochastically
    if setting.optimizer == "adamw" and not (in_place and setting.base.dtype.itemsize == 2):
        yield "optimizer adamw8bit", replace(setting, optimizer="adamw8bit")
        if in_place:
            yield "base bf16", replace(setting, base=Storage(torch.bfloat16))
    if not in_place:
        yield from packed(setting)
        if not setting.checkpointing:
            yield from (
                (f"{word} and gradient checkpointing", replace(s, checkpointing=True))
                for word, s in packed(setting)
            )
    spec: Any = setting.spec
    if "rank" in {field.name for field in fields(spec)}:
        yield from (
            (f"rank {r}", replace(setting, spec=replace(spec, rank=r)))
            for r in (spec.rank // 2, spec.rank // 4)
            if r
        )


def packed(setting: Setting) -> Iterator[tuple[str, Setting]]:
    if setting.base.quantization is None:
        yield "base nf4", replace(setting, base=Storage(torch.bfloat16, "nf4"))


def largest(total: Callable[[int], int], start: int, memory: int, most: int, traced: int) -> int:
    """The largest n up to `most` whose total fits; 0 if not even 1 does.

    Totals are affine in n but for edges, so it is looked for on the line through two of them; what
    lies within four times of a traced one is checked, and beyond `traced` the line is trusted.
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
