"""Reads a user's rows from JSONL, JSON, Parquet, a directory or a hub dataset, and checks that all
are well-formed and of one shape.

| shape | row |
|---|---|
| conversation | `{"messages": [{"role": ..., "content": ...}, ...]}` |
| prompt, completion | `{"prompt": ..., "completion": ...}`, both text or both lists of messages |
| labelled text | `{"text": ..., "label": ...}`, the label text or a whole number |
| plain text | `{"text": ...}` |

Further keys are ignored. One error message lists everything that is wrong, each with its file, row
(in a JSONL file the line, from 1), field, and what was found and expected. `SHAPES` is the table
of shapes: a new shape is a new entry.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError

Row = dict[str, Any]
Message = dict[str, Any]
LISTED = 10  # bad rows that one message lists


@dataclass(frozen=True)
class Conversation:
    """The messages of one row. The assistant turns from index `trained` on are trained on."""

    messages: list[Message]
    trained: int = 0


@dataclass(frozen=True)
class Shape:
    """One shape of rows: the keys by which it is recognized, the objective that trains on it, a
    function that lists what is wrong with a row, and one that gives the row's messages (None for
    plain and labelled text).
    """

    keys: tuple[str, ...]
    objective: str
    problems: Callable[[Row], Iterator[str]]
    conversation: Callable[[Row], Conversation] | None = None

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"


def read_rows(source: str) -> list[Row]:
    """Read the rows of a .jsonl, .json or .parquet file, a directory, or a hub dataset (its train
    split).

    Raises LorafoldError if the source can't be read, has no row, or has bad rows (all are counted,
    the first ten listed).
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        return check_rows(_json_rows(path), source)
    return check_rows(enumerate(_dataset(source, path), 1), source)


def check_rows(numbered: Iterable[tuple[int, Row | str]], source: str) -> list[Row]:
    """Return the rows, once they are known to be well-formed and of one shape.

    Raises LorafoldError that lists the first ten bad rows, or says that there is no row.

    Args:
        numbered: (number, row) pairs. A str in place of a row is the reason why that row could not
            be read.
        source: The name of the data in messages, such as the path of a file.
    """
    rows: list[Row] = []
    bad: list[str] = []
    first: tuple[int, Shape] | None = None
    for number, row in numbered:
        if isinstance(row, str):
            bad.append(f"row {number}: {row}")
            continue
        shape = shape_of(row)
        if shape is None:
            keys = ", ".join(repr(key) for key in row) or "none"
            bad.append(
                f"row {number}: keys found: {keys}; expected one of {', '.join(map(str, SHAPES))}"
            )
            continue
        first = first or (number, shape)
        problems = list(shape.problems(row))
        if shape is not first[1]:
            problems.append(f"shape {shape}, but row {first[0]} has {first[1]}")
        bad += [f"row {number}: {problem}" for problem in problems]
        rows.append(row)
    if bad:
        more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise LorafoldError(f"{source}: {'; '.join(bad[:LISTED])}{more}")
    if not rows:
        raise LorafoldError(f"{source}: no rows found, expected at least one")
    return rows


def shape_of(row: Row) -> Shape | None:
    """Return the first shape whose keys the row has (a key with the value null counts as absent),
    or None if there is none.
    """
    return next(
        (shape for shape in SHAPES if all(row.get(key) is not None for key in shape.keys)), None
    )


def is_labelled(rows: Sequence[Row]) -> bool:
    """Tell whether the rows are labelled texts, for a classifier."""
    return (shape := shape_of(rows[0])) is not None and shape.objective == "classify"


def check_objective(rows: Sequence[Row], objective: str) -> None:
    """Raise LorafoldError if the objective does not train on rows of this shape."""
    shape = shape_of(rows[0])
    if shape is None or shape.objective != objective:
        takes = " or ".join(str(s) for s in SHAPES if s.objective == objective)
        other = f", which are for --objective {shape.objective}" if shape else ""
        raise LorafoldError(
            f"data: found rows of {shape}{other}; --objective {objective} expects rows of"
            f" {takes}"
        )


def _json_rows(path: Path) -> Iterator[tuple[int, Row | str]]:
    try:
        if path.suffix == ".json" and path.read_bytes().lstrip()[:1] == b"[":
            for number, value in enumerate(json.loads(path.read_bytes()), 1):
                yield number, _an_object(value)
            return
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line.removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise LorafoldError(
            f"{path}: line {error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from error


def _parse(line: bytes) -> Row | str:
    try:
        return _an_object(json.loads(line))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"


def _an_object(value: Any) -> Row | str:
    return value if isinstance(value, dict) else f"found {_kind(value)}, expected an object"


def _dataset(source: str, path: Path) -> Iterable[Row]:
    local = path.exists()
    if not local and (
        path.suffix == ".parquet" or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)
    ):
        raise LorafoldError(
            f"{source}: no such file or directory, expected .jsonl, .json, .parquet, a directory or"
            " a hub dataset id"
        )
    if path.is_file() and path.suffix != ".parquet":
        raise LorafoldError(
            f"{source}: found a {path.suffix or 'nameless'} file, expected .jsonl, .json or"
            " .parquet"
        )
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        if path.is_file():
            found = load_dataset("parquet", data_files=source)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = load_from_disk(source)  # the directory was written by save_to_disk
        else:
            found = load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = (
            "can't be read"
            if local
            else "there is no such file, and it can't be loaded as a hub dataset"
        )
        raise LorafoldError(f"{source}: {what}: {reason}") from error
    if not isinstance(found, DatasetDict):
        return found
    if "train" not in found and len(found) != 1:
        raise LorafoldError(
            f"{source}: found the splits {', '.join(found)}; expected only one, or one named train"
        )
    return found["train"] if "train" in found else next(iter(found.values()))


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _text(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"field {name}: found {_kind(value)}, expected text"


def _messages(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, list) or not value:
        yield (
            f"field {name}: found {'an empty list' if value == [] else _kind(value)}, expected a"
            " list of messages"
        )
        return
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            yield (
                f"field {name}[{index}]: found {_kind(message)}, expected an object with role and"
                " content"
            )
            continue
        for key in ("role", "content"):
            yield from _text(f"{name}[{index}].{key}", message.get(key))


def _pair(row: Row) -> Iterator[str]:
    prompt, completion = row["prompt"], row["completion"]
    check = _messages if isinstance(prompt, list) else _text
    if (
        isinstance(prompt, str | list)
        and isinstance(completion, str | list)
        and type(prompt) is not type(completion)
    ):
        yield (
            f"fields prompt and completion: found {_kind(prompt)} and {_kind(completion)}, expected"
            " both text or both lists of messages"
        )
        return
    yield from check("prompt", prompt)
    yield from check("completion", completion)


def _labelled(row: Row) -> Iterator[str]:
    yield from _text("text", row["text"])
    if not isinstance(row["label"], str | int) or isinstance(row["label"], bool):
        yield f"field label: found {_kind(row['label'])}, expected text or a whole number"


def _pair_conversation(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt, completion = (
            [{"role": "user", "content": prompt}],
            [{"role": "assistant", "content": completion}],
        )
    return Conversation([*prompt, *completion], trained=len(prompt))


SHAPES = (
    Shape(
        ("messages",),
        "sft",
        lambda row: _messages("messages", row["messages"]),
        lambda row: Conversation(row["messages"]),
    ),
    Shape(("prompt", "completion"), "sft", _pair, _pair_conversation),
    Shape(("text", "label"), "classify", _labelled),
    Shape(("text",), "sft", lambda row: _text("text", row["text"])),
)
