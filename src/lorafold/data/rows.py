"""The shapes that a user's rows may have, and the check that all are well-formed and of one shape.

| shape | row |
|---|---|
| conversation | `{"messages": [{"role": ..., "content": ...}, ...]}` |
| prompt, completion | `{"prompt": ..., "completion": ...}`, both text or both lists of messages |
| ShareGPT | `{"conversations": [{"from": "human", "value": ...}, ...]}`, with or without `system` |
| Alpaca | `{"instruction": ..., "output": ...}`, with or without `input` and `system` |
| labelled text | `{"text": ..., "label": ...}`, the label text or a whole number |
| plain text | `{"text": ...}` |

Further keys are ignored, and `ignored_keys` names them. One error message lists everything that is
wrong, each with its file, row (in a JSONL file the line, from 1), field, and what was found and
expected. `SHAPES` is the table of shapes: a new shape is a new entry.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafold.data.sources import kind_of, numbered_rows
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
    function that lists what is wrong with a row, one that gives the row's messages (None for
    plain and labelled text), and the keys that a row may have besides.
    """

    keys: tuple[str, ...]
    objective: str
    problems: Callable[[Row], Iterator[str]]
    conversation: Callable[[Row], Conversation] | None = None
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"


def read_rows(source: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read the rows of a .jsonl, .json, .csv or .parquet file, a directory, or a hub dataset (its
    train split).

    `columns` gives keys of the source the names that lorafold knows: {"prompt": "question"}.

    Raises LorafoldError if the source can't be read, has no row, or has bad rows (all are counted,
    the first ten listed).
    """
    return check_rows(renamed(numbered_rows(source), columns or {}), source)


def renamed(
    numbered: Iterable[tuple[int, Row | str]], columns: Mapping[str, str]
) -> Iterator[tuple[int, Row | str]]:
    """Numbered rows whose keys have other names: the value under `columns[name]` is then under
    `name`. A row that lacks one of these keys, or has a value under `name` too, which would be
    lost, becomes the reason why it can't be read.
    """
    theirs = set(columns.values())
    for number, row in numbered:
        if isinstance(row, str) or not columns:
            yield number, row
        elif missing := [key for key in columns.values() if key not in row]:
            keys = ", ".join(map(repr, row)) or "none"
            yield number, f"found no column {', '.join(map(repr, missing))}; it has {keys}"
        elif lost := [name for name in columns if name in row and name not in theirs]:
            pairs = ", ".join(f"{name}={columns[name]}" for name in lost)
            yield number, f"--columns {pairs}: the row has a column {', '.join(lost)} as well"
        else:
            rest = {key: value for key, value in row.items() if key not in theirs}
            yield number, rest | {name: row[key] for name, key in columns.items()}


def check_rows(numbered: Iterable[tuple[int, Row | str]], source: str) -> list[Row]:
    """Return the rows, once they are known to be well-formed and of one shape.

    Raises LorafoldError that lists the first ten bad rows, or says that there is no row.

    Args:
        numbered: (number, row) pairs. A str in place of a row is the reason why that row could not
            be read.
        source: The name of the data in messages, such as the path of a file.
    """
    rows: list[Row] = []
    bad: dict[str, list[int]] = {}  # the rows by what is wrong with them
    first: tuple[int, Shape] | None = None
    for number, row in numbered:
        if isinstance(row, str):
            bad.setdefault(row, []).append(number)
            continue
        shape = shape_of(row)
        if shape is None:
            keys = ", ".join(repr(key) for key in row) or "none"
            shapes = ", ".join(map(str, SHAPES))
            problem = f"keys found: {keys}; expected one of {shapes} (--columns renames)"
            bad.setdefault(problem, []).append(number)
            continue
        first = first or (number, shape)
        problems = list(shape.problems(row))
        if shape is not first[1]:
            problems.append(f"shape {shape}, but row {first[0]} has {first[1]}")
        for problem in problems:
            bad.setdefault(problem, []).append(number)
        rows.append(row)
    if bad:
        told = [f"{_numbers(numbers)}: {problem}" for problem, numbers in bad.items()]
        more = f"; and {len(told) - LISTED} more" if len(told) > LISTED else ""
        raise LorafoldError(f"{source}: {'; '.join(told[:LISTED])}{more}")
    if not rows:
        raise LorafoldError(f"{source}: no rows found, expected at least one")
    return rows


def _numbers(numbers: Sequence[int]) -> str:
    """The rows that one problem is told of, as a person would name them."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"row {first}"
    if last - first == len(numbers) - 1:
        return f"rows {first} to {last}"
    return f"{len(numbers)} rows from {first} to {last}"


