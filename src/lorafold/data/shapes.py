"""The shapes that a user's rows may have.

| shape | row |
|---|---|
| conversation | `{"messages": [{"role": ..., "content": ...}, ...]}` |
| prompt, completion | `{"prompt": ..., "completion": ...}`, both text or both lists of messages |
| ShareGPT | `{"conversations": [{"from": "human", "value": ...}, ...]}`, with or without `system` |
| Alpaca | `{"instruction": ..., "output": ...}`, with or without `input` and `system` |
| labelled text | `{"text": ..., "label": ...}`, the label text or a whole number |
| plain text | `{"text": ...}` |

`SHAPES` is the table of shapes: a new shape is a new entry.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lorafold.data.sources import Row, kind_of

Message = dict[str, Any]


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


def shape_of(row: Row) -> Shape | None:
    """Return the first shape whose keys the row has (a key with the value null counts as absent),
    or None if there is none.
    """
    return next(
        (shape for shape in SHAPES if all(row.get(key) is not None for key in shape.keys)), None
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
