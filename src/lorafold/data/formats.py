r"""Row formats, which are recognized by their keys, and the conversations, preferences or labels
that they provide. To add a format, add an entry to `ROW_FORMATS`.

Texts of preferences may contain turns, such as "\n\nHuman: Hi\n\nAssistant: Yes". If answers start
with the messages of the prompt, these are removed. `*_problems` functions yield one line per error
in a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from lorafold.data.json_input import Row, json_type
from lorafold.data.messages import (
    CALL_ROLES,
    REASONING,
    Check,
    Message,
    Problems,
    Tool,
    call_problems,
    message_problems,
    messages_from,
    normalize,
    openai_call,
    openai_tools,
    parsed,
    role_of,
    text_problems,
    tool_problems,
    trains,
    turn_problems,
    turns_problems,
    turns_to_messages,
    type_problem,
)

# the messages of a prompt, and the messages of each completion by field name
Completions = tuple[list[Message], dict[str, list[Message]]]
TURN_START = re.compile(r"\n\n(Human|Assistant): ?")
TURN_ROLES = {"Human": "user", "Assistant": "assistant"}
SPLIT_REMARK = "rows have texts that are split into Human and Assistant turns"


def content_problems(name: str, value: Any) -> Problems:
    return (message_problems if isinstance(value, list) else text_problems)(name, value)


def preference_problems(row: Row) -> Problems:
    fields = ("prompt", "chosen", "rejected")
    problems = [problem for name in fields for problem in content_problems(name, row[name])]
    yield from problems
    lists = isinstance(row["chosen"], list) or isinstance(row["rejected"], list)
    if not problems and lists and not read_preference(row)[0]:
        yield (
            "fields prompt, chosen and rejected: the conversations do not begin with the prompt;"
            " expected the prompt and an answer, or only an answer, in chosen and rejected"
        )


def implicit_problems(row: Row) -> Problems:
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


def system_problems(row: Row, wrong: bool) -> Problems:
    """Yields problems of the field `system`. Unless the row is `wrong`, also compares the field
    with the conversation's system message.
    """
    yield from text_problems("system", row["system"])
    if not wrong and row["system"] and _own_system(row) not in (None, row["system"]):
        yield "field system: found another system message in the conversation, expected only one"


def _own_system(row: Row) -> str | None:
    for key in ("messages", "conversations", "prompt", "chosen"):
        first = row[key][0] if isinstance(row.get(key), list) and row[key] else None
        if isinstance(first, dict) and "system" in (first.get("role"), first.get("from")):
            return str(first.get("content", first.get("value")))
    return None


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


@dataclass(frozen=True, eq=False)
class RowFormat:
    """A row format: its required fields, a function that returns the prompt and completions of a
    valid row (None for text), the kinds of data it provides, its optional keys, and a function that
    yields a row's problems instead of the fields' checks.
    """

    fields: Mapping[str, Check]
    read: Callable[[Row], Completions] | None
    provides: tuple[str, ...]
    optional: tuple[str, ...] = ("system", "tools")
    find_problems: Callable[[Row], Problems] | None = None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.fields)

    def __str__(self) -> str:
        return "{" + ", ".join(self.keys) + "}"

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset((*self.keys, *self.optional))

    def problems(self, row: Row) -> Problems:
        checked = (p for key, check in self.fields.items() for p in check(key, row[key]))
        problems = list(self.find_problems(row) if self.find_problems else checked)
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
        before = prompt
        if row.get("system") and _own_system(row) is None:
            before = [{"role": "system", "content": row["system"]}, *prompt]
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
        known = CONVERSATIONS in self.provides
        return self.extract(CONVERSATIONS, row) if known else Conversation([])

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


def _pair_problems(row: Row) -> Problems:
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


def _label_problems(name: str, value: Any) -> Problems:
    if not isinstance(value, str | int) or isinstance(value, bool):
        yield type_problem(name, value, "text or an integer")


def _read_query(row: Row) -> Completions:
    answer = {"role": "assistant", "tool_calls": list(map(openai_call, parsed(row["answers"])))}
    return messages_from("user", row["query"]), {"answers": [answer]}


def _instruction(output: str, input: str) -> RowFormat:
    def find_problems(row: Row) -> Problems:
        for key in ("instruction", output, *[input] * (row.get(input) is not None)):
            yield from text_problems(key, row[key])

    def read(row: Row) -> Completions:
        request = "\n".join(filter(None, (row["instruction"], row.get(input))))
        return messages_from("user", request), {output: messages_from("assistant", row[output])}

    fields = {"instruction": text_problems, output: text_problems}
    return RowFormat(fields, read, CHAT_KINDS, (input, "system", "tools"), find_problems)


def _answers_problems(name: str, value: Any) -> Problems:
    try:
        yield from call_problems(name, parsed(value))
    except ValueError as error:
        yield f"field {name}: found invalid JSON ({error}), expected a list of calls"


CHAT_KINDS = (CONVERSATIONS, PROMPTS)
PAIR_KINDS = (*CHAT_KINDS, PAIRS, JUDGED)
TEXT = {"text": text_problems}
CHOICE: dict[str, Check] = dict.fromkeys(PAIR_KEYS, content_problems)
PROMPT: dict[str, Check] = {"prompt": content_problems}
PROMPT_ONLY = RowFormat(  # only valid if no completion is needed
    PROMPT, lambda row: (messages_from("user", row["prompt"]), {}), (PROMPTS,)
)
ROW_FORMATS = (
    RowFormat(
        {"messages": message_problems},
        lambda row: ([], {"messages": normalize(row["messages"])}),
        CHAT_KINDS,
    ),
    RowFormat(
        PROMPT | {"completion": content_problems},
        lambda row: (
            messages_from("user", row["prompt"]),
            {"completion": messages_from("assistant", row["completion"])},
        ),
        (*CHAT_KINDS, JUDGED),
        find_problems=_pair_problems,
    ),
    RowFormat(PROMPT | CHOICE, read_preference, PAIR_KINDS, find_problems=preference_problems),
    RowFormat(
        {"conversations": turns_problems, **dict.fromkeys(PAIR_KEYS, turn_problems)},
        read_turns,
        PAIR_KINDS,
    ),
    RowFormat(CHOICE, read_implicit, PAIR_KINDS, find_problems=implicit_problems),
    RowFormat(
        {"conversations": turns_problems},
        lambda row: ([], {"conversations": turns_to_messages(row["conversations"])}),
        CHAT_KINDS,
    ),
    _instruction("output", "input"),
    _instruction("response", "context"),
    RowFormat(
        {"query": text_problems, "answers": _answers_problems, "tools": lambda *_: iter(())},
        _read_query,
        CHAT_KINDS,
    ),
    RowFormat(TEXT | {"label": _label_problems}, None, (LABELS,), ()),
    RowFormat(TEXT, None, (CONVERSATIONS,), ()),
)
