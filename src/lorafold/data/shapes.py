"""The shapes that a user's rows may have.

| shape | row |
|---|---|
| conversation | `{"messages": [{"role": ..., "content": ...}, ...]}`, with or without `tools` |
| prompt, completion | `{"prompt": ..., "completion": ...}`, both text or both lists of messages |
| preference | `{"prompt": ..., "chosen": ..., "rejected": ...}`, or without `prompt` |
| ShareGPT | `{"conversations": [{"from": "human", "value": ...}, ...]}`, with or without `system` |
| Alpaca | `{"instruction": ..., "output": ...}`, with or without `input` and `system` |
| labelled text | `{"text": ..., "label": ...}`, the label text or a whole number |
| plain text | `{"text": ...}` |

Where completions are judged, a row of prompt and completion has a `label` too, true or false. Of a
preference the conversation has the chosen answer. `SHAPES` is the table of shapes: a new shape is a
new entry. What a shape gives of its rows is what encoders take: the row itself goes no further.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorafold.data.conversations import Compared, Conversation, Labelled
from lorafold.data.messages import (
    Message,
    message_problems,
    normalized,
    text_problems,
    tool_problems,
    tools_of,
)
from lorafold.data.preferences import (
    Preference,
    implicit_preference,
    implicit_problems,
    preference,
    preference_problems,
    turns_preference,
    turns_preference_problems,
)
from lorafold.data.sharegpt import turns_problems, turns_to_messages
from lorafold.data.sources import Row, kind_of

# What a shape may give of its rows, each row once.
CONVERSATIONS = "conversations"  # a Conversation
PAIRS = "pairs"  # a list of one Compared, of a chosen completion and a rejected one
JUDGED = "judged"  # a list of Compared, of one completion each
LABELS = "labels"  # a Labelled


@dataclass(frozen=True)
class Shape:
    """One shape of rows: the keys by which it is recognized, a function that lists what is wrong
    with a row, what it gives of a checked row, and the keys that a row may have besides.
    """

    keys: tuple[str, ...]
    problems: Callable[[Row], Iterator[str]]
    gives: Mapping[str, Callable[[Row], Any]]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"

    def conversation(self, row: Row) -> Conversation:
        """The conversation of a row; one without messages where the shape gives none."""
        found: Conversation = self.gives.get(CONVERSATIONS, _none)(row)
        return found

    def unknown(self, row: Row) -> list[str]:
        """The keys of a row that are no part of the shape; one with the value null is absent."""
        known = (*self.keys, *self.optional)
        return [key for key, value in row.items() if value is not None and key not in known]


def shape_of(row: Row, shapes: Sequence[Shape] | None = None) -> Shape | None:
    """Return the first shape whose keys the row has (a key with the value null counts as absent),
    or None if there is none. The shapes are SHAPES, or those that are given.
    """
    table = SHAPES if shapes is None else shapes
    return next(
        (shape for shape in table if all(row.get(key) is not None for key in shape.keys)), None
    )


def _none(row: Row) -> Conversation:
    return Conversation([])


def _messages(row: Row) -> Iterator[str]:
    yield from message_problems("messages", row["messages"])
    yield from _tools(row)


def _messages_conversation(row: Row) -> Conversation:
    return Conversation(normalized(row["messages"]), tools=tools_of(row.get("tools")))


def _pair(row: Row) -> Iterator[str]:
    prompt, completion = row["prompt"], row["completion"]
    check = message_problems if isinstance(prompt, list) else text_problems
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
    yield from _tools(row)


def _pair_conversation(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt, completion = (
            [{"role": "user", "content": prompt}],
            [{"role": "assistant", "content": completion}],
        )
    messages = normalized([*prompt, *completion])
    return Conversation(messages, trained=len(prompt), tools=tools_of(row.get("tools")))


def _judged(row: Row) -> list[Compared]:
    given = _pair_conversation(row)
    before, said = given.messages[: given.trained], given.messages[given.trained :]
    return [Compared(before, {"completion": said}, given.tools, row.get("label"))]


def _chosen(read: Callable[[Row], Preference], row: Row) -> Conversation:
    pair = read(row)
    messages = [*pair.prompt, *pair.chosen]
    return Conversation(messages, trained=len(pair.prompt), tools=tools_of(row.get("tools")))


def _both(read: Callable[[Row], Preference], row: Row) -> list[Compared]:
    prompt, chosen, rejected = read(row)
    said = {"chosen": chosen, "rejected": rejected}
    return [Compared(prompt, said, tools_of(row.get("tools")))]


def _each(read: Callable[[Row], Preference], row: Row) -> list[Compared]:
    prompt, chosen, rejected = read(row)
    tools = tools_of(row.get("tools"))
    return [
        Compared(prompt, {"chosen": chosen}, tools, True),
        Compared(prompt, {"rejected": rejected}, tools, False),
    ]


def _preference(
    keys: tuple[str, ...],
    problems: Callable[[Row], Iterator[str]],
    read: Callable[[Row], Preference],
    *optional: str,
) -> Shape:
    gives: dict[str, Callable[[Row], Any]] = {
        CONVERSATIONS: partial(_chosen, read),
        PAIRS: partial(_both, read),
        JUDGED: partial(_each, read),
    }
    return Shape(keys, _with_tools(problems), gives, (*optional, "tools"))


def _with_tools(problems: Callable[[Row], Iterator[str]]) -> Callable[[Row], Iterator[str]]:
    def both(row: Row) -> Iterator[str]:
        yield from problems(row)
        yield from _optional(row, "system")
        yield from _tools(row)

    return both


def _turns_conversation(row: Row) -> Conversation:
    messages = [*_system(row), *turns_to_messages(row["conversations"])]
    return Conversation(messages, tools=tools_of(row.get("tools")))


def _instruction(row: Row) -> Iterator[str]:
    yield from text_problems("instruction", row["instruction"])
    yield from text_problems("output", row["output"])
    yield from _optional(row, "input", "system")


def _instruction_conversation(row: Row) -> Conversation:
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    before = [*_system(row), {"role": "user", "content": asked}]
    return Conversation([*before, {"role": "assistant", "content": row["output"]}], len(before))


def _label_problems(row: Row) -> Iterator[str]:
    yield from text_problems("text", row["text"])
    if not isinstance(row["label"], str | int) or isinstance(row["label"], bool):
        yield f"field label: found {kind_of(row['label'])}, expected text or a whole number"


def _labelled(row: Row) -> Labelled:
    return Labelled(row["text"], row["label"])


def _plain(row: Row) -> Iterator[str]:
    yield from text_problems("text", row["text"])


def _text(row: Row) -> Conversation:
    return Conversation([], text=row["text"])


def _optional(row: Row, *names: str) -> Iterator[str]:
    for name in names:
        if row.get(name) is not None:
            yield from text_problems(name, row[name])


def _tools(row: Row) -> Iterator[str]:
    if row.get("tools") is not None:
        yield from tool_problems(row["tools"])


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


PLAIN_TEXT = Shape(("text",), _plain, {CONVERSATIONS: _text})
SHAPES = (
    Shape(("messages",), _messages, {CONVERSATIONS: _messages_conversation}, ("tools",)),
    Shape(
        ("prompt", "completion"), _pair, {CONVERSATIONS: _pair_conversation, JUDGED: _judged},
        ("tools",),
    ),
    _preference(("prompt", "chosen", "rejected"), preference_problems, preference),
    _preference(
        ("conversations", "chosen", "rejected"), turns_preference_problems, turns_preference,
        "system",
    ),
    _preference(("chosen", "rejected"), implicit_problems, implicit_preference),
    Shape(
        ("conversations",), _with_tools(turns_problems), {CONVERSATIONS: _turns_conversation},
        ("system", "tools"),
    ),
    Shape(
        ("instruction", "output"), _instruction, {CONVERSATIONS: _instruction_conversation},
        ("input", "system"),
    ),
    Shape(("text", "label"), _label_problems, {LABELS: _labelled}),
    PLAIN_TEXT,
)  # fmt: skip
