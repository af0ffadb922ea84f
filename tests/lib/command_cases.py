"""Commands with options by name, the JSON that they print, and files of rows for them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from conftest import lorafold
from lorafold.cli import app


def words(*arguments: object, **options: Any) -> list[str]:
    """The words of a command: an option that is True is a flag, and one with a list is repeated."""
    found = [*map(str, arguments)]
    for name, value in options.items():
        option = f"--{name.rstrip('_').replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            found += [option] if one is True else [option, str(one)]
    return found


def printed(*arguments: object, **options: Any) -> dict[str, Any]:
    """The JSON that a command prints last."""
    given = words(*arguments, **options, json=True)
    done = CliRunner().invoke(app, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def error_of(*arguments: str) -> str:
    """The one line with which a command is refused, after notices."""
    done = lorafold(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    return line


def rows_file(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
