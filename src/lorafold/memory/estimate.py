"""Estimates peak memory, in bytes by term, from a model's configuration.

The terms come from a trace (`memory.trace`). Each of n processes holds and sends in a step:

    w, a, g, s    bytes of the weights, the adapter, its gradients and the optimizer's state
    w_b, g_b      of one block;  r, g_r of the largest of embedding and head
    w_e           bytes gathered for embedding and head in a forward pass (tied: twice)

    ddp          holds  w + a + g + s, and a gradient bucket
                 sends  2 (n - 1) / n g                               a ring's all-reduce
    fsdp         holds  w / n + a + g + s / n + max(w_b, r)
                 sends  (n - 1) / n (2 sum_b w_b + w_e + 2 g + a)     gather twice, sum, updates
    fsdp, full   holds  (w + g + s) / n + max(w_b + g_b, r + g_r)
                 sends  (n - 1) / n (2 sum_b w_b + 3/2 w_e + g)       gather twice, reduce
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lorafold.memory.trace import DDP, MemorySetting, StepTrace, trace
from lorafold.models.fake import period
from lorafold.models.quantizations import DEFAULT, Storage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Measured memory of processes beyond their tensors (`benchmarks/memory_process.py`): bytes for the
# tokenizer and kernels, and heap fragmentation as a share of the tensors.
PROCESS_BYTES, HEAP_GAPS = 120 * 10**6, 0.05
# term -> its explanation on the HTML page of an estimate
TERMS: dict[str, str] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
GRADIENT_BUCKET = 2**26  # bytes of gradients that are summed at a time
SPEED = 4e14  # operations per second: 40% of an H100's peak in bf16


@dataclass(frozen=True)
class Estimate:
    """The memory at the peak, in bytes by term. With several processes, `sent` is the traffic of
    one.
    """

    terms: dict[str, int]
    sent: Traffic | None = None

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def shown(self) -> dict[str, int]:
        """The nonzero terms, by readable names."""
        return {name.replace("_", " "): n for name, n in self.terms.items() if n}


def estimate(config: PreTrainedConfig, setting: MemorySetting) -> Estimate:
    """Estimates the peak memory of each process."""
    text = config.get_text_config()
    few, blocks = max(2, period(config)), text.num_hidden_layers
    traced, sent = trace(config, setting, few), None
    if blocks != few or setting.processes > 1:
        more = few + period(config)
        first, other = traced, trace(config, setting, more)
        traced = first.extrapolated(other, (few, more, blocks))
        if setting.processes > 1:
            pairs = zip(astuple(first), astuple(other), strict=True)
            block = StepTrace(*((b - a) // (more - few) for a, b in pairs))
            tied = bool(getattr(text, "tie_word_embeddings", False))
            traced, sent = per_process(traced, block, blocks, setting, tied)
    terms = terms_of(traced)
    if setting.resident:
        terms["process"] = PROCESS_BYTES + int(HEAP_GAPS * (sum(terms.values()) - traced.exchanged))
    return Estimate(terms, sent)


def terms_of(traced: StepTrace) -> dict[str, int]:
    in_backward = max(traced.backward, traced.second_half)
    within = max(traced.forward, in_backward)
    sampling = traced.sampling_peak > within  # the peak occurs during sampling
    backward = in_backward > traced.forward and not sampling
    peak = max(within, traced.sampling_peak)
    gradients = 0 if sampling else traced.gradients if backward else traced.initial_gradients
    activations = 0 if sampling else min(traced.activations, peak - gradients)
    logits = 0 if backward or sampling or traced.kv_cache else peak - activations - gradients
    kv_cache = traced.slots if sampling else traced.kv_cache
    return {
        "weights": traced.weights,
        "adapter": traced.adapter,
        "gradients": gradients,
        "optimizer": traced.optimizer,
        "activations": activations,
        "logits": logits,
        "kv_cache": kv_cache,
        "workspace": peak - activations - kv_cache - gradients - logits,
        "engine": traced.engine,
        "exchanged": traced.exchanged,
        "process": 0,
    }


@dataclass(frozen=True)
class Traffic:
    """The bytes that a process sends (and receives) in a step of one micro-batch, and the
    multiplications and additions that it computes.
    """

    bytes: int
    operations: int

    def bandwidth(self, speed: float) -> float:
        """The bytes per second, in each direction, at which sending takes as long as computing."""
        return self.bytes * speed / max(1, self.operations)


def per_process(
    step: StepTrace, block: StepTrace, blocks: int, setting: MemorySetting, tied: bool
) -> tuple[StepTrace, Traffic]:
    """The memory and traffic of one of several processes, from the step of a single process. If the
    base is trained, that step must have sharded gradients. Embedding and head may be `tied`.
    """
    n, trains_base = setting.processes, setting.trains_base
    part = (n - 1) / n
    operations = step.forward_operations + step.backward_operations
    if setting.strategy == DDP:
        terms = replace(step, exchanged=min(GRADIENT_BUCKET, step.gradients))
        return terms, Traffic(int(2 * part * step.gradients), operations)
    outside = step.weights - blocks * block.weights
    largest = outside if tied else outside // 2
    gradients, with_gradients = n * step.gradients, 0
    if trains_base:
        rest = (gradients - blocks * n * block.gradients) // (1 if tied else 2)
        with_gradients = max(n * block.gradients + block.weights, rest + largest)
    terms = replace(
        step,
        weights=-(-step.weights // n),
        optimizer=-(-step.optimizer // n),
        exchanged=max(block.weights, largest, with_gradients),
    )
    ends = outside * (2 if tied else 1) * (1.5 if trains_base else 1)
    sums = gradients if trains_base else 2 * step.gradients + step.adapter
    return terms, Traffic(int(part * (2 * blocks * block.weights + ends + sums)), operations)


MAX_BATCH = 4096  # the largest batch to try
MAX_TRACED = 2**14  # tokens; the memory of larger settings is extrapolated


@dataclass(frozen=True)
class Advice:
    """Whether a setting fits in memory. `spare` is the number of bytes left, or missing if
    negative.

    `batch` is the largest batch that fits at the setting's length, up to 4096, and `length` the
    largest length at its batch, up to the model's context. They are 0 if not even 1 fits, and None
    for the rows of a run. `changes` are single changes with which the setting would fit, the least
    harmful first, with the bytes needed.
    """

    fits: bool
    spare: int
    batch: int | None
    length: int | None
    changes: list[tuple[str, int]]


def advise(config: PreTrainedConfig, setting: MemorySetting, memory: int) -> Advice:
    """Advice on a setting for a device's memory: whether it fits, and which other settings would
    fit.
    """

    @cache
    def total(batch: int, length: int) -> int:
        return estimate(config, replace(setting, rows=(length,) * batch)).total

    rows, tokens = setting.batch, setting.length
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_TRACED
    batch = max_fit(lambda n: total(n, tokens), rows, memory, MAX_BATCH, MAX_TRACED // tokens)
    length = max_fit(lambda n: total(rows, n), tokens, memory, context, MAX_TRACED // rows)
    advice = _advice(config, setting, memory, total(rows, tokens))
    if not advice.fits:
        smaller = {f"batch {batch}": (batch, tokens)} if 0 < batch < rows else {}
        smaller |= {f"length {length}": (rows, length)} if 1 < length < tokens else {}
        totals = [(name, total(*size)) for name, size in smaller.items()]
        advice.changes.extend((name, n) for name, n in totals if n <= memory)
    return replace(advice, batch=batch, length=length)


def advise_on_rows(config: PreTrainedConfig, setting: MemorySetting, memory: int) -> Advice:
    """Like `advise`, for the rows of a run, whose number and lengths are fixed."""
    return _advice(config, setting, memory, estimate(config, setting).total)


def _advice(config: PreTrainedConfig, setting: MemorySetting, memory: int, total: int) -> Advice:
    spare = memory - total
    tried = changes_of(setting) if spare < 0 else ()
    totals = [(name, estimate(config, changed).total) for name, changed in tried]
    return Advice(spare >= 0, spare, None, None, [(name, n) for name, n in totals if n <= memory])


def changes_of(setting: MemorySetting) -> Iterator[tuple[str, MemorySetting]]:
    """Yields changes that keep batch and length, the least harmful first, each as its name and the
    changed setting.
    """
    spec: Any = setting.spec
    in_place = spec is not None and spec.trains_base
    recomputes = spec is not None and not setting.checkpointing
    if recomputes:
        yield "gradient checkpointing", replace(setting, checkpointing=True)
    # trained 16-bit weights need stochastic rounding, which only adamw supports
    narrow = in_place and setting.base.dtype.itemsize == 2
    if spec is not None and setting.optimizer == "adamw" and not narrow:
        yield "optimizer adamw8bit", replace(setting, optimizer="adamw8bit")
        if in_place:
            yield "storage bf16", replace(setting, base=Storage(torch.bfloat16))
    if not in_place and setting.base.quantization is None:
        smaller = replace(setting, base=Storage(torch.bfloat16, DEFAULT))
        yield f"storage {DEFAULT}", smaller
        if recomputes:
            both = f"storage {DEFAULT} and gradient checkpointing"
            yield both, replace(smaller, checkpointing=True)
    rank = getattr(spec, "rank", 0)
    for r in (rank // 2, rank // 4):
        if r:
            yield f"rank {r}", replace(setting, spec=replace(spec, rank=r))


def max_fit(total: Callable[[int], int], start: int, memory: int, most: int, traced: int) -> int:
    """The largest n, up to `most`, for which `total(n)` fits in memory, or 0. Totals are nearly
    affine in n, so n is extrapolated from the totals of two smaller values, which `traced` limits.
    The result is checked with `total` only if it is at most four times the larger of the two.
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
