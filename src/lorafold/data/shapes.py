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

For kto, a row of prompt and completion has a `label` too, true or false. Of a preference sft trains
on the chosen answer; `data.preferences` gives both. `SHAPES` is the table of shapes: a new shape is
a new entry.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lorafold.data.messages import (
    Message,
    Tool,
    message_problems,
    normalized,
    text_problems,
    tool_problems,
    tools_of,
)
from lorafold.data.preferences import (
    implicit_problems,
    preference_of,
    preference_problems,
    turns_preference_problems,
)
from lorafold.data.sharegpt import turns_problems, turns_to_messages
from lorafold.data.sources import Row, kind_of

COMPARING = ("dpo", "ipo", "hinge", "orpo", "simpo", "reward")  # objectives of two answers
PREFERRED = ("sft", *COMPARING, "kto")
READ_BY = {"kto": ("label",)}  # keys that no shape has and one objective reads
UNUSED = "rejected is not used by --objective sft, which trains on the chosen answers"


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, in the form of `data.messages`, and the tools that it offers. The
    assistant turns from index `trained` on are trained on.
    """

    messages: list[Message]
    trained: int = 0
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Shape:
    """One shape of rows: the keys by which it is recognized, the objectives that train on it, a
    function that lists what is wrong with a row, one that gives the row's messages (None for
    plain and labelled text), the keys that a row may have besides, and what to tell the user who
    trains on it with sft.
    """

    keys: tuple[str, ...]
    objectives: tuple[str, ...]
    problems: Callable[[Row], Iterator[str]]
    conversation: Callable[[Row], Conversation] | None = None
    optional: tuple[str, ...] = ()
    notice: str = ""

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"


def shape_of(row: Row, shapes: Sequence[Shape] | None = None) -> Shape | None:
    """Return the first shape whose keys the row has (a key with the value null counts as absent),
    or None if there is none. The shapes are SHAPES, or those that are given.
    """
    table = SHAPES if shapes is None else shapes
    return next(
        (shape for shape in table if all(row.get(key) is not None for key in shape.keys)), None
    )


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


def _chosen(row: Row) -> Conversation:
    pair = preference_of(row)
    messages = [*pair.prompt, *pair.chosen]
    return Conversation(messages, trained=len(pair.prompt), tools=tools_of(row.get("tools")))


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


def _labelled(row: Row) -> Iterator[str]:
    yield from text_problems("text", row["text"])
    if not isinstance(row["label"], str | int) or isinstance(row["label"], bool):
        yield f"field label: found {kind_of(row['label'])}, expected text or a whole number"


def _optional(row: Row, *names: str) -> Iterator[str]:
    for name in names:
        if row.get(name) is not None:
            yield from text_problems(name, row[name])


def _tools(row: Row) -> Iterator[str]:
    if row.get("tools") is not None:
        yield from tool_problems(row["tools"])


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


SHAPES = (
    Shape(("messages",), ("sft",), _messages, _messages_conversation, ("tools",)),
    Shape(("prompt", "completion"), ("sft", "kto"), _pair, _pair_conversation, ("tools",)),
    Shape(
        ("prompt", "chosen", "rejected"), PREFERRED, _with_tools(preference_problems), _chosen,
        ("tools",), UNUSED,
    ),
    Shape(
        ("conversations", "chosen", "rejected"), PREFERRED, _with_tools(turns_preference_problems),
        _chosen, ("system", "tools"), UNUSED,
    ),
    Shape(
        ("chosen", "rejected"), PREFERRED, _with_tools(implicit_problems), _chosen, ("tools",),
        UNUSED,
    ),
    Shape(
        ("conversations",), ("sft",), _with_tools(turns_problems), _turns_conversation,
        ("system", "tools"),
    ),
    Shape(
        ("instruction", "output"), ("sft",), _instruction, _instruction_conversation,
        ("input", "system"),
    ),
    Shape(("text", "label"), ("classify",), _labelled),
    Shape(("text",), ("sft",), lambda row: text_problems("text", row["text"])),
)  # fmt: skip
