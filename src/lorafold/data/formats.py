r"""Row formats, which are recognized by their keys, and the conversations, preferences or labels
that they provide. To add a format, add an entry to `ROW_FORMATS`.

Texts of preferences may contain turns, such as "\n\nHuman: Hi\n\nAssistant: Yes". If answers start
with the messages of the prompt, these are removed. `*_problems` functions yield one line per error
in a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from lorafold.data.json_input import Row, json_type
from lorafold.data.messages import (
    CALL_ROLES,
    REASONING,
    Completions,
    Message,
    Tool,
    instruction_problems,
    message_problems,
    messages_from,
    normalize,
    openai_tools,
    query_problems,
    read_instruction,
    read_query,
    role_of,
    system_of,
    system_problems,
    text_problems,
    tool_problems,
    trains,
    turn_problems,
    turns_problems,
    turns_to_messages,
    type_problem,
)

TURN_START = re.compile(r"\n\n(Human|Assistant): ?")
TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
SPLIT_REMARK = "rows have texts that are split into Human and Assistant turns"


def content_problems(name: str, value: Any) -> Iterator[str]:
    return (message_problems if isinstance(value, list) else text_problems)(name, value)


def preference_problems(row: Row) -> Iterator[str]:
    fields = ("prompt", "chosen", "rejected")
    problems = [problem for name in fields for problem in content_problems(name, row[name])]
    yield from problems
    lists = isinstance(row["chosen"], list) or isinstance(row["rejected"], list)
    if not problems and lists and not read_preference(row)[0]:
        yield (
            "fields prompt, chosen and rejected: the conversations do not begin with the prompt;"
            " expected the prompt and an answer, or only an answer, in chosen and rejected"
        )


def implicit_problems(row: Row) -> Iterator[str]:
    problems: list[str] = []
    for name in ("chosen", "rejected"):
        answer = row[name]
        if not isinstance(answer, str):
            problems += message_problems(name, answer)
        elif not _split_turns(answer):
            problems.append(
                f"field {name}: found text, expected a list of messages, or text of turns that"
                r" begin with \n\nHuman: and \n\nAssistant:"
            )
    yield from problems
    if problems:
        return
    chosen, rejected = (_as_messages(row[name]) for name in ("chosen", "rejected"))
    if not (shared := _num_shared(chosen, rejected)):
        yield "fields chosen and rejected: found different first messages, expected the same prompt"
    elif shared == min(len(chosen), len(rejected)):
        yield "fields chosen and rejected: one begins with the other; expected different answers"


def turns_preference_problems(row: Row) -> Iterator[str]:
    yield from turns_problems(row)
    for name in ("chosen", "rejected"):
        yield from turn_problems(name, row[name])


def read_preference(row: Row) -> Completions:
    text, answers = row["prompt"], [row["chosen"], row["rejected"]]
    is_text = isinstance(text, str)
    prompt = _prompt_messages(text) if is_text else normalize(text)
    if is_text and prompt[0]["content"] != text:
        answers = [said.removeprefix(" ") if isinstance(said, str) else said for said in answers]
    chosen, rejected = (messages_from("assistant", said) for said in answers)
    shared = chosen[: _num_shared(chosen, rejected)]
    if is_text and {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        # the prompt's text must be one of the messages with which both answers start
        said = {str(one.get("content")).strip() for one in shared}
        prompt = shared if text.strip() in said else []
    at = len(prompt)
    if shared[:at] == prompt and at < min(len(chosen), len(rejected)):
        chosen, rejected = chosen[at:], rejected[at:]
    return prompt, {"chosen": chosen, "rejected": rejected}


def read_implicit(row: Row) -> Completions:
    turns = {name: normalize(_as_messages(row[name])) for name in ("chosen", "rejected")}
    shared = _num_shared(*turns.values())
    return turns["chosen"][:shared], {k: messages[shared:] for k, messages in turns.items()}


def split_remark(row: Row) -> str:
    texts = [row.get("chosen"), row.get("rejected")] if "prompt" not in row else [row["prompt"]]
    return SPLIT_REMARK if any(isinstance(t, str) and TURN_START.match(t) for t in texts) else ""


def read_turns(row: Row) -> Completions:
    answers = {name: turns_to_messages([row[name]]) for name in ("chosen", "rejected")}
    return turns_to_messages(row["conversations"]), answers


def _num_shared(chosen: list[Any], rejected: list[Any]) -> int:
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))


def _as_messages(answer: Any) -> list[Message]:
    return _split_turns(answer) if isinstance(answer, str) else answer


def _split_turns(text: str) -> list[Message]:
    before, *pieces = TURN_START.split(text)
    if before.strip():
        return []
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": TURN_ROLES[name], "content": content} for name, content in turns]


def _prompt_messages(prompt: str) -> list[Message]:
    """Returns the messages of a prompt, without an empty assistant turn at its end."""
    turns = _split_turns(prompt)
    opened = bool(turns) and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
    return turns[:-1] if opened and len(turns) > 1 else messages_from("user", prompt)


# the kinds of data that a format may provide for a row
CONVERSATIONS = "conversations"  # Conversation
PAIRS = "pairs"  # a list with one PreferenceRow, which has a chosen and a rejected completion
JUDGED = "judged"  # a list of PreferenceRow, each with one completion
LABELS = "labels"  # LabelledText
PROMPTS = "prompts"  # a Conversation that the assistant continues

PAIR_KEYS = ("chosen", "rejected")
ANSWER_KEYS = {"completion", *PAIR_KEYS, "output", "response", "answers", "label"}
ANSWER_ROLES = ("assistant", *CALL_ROLES)  # roles of messages that may be answers
CONTENT = ("content", "value", "tool_calls", "function_call", *REASONING)  # fields of an answer


@dataclass(frozen=True)
class Conversation:
    """Messages and tools, or plain `text`. Assistant turns from index `trained` on are trained,
    unless their weight is 0.
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
class PreferenceRow:
    """A prompt, its completions by field name, and tools. `desirable` is the label, not yet
    validated, of a single completion.
    """

    prompt: list[Message]
    completions: dict[str, list[Message]]
    tools: tuple[Tool, ...] = ()
    desirable: Any = True


