"""Rows of preferences: a prompt, an answer that was chosen and one that was rejected.

    {"prompt": ..., "chosen": ..., "rejected": ...}            each text or a list of messages
    {"chosen": [...], "rejected": [...]}                       two conversations with one beginning
    {"conversations": [...], "chosen": {...}, "rejected": {...}}    ShareGPT's turns

Two conversations may be texts of turns too, as "\\n\\nHuman: Hi\\n\\nAssistant: Yes", and so may a
prompt that ends with "\\n\\nAssistant:". Where answers begin with the messages of the prompt, what
follows is taken. Each form has a function that gives its messages: those of the prompt, and those
of its two answers by name.
"""

import re
from collections.abc import Iterator
from typing import Any

from lorafold.data.json_input import Row
from lorafold.data.messages import (
    Message,
    Said,
    message_problems,
    normalized,
    said_by,
    text_problems,
    turn_problems,
    turns_problems,
    turns_to_messages,
)

TURN = re.compile(r"\n\n(Human|Assistant): ?")
SPOKEN = {"Human": "user", "Assistant": "assistant"}
AS_TURNS = "rows have texts that are read as turns of Human and Assistant"


def content_problems(name: str, value: Any) -> Iterator[str]:
    """What is wrong with a field that has to be text or a list of messages."""
    return (message_problems if isinstance(value, list) else text_problems)(name, value)


def preference_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row of prompt, chosen and rejected."""
    fields = ("prompt", "chosen", "rejected")
    problems = [problem for name in fields for problem in content_problems(name, row[name])]
    yield from problems
    lists = isinstance(row["chosen"], list) or isinstance(row["rejected"], list)
    if not problems and lists and not preference(row)[0]:
        yield (
            "fields prompt, chosen and rejected: found conversations that do not begin with the"
            " prompt, expected answers to it"
        )


def implicit_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row of two conversations, chosen and rejected."""
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
        yield "fields chosen and rejected: found no common first message, expected one prompt"
    elif shared == min(len(chosen), len(rejected)):
        yield "fields chosen and rejected: found no answer in which they differ, expected one"


def turns_preference_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row of ShareGPT's turns with two last turns."""
    yield from turns_problems(row)
    for name in ("chosen", "rejected"):
        yield from turn_problems(name, row[name])


def preference(row: Row) -> Said:
    """The messages of a checked row of prompt, chosen and rejected."""
    text, answers = row["prompt"], [row["chosen"], row["rejected"]]
    is_text = isinstance(text, str)
    prompt = _prompt(text) if is_text else normalized(text)
    if is_text and prompt[0]["content"] != text:
        answers = [said.removeprefix(" ") if isinstance(said, str) else said for said in answers]
    chosen, rejected = (said_by("assistant", said) for said in answers)
    shared = chosen[: _shared(chosen, rejected)]
    if is_text and {chosen[0]["role"], rejected[0]["role"]} != {"assistant"}:
        # the text is one of the messages with which both answers begin
        said = {str(one.get("content")).strip() for one in shared}
        prompt = shared if text.strip() in said else []
    at = len(prompt)
    if shared[:at] == prompt and at < min(len(chosen), len(rejected)):
        chosen, rejected = chosen[at:], rejected[at:]
    return prompt, {"chosen": chosen, "rejected": rejected}


def implicit_preference(row: Row) -> Said:
    """The messages of a checked row of two conversations."""
    both = {name: normalized(_conversation(row[name])) for name in ("chosen", "rejected")}
    shared = _shared(*both.values())
    return both["chosen"][:shared], {name: messages[shared:] for name, messages in both.items()}


def as_turns(row: Row) -> str:
    """A remark on a row whose texts are read as turns; empty for others."""
    texts = [row.get("chosen"), row.get("rejected")] if "prompt" not in row else [row["prompt"]]
    return AS_TURNS if any(isinstance(t, str) and TURN.match(t) for t in texts) else ""


def turns_preference(row: Row) -> Said:
    """The messages of a checked row of ShareGPT's turns with two last turns."""
    answers = {name: turns_to_messages([row[name]]) for name in ("chosen", "rejected")}
    return turns_to_messages(row["conversations"]), answers


def _shared(chosen: list[Any], rejected: list[Any]) -> int:
    """How many messages the two have in common at their beginning."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))


def _conversation(said: Any) -> list[Message]:
    """A conversation, also as a text of turns."""
    return _turns(said) if isinstance(said, str) else said


def _turns(text: str) -> list[Message]:
    """The turns of a text that begins with one of them; none of any other."""
    before, *pieces = TURN.split(text)
    if before.strip():
        return []
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": SPOKEN[name], "content": said} for name, said in turns]


def _prompt(prompt: str) -> list[Message]:
    """The messages of a prompt: one, or its turns before the one that is opened at its end."""
    turns = _turns(prompt)
    opened = bool(turns) and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
    return turns[:-1] if opened and len(turns) > 1 else said_by("user", prompt)
