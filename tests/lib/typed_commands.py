"""Commands as they are typed, what they print as JSON, and files of rows for them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conftest import Done, lorafold


def run(words: str) -> Done:
    return lorafold(*words.split())


def done(words: str) -> Done:
    """The command, which ends well."""
    found = run(words)
    assert found.returncode == 0, found.stderr
    return found


def result(words: str) -> dict[str, Any]:
    """What the command, which ends well, prints with --json."""
    found: dict[str, Any] = json.loads(done(f"{words} --json").stdout.splitlines()[-1])
    return found


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