@dataclass(frozen=True)
class LabelledText:
    text: str
    label: str | int


@dataclass(frozen=True)
class RowFormat:
    """A row format: its required keys, a function that yields a row's problems, a function that
    returns the prompt and completions of a valid row (None for text), the kinds of data it
    provides, and its optional keys.
    """

    keys: tuple[str, ...]
    find_problems: Callable[[Row], Iterator[str]]
    read: Callable[[Row], Completions] | None
    provides: tuple[str, ...]
    optional: tuple[str, ...] = ("system", "tools")

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset((*self.keys, *self.optional))

    def problems(self, row: Row) -> Iterator[str]:
        problems = list(self.find_problems(row))
        yield from problems
        if "system" in self.optional and row.get("system") is not None:
            yield from system_problems(row, bool(problems))
        if "tools" in self.optional and row.get("tools") is not None:
            yield from tool_problems(row["tools"])

    def extract(self, content: str, row: Row) -> Any:
        """Returns one of the kinds in `provides` from a valid row."""
        if self.read is None:
            if content == LABELS:
                return LabelledText(row["text"], row["label"])
            return Conversation([], text=row["text"])
        prompt, answers = self.read(row)
        before = [*system_of(row), *prompt] if row.get("system") else prompt
        tools = openai_tools(row["tools"]) if row.get("tools") else ()
        if content == PAIRS:
            return [PreferenceRow(before, answers, tools)]
        if content == JUDGED:
            labels = {"chosen": True, "rejected": False, "completion": row.get("label")}
            return [PreferenceRow(before, {k: v}, tools, labels[k]) for k, v in answers.items()]
        answer = next(iter(answers.values()), [])
        if content == PROMPTS:
            # without a final assistant turn, all messages are the prompt
            if prompt or (answer and answer[-1]["role"] == "assistant"):
                answer = [] if prompt else answer[:-1]
            return Conversation([*before, *answer], tools=tools)
        return Conversation([*before, *answer], len(before) if prompt else 0, tools)

    def conversation(self, row: Row) -> Conversation:
        conversation = self.extract(CONVERSATIONS, row) if CONVERSATIONS in self.provides else None
        return conversation or Conversation([])

    def has_answers(self, row: Row) -> bool:
        """Whether all answers or, in a conversation, at least one assistant turn have content. An
        empty answer with `weight: 1` counts as content.
        """
        for key in [key for key in self.keys if key in ANSWER_KEYS] or self.keys[:1]:
            value = row[key]
            if isinstance(value, str) and not value.strip():
                return False
            turns = value if isinstance(value, list) else [value] * isinstance(value, dict)
            answers = [t for t in turns if role_of(t.get("role", t.get("from"))) in ANSWER_ROLES]
            full = [trains(t) or any(str(t.get(k) or "").strip() for k in CONTENT) for t in answers]
            if answers and not any(full[-1:] if key in PAIR_KEYS else full):
                return False
        return True