def shape_of(row: Row) -> Shape | None:
    """Return the first shape whose keys the row has (a key with the value null counts as absent),
    or None if there is none.
    """
    return next(
        (shape for shape in SHAPES if all(row.get(key) is not None for key in shape.keys)), None
    )


def ignored_keys(rows: Sequence[Row]) -> tuple[str, ...]:
    """The keys of the rows that are no part of their shape, in the order in which they appear."""
    known = () if (shape := shape_of(rows[0])) is None else (*shape.keys, *shape.optional)
    found = dict.fromkeys(k for row in rows for k, v in row.items() if v is not None)
    return tuple(key for key in found if key not in known)


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


def _text(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"field {name}: found {kind_of(value)}, expected text"


def _messages(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, list) or not value:
        yield (
            f"field {name}: found {'an empty list' if value == [] else kind_of(value)}, expected a"
            " list of messages"
        )
        return
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            yield (
                f"field {name}[{index}]: found {kind_of(message)}, expected an object with role and"
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
            f"fields prompt and completion: found {kind_of(prompt)} and {kind_of(completion)},"
            " expected both text or both lists of messages"
        )
        return
    yield from check("prompt", prompt)
    yield from check("completion", completion)


def _labelled(row: Row) -> Iterator[str]:
    yield from _text("text", row["text"])
    if not isinstance(row["label"], str | int) or isinstance(row["label"], bool):
        yield f"field label: found {kind_of(row['label'])}, expected text or a whole number"


def _pair_conversation(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt, completion = (
            [{"role": "user", "content": prompt}],
            [{"role": "assistant", "content": completion}],
        )
    return Conversation([*prompt, *completion], trained=len(prompt))


# Who speaks in ShareGPT's turns, and the role of that in messages.
SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
}


def _turns(row: Row) -> Iterator[str]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind_of(turns)
        yield f"field conversations: found {found}, expected a list of turns"
        return
    for index, turn in enumerate(turns):
        name = f"conversations[{index}]"
        if not isinstance(turn, dict):
            yield f"field {name}: found {kind_of(turn)}, expected an object with from and value"
            continue
        if turn.get("from") not in SPEAKERS:
            yield (
                f"field {name}.from: found {turn.get('from')!r}, expected one of"
                f" {', '.join(SPEAKERS)}"
            )
        yield from _text(f"{name}.value", turn.get("value"))
    yield from _optional(row, "system")


def _turns_conversation(row: Row) -> Conversation:
    turns = [{"role": SPEAKERS[t["from"]], "content": t["value"]} for t in row["conversations"]]
    return Conversation([*_system(row), *turns])


def _instruction(row: Row) -> Iterator[str]:
    yield from _text("instruction", row["instruction"])
    yield from _text("output", row["output"])
    yield from _optional(row, "input", "system")


def _instruction_conversation(row: Row) -> Conversation:
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    before = [*_system(row), {"role": "user", "content": asked}]
    return Conversation([*before, {"role": "assistant", "content": row["output"]}], len(before))


def _optional(row: Row, *names: str) -> Iterator[str]:
    for name in names:
        if row.get(name) is not None:
            yield from _text(name, row[name])


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


SHAPES = (
    Shape(
        ("messages",),
        "sft",
        lambda row: _messages("messages", row["messages"]),
        lambda row: Conversation(row["messages"]),
    ),
    Shape(("prompt", "completion"), "sft", _pair, _pair_conversation),
    Shape(("conversations",), "sft", _turns, _turns_conversation, ("system",)),
    Shape(
        ("instruction", "output"), "sft", _instruction, _instruction_conversation,
        ("input", "system"),
    ),
    Shape(("text", "label"), "classify", _labelled),
    Shape(("text",), "sft", lambda row: _text("text", row["text"])),
)
