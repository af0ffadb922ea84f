"""Labelled texts, and requests for short runs on them."""

from pathlib import Path
from typing import Any

from rich.console import Console

from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest

TEXTS = {
    "booking": ["Book a table for {}", "A table for {} please", "Book the corner for {} tonight"],
    "weather": [
        "Rain in the mountains, day {}",
        "It rains while the fox jumps {} times",
        "Fair weather for {} hours",
    ],
    "alarm": [
        "Remind me in {} minutes",
        "Set an alarm for {}",
        "Call me tomorrow at {}, then the plumber",
    ],
}
ROWS = [
    {"text": text.format(n), "label": label}
    for n in range(4)
    for label, texts in TEXTS.items()
    for text in texts
]


def request(model: Path, out: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any) -> RunRequest:
    names = ("resume", "overwrite", "eval_rows", "init_adapter", "over")
    extra = {k: fields.pop(k) for k in names if k in fields}
    recipe = Recipe(**{"objective": "classify", "steps": 6, "batch": 9, "storage": "fp32"} | fields)
    return RunRequest(Base(model, device="cpu"), out, recipe, rows, "rows", **extra)


def quiet() -> Console:
    return Console(quiet=True)
