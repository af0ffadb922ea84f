r"""Row formats, recognized by their keys, and the conversations, preferences or labels they
provide. To add a format, add an entry to `ROW_FORMATS`.

Texts of preferences may contain turns, such as "\n\nHuman: Hi\n\nAssistant: Yes". Messages of the
prompt are removed from the start of answers. `*_problems` yield a line per error of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from lorafold.data.json_input import Row, json_type
from lorafold.data.messages import (
    CALLERS,
    REASONING,
    Message,
    Said,
    Tool,
    asks,
    instruction,
    instruction_problems,
    message_problems,
    normalized,
    query,
    query_problems,
    role_of,
    said_by,
    system_of,
    system_problems,
    text_problems,
    tool_problems,
    tools_of,
    turn_problems,
    turns_problems,
    turns_to_messages,
    unlike,
)

TURN = re.compile(r"\n\n(Human|Assistant): ?")
SPOKEN = {"Human": "user", "Assistant": "assistant"}
AS_TURNS = "rows have texts that are split into Human and Assistant turns"


def content_problems(name: str, value: Any) -> Iterator[str]:
    return (message_problems if isinstance(value, list) else text_problems)(name, value)


def preference_problems(row: Row) -> Iterator[str]:
    fields = ("prompt", "chosen", "rejected")
    problems = [problem for name in fields for problem in content_problems(name, row[name])]
    yield from problems
    lists = isinstance(row["chosen"], list) or isinstance(row["rejected"], list)
    if not problems and lists and not preference(row)[0]:
        yield (
            "fields prompt, chosen and rejected: the conversations do not begin with the prompt;"
            " expected the prompt and an answer, or only an answer, in chosen and rejected"
        )


def implicit_problems(row: Row) -> Iterator[str]:
    problems: list[str] = []
    for name in ("chosen", "rejected"):
        said = row[name]
        if not isinstance(said, str):
            problems += message_problems(name, said)
        elif not _turns(said):
            problems.append(
                f"field {name}: found text, expected a list of messages, or text of turns that"
                r" begin with \n\nHuman: and \n\nAssistant:"
            )
    yield from problems
    if problems:
        return
    chosen, rejected = (_conversation(row[name]) for name in ("chosen", "rejected"))
    if not (shared := _shared(chosen, rejected)):
        yield "fields chosen and rejected: found different first messages, expected the same prompt"
    elif shared == min(len(chosen), len(rejected)):
        yield "fields chosen and rejected: found no message that differs, expected two answers"


def turns_preference_problems(row: Row) -> Iterator[str]:
    yield from turns_problems(row)
    for name in ("chosen", "rejected"):
        yield from turn_problems(name, row[name])


def preference(row: Row) -> Said:
    text, answers = row["prompt"], [row["chosen"], row["rejected"]]
    is_text = isinstance(text, str)
    prompt = _prompt(text) if is_text else normalized(text)
    if is_text and prompt[0]["content"] != text:
        answers = [said.removeprefix(" ") if isinstance(said, str) else said for said in answers]
    chosen, rejected = (said_by("assistant", said) for said in answers)
    shared = chosen[: _shared(chosen, rejected)]
    if is_text and {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        # the prompt's text is one of the messages with which both answers begin
        said = {str(one.get("content")).strip() for one in shared}
        prompt = shared if text.strip() in said else []
    at = len(prompt)
    if shared[:at] == prompt and at < min(len(chosen), len(rejected)):
        chosen, rejected = chosen[at:], rejected[at:]
    return prompt, {"chosen": chosen, "rejected": rejected}


def implicit_preference(row: Row) -> Said:
    both = {name: normalized(_conversation(row[name])) for name in ("chosen", "rejected")}
    shared = _shared(*both.values())
    return both["chosen"][:shared], {name: messages[shared:] for name, messages in both.items()}


def as_turns(row: Row) -> str:
    texts = [row.get("chosen"), row.get("rejected")] if "prompt" not in row else [row["prompt"]]
    return AS_TURNS if any(isinstance(t, str) and TURN.match(t) for t in texts) else ""


def turns_preference(row: Row) -> Said:
    answers = {name: turns_to_messages([row[name]]) for name in ("chosen", "rejected")}
    return turns_to_messages(row["conversations"]), answers


def _shared(chosen: list[Any], rejected: list[Any]) -> int:
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))


def _conversation(said: Any) -> list[Message]:
    return _turns(said) if isinstance(said, str) else said


def _turns(text: str) -> list[Message]:
    before, *pieces = TURN.split(text)
    if before.strip():
        return []
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": SPOKEN[name], "content": said} for name, said in turns]


def _prompt(prompt: str) -> list[Message]:
    """Returns the messages of a prompt, without an empty assistant turn at its end."""
    turns = _turns(prompt)
    opened = bool(turns) and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
    return turns[:-1] if opened and len(turns) > 1 else said_by("user", prompt)


# The kinds of data that a format may provide for a row.
CONVERSATIONS = "conversations"  # Conversation
PAIRS = "pairs"  # a list of one Compared, with a chosen and a rejected completion
JUDGED = "judged"  # a list of Compared, with one completion each
LABELS = "labels"  # Labelled
PROMPTS = "prompts"  # a Conversation to be continued by the assistant

COMPARED = ("chosen", "rejected")
ANSWERS = {"completion", *COMPARED, "output", "response", "answers", "label"}
SPEAKERS = ("assistant", *CALLERS)  # roles of answers
SAID = ("content", "value", "tool_calls", "function_call", *REASONING)  # fields of an answer


@dataclass(frozen=True)
class Conversation:
    """Messages and tools; plain text has no messages. Assistant turns from index `trained` on are
    trained, unless their weight is 0.
    """

    messages: list[Message]
    trained: int = 0
    tools: tuple[Tool, ...] = ()
    text: str = ""

    @property
    def turns(self) -> list[int]:
        return [
            n
            for n, one in enumerate(self.messages)
            if n >= self.trained and one["role"] == "assistant" and one.get("weight") != 0
        ]


@dataclass(frozen=True)
class Compared:
    """A prompt, completions by field name, tools, and the unchecked label of a single completion.
    """

    prompt: list[Message]
    completions: dict[str, list[Message]]
    tools: tuple[Tool, ...] = ()
    desirable: Any = True


@dataclass(frozen=True)
class Labelled:
    text: str
    label: str | int


@dataclass(frozen=True)
class RowFormat:
    """A row format: its keys, a function that yields problems, one that returns the prompt and
    completions of a checked row (None for text), the kinds of data it provides, and optional keys.
    """

    keys: tuple[str, ...]
    wrong: Callable[[Row], Iterator[str]]
    read: Callable[[Row], Said] | None
    provides: tuple[str, ...]
    optional: tuple[str, ...] = ("system", "tools")

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset((*self.keys, *self.optional))

    def problems(self, row: Row) -> Iterator[str]:
        wrong = list(self.wrong(row))
        yield from wrong
        if "system" in self.optional and row.get("system") is not None:
            yield from system_problems(row, bool(wrong))
        if "tools" in self.optional and row.get("tools") is not None:
            yield from tool_problems(row["tools"])

    def extract(self, what: str, row: Row) -> Any:
        """Returns one of the kinds that it `provides`, for a checked row."""
        if self.read is None:
            if what == LABELS:
                return Labelled(row["text"], row["label"])
            return Conversation([], text=row["text"])
        prompt, answers = self.read(row)
        before = [*system_of(row), *prompt] if row.get("system") else prompt
        tools = tools_of(row["tools"]) if row.get("tools") else ()
        if what == PAIRS:
            return [Compared(before, answers, tools)]
        if what == JUDGED:
            good = {"chosen": True, "rejected": False, "completion": row.get("label")}
            return [Compared(before, {of: said}, tools, good[of]) for of, said in answers.items()]
        said = next(iter(answers.values()), [])
        if what == PROMPTS:
            # without a final assistant turn, all messages are the prompt
            if prompt or (said and said[-1]["role"] == "assistant"):
                said = [] if prompt else said[:-1]
            return Conversation([*before, *said], tools=tools)
        return Conversation([*before, *said], len(before) if prompt else 0, tools)

    def conversation(self, row: Row) -> Conversation:
        conversation = self.extract(CONVERSATIONS, row) if CONVERSATIONS in self.provides else None
        return conversation or Conversation([])

    def has_answers(self, row: Row) -> bool:
        """Whether every answer has content; in a conversation, whether one assistant turn has. An
        empty answer with `weight: 1` counts as content.
        """
        for key in [key for key in self.keys if key in ANSWERS] or self.keys[:1]:
            value = row[key]
            if isinstance(value, str) and not value.strip():
                return False
            turns = value if isinstance(value, list) else [value] * isinstance(value, dict)
            own = [t for t in turns if role_of(t.get("role", t.get("from"))) in SPEAKERS]
            said = [asks(t) or any(str(t.get(k) or "").strip() for k in SAID) for t in own]
            if own and not any(said[-1:] if key in COMPARED else said):
                return False
        return True


@lru_cache
def formats_for(wanted: str = "") -> tuple[RowFormat, ...]:
    """Returns ROW_FORMATS, with those first that provide the wanted kind. A format precedes those
    whose keys it includes, so {text, label} doesn't match {text}.
    """
    table = (*ROW_FORMATS, PROMPT_ONLY) if wanted == PROMPTS else ROW_FORMATS
    giving = [row_format for row_format in table if wanted in row_format.provides]
    over = [s for s in table if any(set(g.keys) <= set(s.keys) for g in giving)]
    return (*over, *(row_format for row_format in table if row_format not in over))


def format_of(row: Row, formats: Sequence[RowFormat] | None = None) -> RowFormat | None:
    """Returns the first matching format. A null value counts as absent."""
    for row_format in ROW_FORMATS if formats is None else formats:
        if all(row.get(key) is not None for key in row_format.keys):
            return row_format
    return None


def _pair_problems(row: Row) -> Iterator[str]:
    kinds = [type(row[key]) for key in ("prompt", "completion")]
    if {*kinds} == {str, list}:
        yield (
            f"fields prompt and completion: found {json_type(row['prompt'])} and"
            f" {json_type(row['completion'])}, expected text in both or lists of messages in both"
        )
        return
    check = message_problems if kinds[0] is list else text_problems
    yield from check("prompt", row["prompt"])
    yield from check("completion", row["completion"])


def _label_problems(row: Row) -> Iterator[str]:
    yield from text_problems("text", row["text"])
    if not isinstance(row["label"], str | int) or isinstance(row["label"], bool):
        yield unlike("label", row["label"], "text or an integer")


def _instruction(answered: str, beside: str) -> RowFormat:
    wrong = partial(instruction_problems, answered, beside)
    read, keys = partial(instruction, answered, beside), ("instruction", answered)
    return RowFormat(keys, wrong, read, CHAT, (beside, "system", "tools"))


CHAT = (CONVERSATIONS, PROMPTS)
TWO = (*CHAT, PAIRS, JUDGED)
PROMPT_ONLY = RowFormat(  # only valid if no completion is needed
    ("prompt",),
    lambda row: content_problems("prompt", row["prompt"]),
    lambda row: (said_by("user", row["prompt"]), {}),
    (PROMPTS,),
)
ROW_FORMATS = (
    RowFormat(
        ("messages",),
        lambda row: message_problems("messages", row["messages"]),
        lambda row: ([], {"messages": normalized(row["messages"])}),
        CHAT,
    ),
    RowFormat(
        ("prompt", "completion"),
        _pair_problems,
        lambda row: (
            said_by("user", row["prompt"]),
            {"completion": said_by("assistant", row["completion"])},
        ),
        (*CHAT, JUDGED),
    ),
    RowFormat(("prompt", *COMPARED), preference_problems, preference, TWO),
    RowFormat(("conversations", *COMPARED), turns_preference_problems, turns_preference, TWO),
    RowFormat(COMPARED, implicit_problems, implicit_preference, TWO),
    RowFormat(
        ("conversations",),
        turns_problems,
        lambda row: ([], {"conversations": turns_to_messages(row["conversations"])}),
        CHAT,
    ),
    _instruction("output", "input"),
    _instruction("response", "context"),
    RowFormat(("query", "answers", "tools"), query_problems, query, CHAT),
    RowFormat(("text", "label"), _label_problems, None, (LABELS,), ()),
    RowFormat(
        ("text",), lambda row: text_problems("text", row["text"]), None, (CONVERSATIONS,), ()
    ),
)
