"""Will it fit? The verdict, the largest batch and length that do, and the smallest change that would make a setting fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from lorafold.io.models import Storage
from lorafold.memory.model import estimate
from lorafold.memory.trace import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LARGEST = 2**20  # neither rows nor tokens are looked for beyond


@dataclass(frozen=True)
class Advice:
    """fits: with `spare` bytes left (negative: short of). batch, length: the largest that fit, the other left as it is; 0: not even one.

    changes: what would make it fit, each alone, the smallest first, with the bytes it then takes.
    """

    fits: bool
    spare: int
    batch: int
    length: int
    changes: list[tuple[str, int]]


def advise(config: PreTrainedConfig, setting: Setting, memory: int) -> Advice:
    """For a device on which tensors may take `memory` bytes."""

    def total(changed: Setting) -> int:
        return estimate(config, changed).total

    spare = memory - total(setting)
    batch = largest(lambda n: total(replace(setting, batch=n)) <= memory, setting.batch)
    length = largest(lambda n: total(replace(setting, length=n)) <= memory, setting.length)
    changes = []
    if spare < 0:
        smaller = [(word, total(changed)) for word, changed in changes_of(setting)]
        smaller += [(f"batch {batch}", total(replace(setting, batch=batch)))] if 0 < batch < setting.batch else []
        smaller += [(f"length {length}", total(replace(setting, length=length)))] if 1 < length < setting.length else []
        changes = [(word, held) for word, held in smaller if held <= memory]
    return Advice(spare >= 0, spare, batch, length, changes)


def changes_of(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """What may be changed without training on less at a time, the least harmful first."""
    if setting.spec is None:
        yield from packed(setting)
        return
    if not setting.checkpointing:
        yield "gradient checkpointing", replace(setting, checkpointing=True)
    if setting.optimizer == "adamw":
        yield "optimizer adamw8bit", replace(setting, optimizer="adamw8bit")
    if not setting.spec.trains_base:
        yield from packed(setting)
        if not setting.checkpointing:
            yield from ((f"{word} and gradient checkpointing", replace(s, checkpointing=True)) for word, s in packed(setting))
    spec: Any = setting.spec
    if "rank" in {field.name for field in fields(spec)}:
        yield from ((f"rank {r}", replace(setting, spec=replace(spec, rank=r))) for r in (spec.rank // 2, spec.rank // 4) if r)


def packed(setting: Setting) -> Iterator[tuple[str, Setting]]:
    if setting.base.quantization is None:
        yield "base nf4", replace(setting, base=Storage(torch.bfloat16, "nf4"))


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest n that fits, found by doubling from `start` and halving the gap; 0 if not even 1 does. `fits` must be monotone."""
    low, high = (start, 2 * start) if fits(start) else (0, start)
    while low and high < LARGEST and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
