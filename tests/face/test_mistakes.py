"""Mistakes as people type them: each is told in one line with exit code 2, and leaves nothing."""

import socket
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import lorafold
from lorafold.cli import COMMANDS
from mistake_cases import fill, seen

Typed = Callable[[str], tuple[list[str], int]]
LONGEST = 300
TRAIN = "train --model base --data rows.jsonl --out out"
ON = "train --model base --out out --data"
SHORT = {"TRAIN": TRAIN, "ON": ON}
TABLES = tomllib.loads(Path(__file__).with_name("mistakes.toml").read_text(encoding="utf-8"))
LATE, SAID = TABLES.pop("late"), TABLES.pop("said")
MISTAKES = {command: phrase for table in TABLES.values() for command, phrase in table.items()}


@pytest.fixture(scope="module")
def room(tiny_model_dir, tmp_path_factory) -> Path:
    return fill(tmp_path_factory.mktemp("room"), tiny_model_dir("llama"), tiny_model_dir("gpt2"))


@pytest.fixture(scope="module")
def before(room: Path) -> set[tuple[str, int, int]]:
    return seen(room)


@pytest.fixture
def typed(room: Path, before: set[tuple[str, int, int]], monkeypatch) -> Iterator[Typed]:
    """Runs a command in the directory, which stays as it is: what is on stderr, and the code."""
    monkeypatch.chdir(room)

    def run(command: str) -> tuple[list[str], int]:
        first, _, rest = command.partition(" ")
        done = lorafold(*f"{SHORT.get(first, first)} {rest}".split())
        lines = done.stderr.splitlines()
        is_train = "".join(lines[:1]).startswith("lorafold ")
        return lines[is_train:], done.returncode  # without the first line of `train`

    yield run
    assert seen(room) == before


def is_told(line: str, phrase: str) -> bool:
    return line.startswith("error: ") and len(line) < LONGEST and phrase in line


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_in_one_line(command: str, room: Path, typed: Typed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        asked = command.replace("{port}", str(taken.getsockname()[1]))
        [line], code = typed(asked)
    assert is_told(line, MISTAKES[command].replace("{room}", str(room))), line
    assert code == 2


@pytest.mark.parametrize("command", LATE)
def test_what_is_found_later_is_told_last(command: str, typed: Typed) -> None:
    [*notices, line], code = typed(command)
    assert is_told(line, LATE[command]), line
    assert [one for one in notices if "error" in one or "no estimate" in one] == []
    assert code == 2


@pytest.mark.parametrize("command", SAID)
def test_what_is_taken_as_it_is_is_said(command: str, typed: Typed) -> None:
    lines, code = typed(command)
    assert [line for line in lines if SAID[command] in line] != []
    assert code == 0


def test_all_commands_are_mistyped() -> None:
    firsts = {SHORT.get(c.split()[0], c).split()[0] for c in {**MISTAKES, **LATE}}
    assert COMMANDS.keys() - firsts == set()
