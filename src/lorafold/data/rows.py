"""User data in: JSONL, JSON, Parquet, a directory or a hub dataset, to checked rows of one shape.

| shape | row |
|---|---|
| conversation | `{"messages": [{"role": ..., "content": ...}, ...]}` |
| prompt, completion | `{"prompt": ..., "completion": ...}`, both text or both lists of messages |
| labelled text | `{"text": ..., "label": ...}`, the label text or a whole number |
| plain text | `{"text": ...}` |

Further keys are ignored. Whatever is wrong is told in one message with file, row (the line of a
JSONL file, from 1), field, found and expected. `SHAPES` is the one table: a new shape is a new
entry.
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
LISTED = 10  # bad rows told in one message


@dataclass(frozen=True)
class Conversation:
    """Messages of one row; assistant turns from index `trained` on are what the model shall
    learn.
    """

    messages: list[Message]
    trained: int = 0


@dataclass(frozen=True)
class Shape:
    """One form of a row: the keys that mark it, the objective that trains on it, what is wrong with
    a row, and its messages (None: it has none).
    """

    keys: tuple[str, ...]
    objective: str
    problems: Callable[[Row], Iterator[str]]
    conversation: Callable[[Row], Conversation] | None = None

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"


def read_rows(source: str) -> list[Row]:
    """Rows of a .jsonl or .json file, a .parquet file, a directory, or a hub dataset id (its train
    split).

    Raises LorafoldError where the source can't be read, holds no row, or holds bad rows (all
    counted, the first ten listed).
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        return check_rows(_json_rows(path), source)
    return check_rows(enumerate(_dataset(source, path), 1), source)


def check_rows(numbered: Iterable[tuple[int, Row | str]], source: str) -> list[Row]:
    """The rows, all of one shape.

    A text in the place of a row is the reason why it could not be read.
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
    """The first shape whose keys the row has (a key that holds null counts as absent)."""
    return next(
        (shape for shape in SHAPES if all(row.get(key) is not None for key in shape.keys)), None
    )


def is_labelled(rows: Sequence[Row]) -> bool:
    """Are these texts with a label, for a classifier?"""
    return (shape := shape_of(rows[0])) is not None and shape.objective == "classify"


def check_objective(rows: Sequence[Row], objective: str) -> None:
    """LorafoldError where rows of this shape are not what the objective trains on."""
    shape = shape_of(rows[0])
    if shape is None or shape.objective != objective:
        takes = " or ".join(str(s) for s in SHAPES if s.objective == objective)
        other = f", which are for --objective {shape.objective}" if shape else ""
        raise LorafoldError(
            f"data: found rows of {shape}{other}; --objective {objective} takes rows of {takes}"
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
            # what save_to_disk leaves
            found = load_from_disk(source)
        else:
            found = load_dataset(source)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = (
            "can't be read" if local else "is no file here, and as a hub dataset it can't be loaded"
        )
        raise LorafoldError(f"{source}: {what}: {reason}") from error
    if not isinstance(found, DatasetDict):
        return found
    if "train" not in found and len(found) != 1:
        raise LorafoldError(
            f"{source}: splits found: {', '.join(found)}; expected one, or one named train"
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
