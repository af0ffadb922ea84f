"""Bytes by term: what a setting holds at its peak, from an architecture's configuration alone.

    found = estimate(config, Setting(Storage(torch.bfloat16, "nf4"), LoRA(rank=16), rows=(2048,) *
    4))
    found.total, found.terms["activations"]

The terms are a table of small functions over what was traced (`memory.trace`); they add up to the
peak. What is counted is what torch's allocator gives out. The process itself, kernels' own scratch
and the allocator's gaps come on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafold.memory.trace import Held, Setting, trace
from lorafold.models.fake import period

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def weights(held: Held) -> int:
    """Every parameter and buffer of the base as it is stored.

    Packed: codes, constants, constants of constants (QLoRA, sec. 3).
    """
    return held.weights


def adapter(held: Held) -> int:
    """What the method adds, 4 bytes a parameter: r (in + out) a matrix for LoRA (Hu et al. 2021,
    sec. 4.1).
    """
    return held.adapter


def gradients(held: Held) -> int:
    """One number for every trained one, in its dtype, if the peak comes when they are there."""
    return held.gradients if held.in_backward else held.ahead


def optimizer(held: Held) -> int:
    """AdamW's two moments: 8 bytes a trained parameter in fp32, 2.03 in 8 bits (Dettmers et al.
    2022).
    """
    return held.optimizer


def activations(held: Held) -> int:
    """What the forward keeps for the backward; with checkpointing one input a block (Chen et al.
    2016).
    """
    return min(held.kept, held.peak - gradients(held))


def logits(held: Held) -> int:
    """What head and loss hold at labelled positions, a chunk at a time, if the peak is there."""
    return (
        0 if held.in_backward or held.kv_cache else held.peak - activations(held) - gradients(held)
    )


def kv_cache(held: Held) -> int:
    """2 x blocks x key heads x head width x tokens x bytes."""
    return held.kv_cache


def workspace(held: Held) -> int:
    """What comes and goes inside a block, if the peak is there."""
    return held.peak - activations(held) - kv_cache(held) - gradients(held) - logits(held)


TERMS: dict[str, Callable[[Held], int]] = {
    f.__name__: f
    for f in (weights, adapter, gradients, optimizer, activations, logits, kv_cache, workspace)
}


@dataclass(frozen=True)
class Estimate:
    """Bytes by term, and their sum."""

    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def estimate(config: PreTrainedConfig, setting: Setting) -> Estimate:
    """What the model of that configuration holds at its peak.

    LorafoldError as `attach` and `trace` have it.
    """
    few, blocks = max(2, period(config)), config.get_text_config().num_hidden_layers
    held = trace(config, setting, few)
    if blocks != few:
        more = few + period(config)
        held = held.at(trace(config, setting, more), (few, more, blocks))
    return Estimate({name: term(held) for name, term in TERMS.items()})
