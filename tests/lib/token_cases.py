"""Runs with tokens of their own, and what a command or a function prints."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from typer.testing import CliRunner

from lorafold.cli import app
from lorafold.recipe.recipe import Recipe
from lorafold.resolve import Base
from lorafold.training.finish import Trained
from lorafold.training.inputs import RunRequest
from lorafold.training.run import train

ROWS: list[dict[str, Any]] = [
    {"messages": [
        {"role": "user", "content": f"Book a table for {n}"},
        {"role": "assistant", "content": f'{{"people": {n}}}'},
    ]}
    for n in range(24)
]  # fmt: skip


def request(model: Path | str, out: Path, rows: Any = ROWS, **fields: Any) -> RunRequest:
    extra = {k: fields.pop(k) for k in ("resume", "overwrite", "init_adapter") if k in fields}
    tokens = ("<|user|>", "<|assistant|>")
    fields = {"steps": 8, "batch": 4, "storage": "fp32", "new_tokens": tokens} | fields
    recipe = Recipe(**{name: value for name, value in fields.items() if value is not None})
    return RunRequest(Base(model, device="cpu"), out, recipe, rows, "rows", **extra)


def quiet() -> Console:
    return Console(quiet=True)


def trained(
    model: Path | str, out: Path, rows: list[dict[str, Any]] = ROWS, **fields: Any
) -> Trained:
    return train(request(model, out, rows, **fields), quiet())


def said(do: Any, *arguments: Any) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    do(*arguments, console)
    return console.export_text()


def lorafold(*arguments: object) -> Any:
    return CliRunner().invoke(
        app, [*map(str, arguments), "--device", "cpu"], catch_exceptions=False
    )
