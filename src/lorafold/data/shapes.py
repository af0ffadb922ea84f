"""What shapes give of rows and encoders take: conversations, completions to compare, labels.

The shapes that a user's rows may have.

| shape | row |
|---|---|
| conversation | `{"messages": [{"role": ..., "content": ...}, ...]}`, with or without `tools` |
| prompt, completion | `{"prompt": ..., "completion": ...}`, both text or both lists of messages |
| preference | `{"prompt": ..., "chosen": ..., "rejected": ...}`, or without `prompt` |
| ShareGPT | `{"conversations": [{"from": "human", "value": ...}, ...]}`, with or without `system` |
| Alpaca | `{"instruction": ..., "output": ...}`, with or without `input` |
| Dolly | `{"instruction": ..., "response": ...}`, with or without `context` |
| calls | `{"query": ..., "answers": ..., "tools": ...}`, the answers calls, as JSON |
| labelled text | `{"text": ..., "label": ...}`, the label text or a whole number |
| plain text | `{"text": ...}` |

Where prompts are asked for, `{"prompt": ...}` is a shape too, text or a list of messages. All but
the last two may have a `system` message. Where completions are judged, a row of prompt and
completion has a `label`, true or false. Of a preference the conversation has the chosen answer.
`SHAPES` is the table of shapes: a new shape is a new entry. A row of several shapes has that of
which most is asked: `shapes_for`. What a shape gives of its rows is what encoders take: the row
itself goes no further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from lorafold.data.messages import (
    CALLERS,
    REASONING,
    Message,
    Tool,
    asks,
    instruction,
    instruction_problems,
    message_problems,
    normalized,
    query,
    query_problems,
    role_of,
    system_of,
    system_problems,
    text_problems,
    tool_problems,
    tools_of,
    turns_problems,
    turns_to_messages,
)
from lorafold.data.parsing import Row, kind_of
from lorafold.data.preferences import (
    Preference,
    as_turns,
    implicit_preference,
    implicit_problems,
    preference,
    preference_problems,
    turns_preference,
    turns_preference_problems,
)


@dataclass(frozen=True)
class Conversation:
    """The messages of one row, in the form of `data.messages`, and the tools that it offers. The
    assistant turns from index `trained` on are trained on, but for those of `left`. Plain text is
    one without messages.
    """

    messages: list[Message]
    trained: int = 0
    tools: tuple[Tool, ...] = ()
    text: str = ""

    @property
    def left(self) -> frozenset[int]:
        """The indices of the messages that are not trained on, as their row says."""
        return frozenset(n for n, one in enumerate(self.messages) if one.get("weight") == 0)

    @property
    def turns(self) -> list[int]:
        """The indices of the assistant turns that are trained on."""
        left, messages = self.left, enumerate(self.messages)
        said = [n for n, one in messages if one["role"] == "assistant" and n not in left]
        return [n for n in said if n >= self.trained]


@dataclass(frozen=True)
class Compared:
    """What one example of preferences is made of: a prompt, its completions by the name of their
    field, the tools, and the judgement of a single completion, which has yet to be checked.
    """

    prompt: list[Message]
    completions: dict[str, list[Message]]
    tools: tuple[Tool, ...] = ()
    desirable: Any = True

    def conversations(self) -> list[Conversation]:
        """Each completion after the prompt."""
        before = self.prompt
        return [
            Conversation([*before, *said], len(before), self.tools)
            for said in self.completions.values()
        ]


@dataclass(frozen=True)
class Labelled:
    """A text and its label, text or a whole number."""

    text: str
    label: str | int


# What a shape may give of its rows, each row once.
CONVERSATIONS = "conversations"  # a Conversation
PAIRS = "pairs"  # a list of one Compared, of a chosen completion and a rejected one
JUDGED = "judged"  # a list of Compared, of one completion each
LABELS = "labels"  # a Labelled
PROMPTS = "prompts"  # a Conversation whose next turn is the assistant's; none without messages

COMPARED = ("chosen", "rejected")
ANSWERS = {"completion", *COMPARED, "output", "response", "answers", "label"}
SPEAKERS = ("assistant", *CALLERS)  # whose turns are answers
SAID = ("content", "value", "tool_calls", "function_call", *REASONING)  # of a message, or a turn


@dataclass(frozen=True)
class Shape:
    """One shape of rows: the keys by which it is recognized, a function that lists what is wrong
    with a row, what it gives of a checked row, the keys that a row may have besides, and what there
    is to say of how a checked row is read; empty for nothing.
    """

    keys: tuple[str, ...]
    problems: Callable[[Row], Iterator[str]]
    gives: Mapping[str, Callable[[Row], Any]]
    optional: tuple[str, ...] = ()
    remark: Callable[[Row], str] | None = None

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"

    def conversation(self, row: Row) -> Conversation:
        """The conversation of a row; one without messages where the shape gives none."""
        found: Conversation = self.gives.get(CONVERSATIONS, _none)(row)
        return found

    @cached_property
    def known(self) -> frozenset[str]:
        """The keys that are part of the shape."""
        return frozenset((*self.keys, *self.optional))

    def answered(self, row: Row) -> bool:
        """Whether every answer of a checked row says something, or is to be trained on all the same
        (`weight: 1`).
        """
        answers = [key for key in self.keys if key in ANSWERS] or self.keys[:1]
        return all(_says(row[key], key in COMPARED) for key in answers)


@lru_cache
def shapes_for(wanted: str = "") -> tuple[Shape, ...]:
    """SHAPES, those that give what is wanted of rows before the others; for prompts PROMPT_ALONE
    too. A shape goes before those whose keys it includes: a row of text and label is none of text.
    """
    table = (*SHAPES, PROMPT_ALONE) if wanted == PROMPTS else SHAPES
    giving = [shape for shape in table if wanted in shape.gives]
    over = [s for s in table if any(set(g.keys) <= set(s.keys) for g in giving)]
    return (*over, *(shape for shape in table if shape not in over))


def shape_of(row: Row, shapes: Sequence[Shape] | None = None) -> Shape | None:
    """Return the first shape whose keys the row has (a key with the value null counts as absent),
    or None if there is none. The shapes are SHAPES, or those that are given.
    """
    table = SHAPES if shapes is None else shapes
    return next(
        (shape for shape in table if all(row.get(key) is not None for key in shape.keys)), None
    )


def _says(value: Any, last: bool) -> bool:
    """Whether an answer says something: a text, or one of the turns of the assistant in a list.

    Args:
        last: Only the last one of these counts.
    """
    if isinstance(value, str):
        return bool(value.strip())
    turns = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [turn for turn in turns if role_of(turn.get("role", turn.get("from"))) in SPEAKERS]
    said = [asks(turn) or any(str(turn.get(key) or "").strip() for key in SAID) for turn in own]
    return not own or any(said[-last:])


def _none(row: Row) -> Conversation:
    return Conversation([])


def _messages(row: Row) -> Iterator[str]:
    yield from message_problems("messages", row["messages"])


def _messages_conversation(row: Row) -> Conversation:
    messages = [*system_of(row), *normalized(row["messages"])]
    return Conversation(messages, tools=tools_of(row.get("tools")))


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


def _pair_conversation(row: Row) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt, completion = (
            [{"role": "user", "content": prompt}],
            [{"role": "assistant", "content": completion}],
        )
    before, said = [*system_of(row), *normalized(prompt)], normalized(completion)
    return Conversation([*before, *said], trained=len(before), tools=tools_of(row.get("tools")))


def _prompt(row: Row) -> Iterator[str]:
    check = message_problems if isinstance(row["prompt"], list) else text_problems
    return check("prompt", row["prompt"])


def _prompt_conversation(row: Row) -> Conversation:
    prompt = row["prompt"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Conversation([*system_of(row), *normalized(asked)], tools=tools_of(row.get("tools")))


def _before(read: Callable[[Row], Conversation], row: Row) -> Conversation:
    """What comes before the last turn of the assistant, or all where that is not the last turn."""
    found = read(row)
    own = any(message["role"] == "assistant" for message in found.messages[-1:])
    before = found.messages[: found.trained or len(found.messages) - own]
    return Conversation(before, tools=found.tools)


def _judged(row: Row) -> list[Compared]:
    given = _pair_conversation(row)
    before, said = given.messages[: given.trained], given.messages[given.trained :]
    return [Compared(before, {"completion": said}, given.tools, row.get("label"))]


def _read(read: Callable[[Row], Preference], row: Row) -> tuple[Preference, tuple[Tool, ...]]:
    found = read(row)
    before = [*system_of(row), *found.prompt]
    return found._replace(prompt=before), tools_of(row.get("tools"))


def _chosen(read: Callable[[Row], Preference], row: Row) -> Conversation:
    pair, tools = _read(read, row)
    return Conversation([*pair.prompt, *pair.chosen], trained=len(pair.prompt), tools=tools)


def _both(read: Callable[[Row], Preference], row: Row) -> list[Compared]:
    (prompt, chosen, rejected), tools = _read(read, row)
    return [Compared(prompt, {"chosen": chosen, "rejected": rejected}, tools)]


def _each(read: Callable[[Row], Preference], row: Row) -> list[Compared]:
    (prompt, chosen, rejected), tools = _read(read, row)
    return [
        Compared(prompt, {"chosen": chosen}, tools, True),
        Compared(prompt, {"rejected": rejected}, tools, False),
    ]


def _preference(
    keys: tuple[str, ...],
    problems: Callable[[Row], Iterator[str]],
    read: Callable[[Row], Preference],
) -> Shape:
    gives: dict[str, Callable[[Row], Any]] = {
        CONVERSATIONS: partial(_chosen, read),
        PAIRS: partial(_both, read),
        JUDGED: partial(_each, read),
    }
    return _conversed(keys, problems, gives, as_turns)


def _conversed(
    keys: tuple[str, ...],
    problems: Callable[[Row], Iterator[str]],
    gives: Mapping[str, Callable[[Row], Any]],
    remark: Callable[[Row], str] | None = None,
    beside: str = "",
) -> Shape:
    """A shape of conversations, which may have a system message and tools beside them."""
    optional = (*filter(None, [beside]), "system", "tools")
    gives = {PROMPTS: partial(_before, gives[CONVERSATIONS]), **gives}
    return Shape(keys, _with_tools(problems), gives, optional, remark)


def _with_tools(problems: Callable[[Row], Iterator[str]]) -> Callable[[Row], Iterator[str]]:
    def both(row: Row) -> Iterator[str]:
        wrong = list(problems(row))
        yield from wrong
        if row.get("system") is not None:
            yield from system_problems(row, bool(wrong))
        if row.get("tools") is not None:
            yield from tool_problems(row["tools"])

    return both


def _turns_conversation(row: Row) -> Conversation:
    messages = [*system_of(row), *turns_to_messages(row["conversations"])]
    return Conversation(messages, tools=tools_of(row.get("tools")))


def _alpaca(answered: str, beside: str) -> Shape:
    """A shape of an instruction, what it is about, and an answer, all text."""
    keys = ("instruction", answered)
    gives = {CONVERSATIONS: partial(_answered, partial(instruction, answered, beside))}
    return _conversed(keys, partial(instruction_problems, answered, beside), gives, beside=beside)


def _answered(read: Callable[[Row], list[Message]], row: Row) -> Conversation:
    *asked, said = read(row)
    before = [*system_of(row), *asked]
    return Conversation([*before, said], len(before), tools_of(row.get("tools")))


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


PLAIN_TEXT = Shape(("text",), _plain, {CONVERSATIONS: _text})
ALONE = {PROMPTS: _prompt_conversation}  # elsewhere such a row lacks a completion
PROMPT_ALONE = Shape(("prompt",), _with_tools(_prompt), ALONE, ("system", "tools"))
SHAPES = (
    _conversed(("messages",), _messages, {CONVERSATIONS: _messages_conversation}),
    _conversed(
        ("prompt", "completion"), _pair, {CONVERSATIONS: _pair_conversation, JUDGED: _judged}
    ),
    _preference(("prompt", "chosen", "rejected"), preference_problems, preference),
    _preference(
        ("conversations", "chosen", "rejected"), turns_preference_problems, turns_preference
    ),
    _preference(("chosen", "rejected"), implicit_problems, implicit_preference),
    _conversed(("conversations",), turns_problems, {CONVERSATIONS: _turns_conversation}),
    _alpaca("output", "input"),
    _alpaca("response", "context"),
    _conversed(
        ("query", "answers", "tools"), query_problems, {CONVERSATIONS: partial(_answered, query)}
    ),
    Shape(("text", "label"), _label_problems, {LABELS: _labelled}),
    PLAIN_TEXT,
)
