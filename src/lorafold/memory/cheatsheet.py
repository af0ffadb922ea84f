"""The memory cheatsheet, which compares rules of thumb with lorafold's estimates for Llama's
shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lorafold.files.terminal import format_bytes
from lorafold.memory.estimate import estimate
from lorafold.memory.presets import llama, memory_setting
from lorafold.recipe.recipe import Recipe
from lorafold.runtime.assumed_device import DeviceKind

# rules of thumb: parameters times bytes; 2 x blocks x heads x width x tokens x bytes; 16 bytes for
# a trained parameter: 4 in fp32, 4 for its gradient and 8 for AdamW's two moments (or 2, 2, 8 and 4
# for a master copy). They ignore the constants of quantized weights and count all weights as
# quantized.
EXAMPLES: dict[str, tuple[str, float]] = {
    "7B in bf16": ("7.0e9 x 2", 7.0e9 * 2),
    "its KV cache at 4096 tokens": ("2 x 32 x 32 x 128 x 4096 x 2", 2.0 * 32 * 32 * 128 * 4096 * 2),
    "states of 40M adapter parameters": ("16 x 40e6", 16 * 40e6),
    "full fine-tuning of 7B, without activations": ("16 x 7.0e9", 16 * 7.0e9),
}


@dataclass(frozen=True)
class Case:
    """A row of the table. `rule` is the result of the rule of thumb (GB), `reason` explains the
    difference from the estimate, and `recipe` has fields in addition to the mode's.
    """

    size: str
    mode: str
    batch: int
    length: int
    rule: float
    reason: str
    recipe: dict[str, Any] = field(default_factory=dict)


CHECKPOINTING = {"gradient_checkpointing": True}
CASES = (
    Case(
        "7b", "inference", 1, 2048, 16,
        "the rule counts 7.0e9 parameters, although the model has 6.74e9, and adds a round number"
        " for the rest",
    ),
    Case(
        "7b", "inference", 1, 32768, 30,
        "the prompt is one forward pass, in which the MLP's activations of 32,768 tokens are 3 GB",
    ),
    Case(
        "7b", "full", 4, 2048, 110,
        "the rule ignores activations, which are small with checkpointing; 6.74e9 x 16 is 107.8",
        CHECKPOINTING,
    ),
    Case(
        "7b", "lora", 4, 2048, 25,
        "without checkpointing, activations are 4.4 MB per token, not 0.5 MB as in the rule",
    ),
    Case(
        "7b", "lora", 4, 2048, 25,
        "0.26 MB per token: a block input of 4096 numbers for each block, and one whole block",
        CHECKPOINTING,
    ),
    Case(
        "7b", "qlora", 4, 2048, 12,
        "activations are the same as for LoRA; quantized weights do not change them",
    ),
    Case(
        "7b", "qlora", 4, 2048, 12,
        "the same; quantized weights take 0.52 bytes each, the embedding and the head 2",
        CHECKPOINTING,
    ),
    Case("70b", "qlora", 1, 2048, 45, "the rule assumes checkpointing", CHECKPOINTING),
    Case(
        "65b", "qlora", 1, 512, 32.5 + 0.6 + 5,
        "by the rule 32.5 for the base, 0.6 for states and 5 for activations; r = 16 on every "
        "linear layer trains 200M parameters, not 40M",
        CHECKPOINTING,
    ),
)


def table() -> Iterator[tuple[str, ...]]:
    yield "model", "mode", "batch x tokens", "the rule", "estimate", "estimate / rule", "why"
    for case in CASES:
        setting = memory_setting(case.mode, Recipe(**case.recipe), case.batch, case.length)
        total = estimate(llama(case.size), replace(setting, device_kind=DeviceKind("cuda"))).total
        yield (
            case.size.upper(),
            case.mode + ", checkpointing" * bool(case.recipe),
            f"{case.batch} x {case.length}",
            f"{case.rule:.3g} GB",
            format_bytes(total),
            f"{total / (case.rule * 1e9):.0%}",
            case.reason,
        )


def markdown() -> str:
    worked = [
        ("what", "the rule", "bytes"),
        *((what, formula, format_bytes(round(n))) for what, (formula, n) in EXAMPLES.items()),
    ]
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
        for head, *lines in (worked, list(table()))
    )
