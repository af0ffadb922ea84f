"""Estimates the bytes of each term at the peak of memory, from a model's configuration alone.

    found = estimate(config, Setting(Storage(torch.bfloat16), LoRA(rank=16), rows=(2048,) * 4))
    found.total, found.terms["activations"]

The terms follow from what was traced (`memory.trace`) and add up to the peak. All but `process` are
bytes that torch's allocator gives to tensors. For a run on a CPU, `process` adds what else its
process holds, so that the total is the resident memory of the process, without the libraries that
it imports.

What each of n processes holds and sends in a step follows from what one alone would hold:

    w, a, g, s    bytes of the weights, the adapter, its gradients and the optimizer's state
    w_b, g_b      those of one block;  r, g_r those of the largest of embedding and head

    ddp          holds  w + a + g + s, and a bucket in which gradients are summed
                 sends  2 (n - 1) / n g                               a ring's all-reduce
    fsdp         holds  w / n + a + g + s / n + max(w_b, r)
                 sends  (n - 1) / n (2 sum_b w_b + w_e + 2 g + a)     gather twice, sum, updates
    fsdp, full   holds  (w + g + s) / n + max(w_b + g_b, r + g_r)
                 sends  (n - 1) / n (2 sum_b w_b + 3/2 w_e + g)       gather twice, reduce

w_e is what a forward pass gathers for embedding and head, tied ones for each of the two; where they
train, the embedding is gathered once more in the backward pass. This is what
`training_step.sharding` does: one part of the model is whole at a time, quantized weights are
gathered as they are stored, and what is trained beside the base is whole in each, and its state in
one, which sends what it updates. Nothing is sent while it computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafold.memory.ledger import Traced
from lorafold.memory.trace import DDP, Setting, trace
from lorafold.models.fake import period

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What the peaks of processes had over their tensors (`benchmarks/memory_process.py`): bytes for the
# tokenizer and kernels, and the share of tensors that gaps in the heap take.
FIXED, GAPS = 120 * 10**6, 0.05


# what each term is, as the page of an estimate says it
TERMS = {
    "weights": "Every parameter and buffer of the base as it is stored, and of frozen adapters over"
    " it. Quantized weights have codes, constants, and in NF4 constants of the constants (QLoRA,"
    " sec. 3).",
    "adapter": "The parameters that the method adds, 4 bytes each. LoRA adds r (in + out)"
    " parameters to a matrix (Hu et al. 2021, sec. 4.1).",
    "gradients": "One number for every trained parameter, in its dtype, if they exist at the peak.",
    "optimizer": "AdamW's two moments: 8 bytes a trained parameter in fp32, 2.03 in 8 bits"
    " (Dettmers et al. 2022).",
    "activations": "Tensors that the forward pass stores for the backward pass; with gradient"
    " checkpointing one input for each block (Chen et al. 2016), and attention's output for long"
    " documents.",
    "logits": "Tensors of the head and the loss at labelled positions, a chunk at a time, if the"
    " peak is in the forward pass.",
    "kv_cache": "Keys and values: 2 x blocks x key heads x head width x tokens x bytes.",
    "workspace": "Temporary tensors inside a block, if the peak is there.",
    "engine": "What draws the completions of a policy, beside its step: the weights once more in"
    " the order of faster kernels, where they have 16 bits, and the adapter's factors.",
    "exchanged": "What several processes send each other: with fsdp the weights of the largest"
    " part, a block or embedding or head, and their gradients where they train; with ddp a bucket"
    " of gradients.",
    "process": "What the process of a run on a CPU holds besides tensors: its tokenizer and rows,"
    " compiled matmul kernels and their buffers, and gaps in the heap. The libraries themselves do"
    " not count.",
}
BUCKET = 2**26  # bytes of gradients that are summed at a time
SPEED = 4e14  # operations a second: 40% of what an H100 does at most in bf16


@dataclass(frozen=True)
class Estimate:
    """Bytes by term, and their sum. `sent` is what one of several processes sends."""

    terms: dict[str, int]
    sent: Traffic | None = None

    @property
    def total(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())


def estimate(config: PreTrainedConfig, setting: Setting) -> Estimate:
    """Estimate the bytes that a model of this configuration takes at its peak, of several processes
    in each.
    """
    few, blocks = max(2, period(config)), config.get_text_config().num_hidden_layers
    traced, sent = trace(config, setting, few), None
    if blocks != few or setting.processes > 1:
        more = few + period(config)
        first, other = traced, trace(config, setting, more)
        traced = first.at(other, (few, more, blocks))
        if setting.processes > 1:
            block = first.a_block(other, more - few)
            traced, sent = shared(
                traced, block, blocks, setting.strategy, setting.processes, owned=setting.owned,
                tied=bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
            )  # fmt: skip
    found = terms_of(traced)
    if setting.resident:
        found["process"] = FIXED + int(GAPS * (sum(found.values()) - traced.exchanged))
    return Estimate(found, sent)


def terms_of(traced: Traced) -> dict[str, int]:
    """The bytes of each term of TERMS at the peak of a step."""
    within = max(traced.forward, traced.backward, traced.late)
    drawing = traced.drawing > within  # the peak is while completions are drawn
    backward = max(traced.backward, traced.late) > traced.forward and not drawing
    peak = max(within, traced.drawing)
    gradients = 0 if drawing else traced.gradients if backward else traced.ahead
    activations = 0 if drawing else min(traced.kept, peak - gradients)
    outside = backward or drawing or traced.kv_cache
    logits = 0 if outside else peak - activations - gradients
    kv_cache = traced.slots if drawing else traced.kv_cache
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
    """What a process sends in a step of one micro-batch.

    bytes: All of it; as much is received.
    operations: Multiplications and additions that it computes in the step.
    """

    bytes: int
    operations: int

    def bandwidth(self, speed: float = SPEED) -> float:
        """The bytes a second, in each direction, at which sending takes as long as computing."""
        return self.bytes * speed / max(1, self.operations)


def shared(
    whole: Traced, block: Traced, blocks: int, strategy: str, processes: int, *, owned: bool,
    tied: bool,
) -> tuple[Traced, Traffic]:
    """(what one of the processes holds, what it sends)."""
    n, part = processes, (processes - 1) / processes
    operations = whole.forward_operations + whole.backward_operations
    if strategy == DDP:
        summed = 2 * part * whole.gradients
        return replace(whole, exchanged=min(BUCKET, whole.gradients)), Traffic(
            int(summed), operations
        )
    outside = whole.weights - blocks * block.weights
    largest = outside if tied else outside // 2
    gradients, beside = n * whole.gradients, 0
    if owned:
        rest = (gradients - blocks * n * block.gradients) // (1 if tied else 2)
        beside = max(n * block.gradients + block.weights, rest + largest)
    held = replace(
        whole,
        weights=-(-whole.weights // n),
        optimizer=-(-whole.optimizer // n),
        exchanged=max(block.weights, largest, beside),
    )
    ends = outside * (2 if tied else 1) * (1.5 if owned else 1)
    learned = gradients if owned else 2 * whole.gradients + whole.adapter
    return held, Traffic(int(part * (2 * blocks * block.weights + ends + learned)), operations)
