"""What a user is told: the error, which is one line, and the lines about rows."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lorafold.api.arguments import as_rows
from lorafold.data.row_sources import Reading
from lorafold.errors import LorafoldError


def refusal(do: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message with which a call is refused."""
    with pytest.raises(LorafoldError) as caught:
        do(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def told_of(data: Any, columns: dict[str, str] | None = None, **options: Any) -> str:
    """The lines about rows that are read."""
    console = Console(file=io.StringIO(), width=1000)
    data = str(data) if isinstance(data, Path) else data
    as_rows(data, Reading(columns or {}), console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]
