"""Estimates the bytes of each term at the peak of memory, from a model's configuration alone.

    found = estimate(config, Setting(Storage(torch.bfloat16), LoRA(rank=16), rows=(2048,) * 4))
    found.total, found.terms["activations"]

The terms are a table of small functions of what was traced (`memory.trace`), and they add up to the
peak. Their docstrings stand on the HTML page. All but `process` are bytes that torch's allocator
gives to tensors. For a run on a CPU, `process` adds what else its process holds, so that the total
is the resident memory of the process, without the libraries that it imports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafold.memory.sharing import Sent, shared
from lorafold.memory.trace import Setting, trace
from lorafold.memory.traced import Traced
from lorafold.models.fake import period

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What the peaks of processes had over their tensors (`benchmarks/memory_process.py`): bytes for the
# tokenizer and kernels, and the share of tensors that gaps in the heap take.
FIXED, GAPS = 120 * 10**6, 0.05


def weights(traced: Traced) -> int:
    """Every parameter and buffer of the base as it is stored, and of frozen adapters over it.

    Quantized weights have codes, constants, and in NF4 constants of the constants (QLoRA, sec. 3).
    """
    return traced.weights


def adapter(traced: Traced) -> int:
    """The parameters that the method adds, 4 bytes each. LoRA adds r (in + out) parameters to a
    matrix (Hu et al. 2021, sec. 4.1).
    """
    return traced.adapter


def gradients(traced: Traced) -> int:
    """One number for every trained parameter, in its dtype, if they exist at the peak."""
    if traced.in_drawing:
        return 0
    return traced.gradients if traced.in_backward else traced.ahead


def optimizer(traced: Traced) -> int:
    """AdamW's two moments: 8 bytes a trained parameter in fp32, 2.03 in 8 bits (Dettmers et al.
    2022).
    """
    return traced.optimizer


def activations(traced: Traced) -> int:
    """Tensors that the forward pass stores for the backward pass; with gradient checkpointing one
    input for each block (Chen et al. 2016), and attention's output for long documents.
    """
    return 0 if traced.in_drawing else min(traced.kept, traced.peak - gradients(traced))


def logits(traced: Traced) -> int:
    """Tensors of the head and the loss at labelled positions, a chunk at a time, if the peak is in
    the forward pass.
    """
    if traced.in_backward or traced.in_drawing or traced.kv_cache:
        return 0
    return traced.peak - activations(traced) - gradients(traced)


def kv_cache(traced: Traced) -> int:
    """Keys and values: 2 x blocks x key heads x head width x tokens x bytes."""
    return traced.slots if traced.in_drawing else traced.kv_cache


def engine(traced: Traced) -> int:
    """What draws the completions of a policy, beside its step: the weights once more in the order
    of faster kernels, where they have 16 bits, and the adapter's factors.
    """
    return traced.engine


def exchanged(traced: Traced) -> int:
    """What several processes send each other: with fsdp the weights of the largest part, a block
    or embedding or head, and their gradients where they train; with ddp a bucket of gradients.
    """
    return traced.exchanged


def workspace(traced: Traced) -> int:
    """Temporary tensors inside a block, if the peak is there."""
    others = (activations, kv_cache, gradients, logits)
    return traced.peak - sum(term(traced) for term in others)


def process(traced: Traced) -> int:
    """What the process of a run on a CPU holds besides tensors: its tokenizer and rows, compiled
    matmul kernels and their buffers, and gaps in the heap. The libraries themselves do not count.
    """
    return traced.process


TERMS: dict[str, Callable[[Traced], int]] = {
    f.__name__: f
    for f in (
        weights,
        adapter,
        gradients,
        optimizer,
        activations,
        logits,
        kv_cache,
        workspace,
        engine,
        exchanged,
        process,
    )
}


@dataclass(frozen=True)
class Estimate:
    """Bytes by term, and their sum. `sent` is what one of several processes sends."""

    terms: dict[str, int]
    sent: Sent | None = None

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())


def estimate(config: PreTrainedConfig, setting: Setting) -> Estimate:
    """Estimate the bytes that a model of this configuration takes at its peak, of several processes
    in each.

    Raises LorafoldError as `attach` does, and if the model's code does not run on fake tensors.
    """
    few, blocks = max(2, period(config)), config.get_text_config().num_hidden_layers
    traced, sent = trace(config, setting, few), None
    if blocks != few or setting.processes > 1:
        more = few + period(config)
        other = trace(config, setting, more)
        block, traced = traced.a_block(other, more - few), traced.at(other, (few, more, blocks))
        if setting.processes > 1:
            traced, sent = shared(
                traced, block, blocks, setting.strategy, setting.processes, owned=setting.owned,
                tied=bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
            )  # fmt: skip
    if setting.resident:
        tensors = traced.weights + traced.adapter + traced.optimizer + traced.engine + traced.peak
        traced = replace(traced, process=FIXED + int(GAPS * tensors))
    return Estimate({name: term(traced) for name, term in TERMS.items()}, sent)
