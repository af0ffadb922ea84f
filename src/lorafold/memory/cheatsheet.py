"""The memory cheatsheet, which compares rules of thumb with lorafold's estimates for Llama's
shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import yaml

from lorafold.files.terminal import format_bytes
from lorafold.memory.estimate import estimate
from lorafold.memory.presets import llama, memory_setting
from lorafold.recipe.recipe import Recipe
from lorafold.runtime.assumed_device import DeviceKind

TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EXAMPLES: dict[str, str] = TABLES["examples"]


def table() -> Iterator[tuple[str, ...]]:
    yield "model", "mode", "batch x tokens", "the rule", "estimate", "estimate / rule", "why"
    for case in TABLES["cases"]:
        fields = case.get("recipe", {})
        setting = memory_setting(case["mode"], Recipe(**fields), case["batch"], case["length"])
        setting = replace(setting, device_kind=DeviceKind("cuda"))
        total = estimate(llama(case["size"]), setting).total
        yield (
            case["size"].upper(),
            case["mode"] + ", checkpointing" * bool(fields),
            f"{case['batch']} x {case['length']}",
            f"{case['rule']:.3g} GB",
            format_bytes(total),
            f"{total / (case['rule'] * 1e9):.0%}",
            case["reason"],
        )


def result(formula: str) -> float:
    """Multiplies the numbers in `a x b x c`."""
    return prod(map(float, formula.split(" x ")))


def markdown() -> str:
    worked = [
        ("what", "the rule", "bytes"),
        *((what, rule, format_bytes(round(result(rule)))) for what, rule in EXAMPLES.items()),
    ]
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))
        for head, *lines in (worked, list(table()))
    )