@lru_cache
def formats_for(content: str = "") -> tuple[RowFormat, ...]:
    """Returns ROW_FORMATS, with the formats that provide the given kind first. A format precedes
    formats whose keys it includes, so a row with text and label is not taken for {text}.
    """
    table = (*ROW_FORMATS, PROMPT_ONLY) if content == PROMPTS else ROW_FORMATS
    providers = [row_format for row_format in table if content in row_format.provides]
    first = [s for s in table if any(set(g.keys) <= set(s.keys) for g in providers)]
    return (*first, *(row_format for row_format in table if row_format not in first))


def format_of(row: Row, formats: Sequence[RowFormat] | None = None) -> RowFormat | None:
    """Returns the first matching format. A null value counts as a missing key."""
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
        yield type_problem("label", row["label"], "text or an integer")


def _instruction(output: str, input: str) -> RowFormat:
    wrong = partial(instruction_problems, output, input)
    read, keys = partial(read_instruction, output, input), ("instruction", output)
    return RowFormat(keys, wrong, read, CHAT_KINDS, (input, "system", "tools"))


CHAT_KINDS = (CONVERSATIONS, PROMPTS)
PAIR_KINDS = (*CHAT_KINDS, PAIRS, JUDGED)
PROMPT_ONLY = RowFormat(  # only valid if no completion is needed
    ("prompt",),
    lambda row: content_problems("prompt", row["prompt"]),
    lambda row: (messages_from("user", row["prompt"]), {}),
    (PROMPTS,),
)
ROW_FORMATS = (
    RowFormat(
        ("messages",),
        lambda row: message_problems("messages", row["messages"]),
        lambda row: ([], {"messages": normalize(row["messages"])}),
        CHAT_KINDS,
    ),
    RowFormat(
        ("prompt", "completion"),
        _pair_problems,
        lambda row: (
            messages_from("user", row["prompt"]),
            {"completion": messages_from("assistant", row["completion"])},
        ),
        (*CHAT_KINDS, JUDGED),
    ),
    RowFormat(("prompt", *PAIR_KEYS), preference_problems, read_preference, PAIR_KINDS),
    RowFormat(("conversations", *PAIR_KEYS), turns_preference_problems, read_turns, PAIR_KINDS),
    RowFormat(PAIR_KEYS, implicit_problems, read_implicit, PAIR_KINDS),
    RowFormat(
        ("conversations",),
        turns_problems,
        lambda row: ([], {"conversations": turns_to_messages(row["conversations"])}),
        CHAT_KINDS,
    ),
    _instruction("output", "input"),
    _instruction("response", "context"),
    RowFormat(("query", "answers", "tools"), query_problems, read_query, CHAT_KINDS),
    RowFormat(("text", "label"), _label_problems, None, (LABELS,), ()),
    RowFormat(
        ("text",), lambda row: text_problems("text", row["text"]), None, (CONVERSATIONS,), ()
    ),
)
