"""Rows of preferences: a prompt, an answer that was chosen and one that was rejected.

    {"prompt": ..., "chosen": ..., "rejected": ...}            all text, or all lists of messages
    {"chosen": [...], "rejected": [...]}                       two conversations with one beginning
    {"conversations": [...], "chosen": {...}, "rejected": {...}}    ShareGPT's turns

Each has a function that gives its messages.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from lorafold.data.messages import Message, message_problems, normalized, text_problems
from lorafold.data.sharegpt import turn_problems, turns_problems, turns_to_messages
from lorafold.data.sources import Row, kind_of


class Preference(NamedTuple):
    """The messages of a prompt, and those of its two answers."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def preference_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row of prompt, chosen and rejected."""
    names = ("prompt", "chosen", "rejected")
    kinds = {type(row[name]) for name in names}
    if len(kinds) > 1 and kinds <= {str, list}:
        found = ", ".join(kind_of(row[name]) for name in names)
        yield (
            f"fields prompt, chosen and rejected: found {found}, expected all text or all lists of"
            " messages"
        )
        return
    for name in names:
        check = message_problems if isinstance(row[name], list) else text_problems
        yield from check(name, row[name])


def implicit_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row of two conversations, chosen and rejected."""
    problems = [p for name in ("chosen", "rejected") for p in message_problems(name, row[name])]
    yield from problems
    if not problems and not (shared := _shared(row["chosen"], row["rejected"])):
        yield "fields chosen and rejected: found no common first message, expected one prompt"
    elif not problems and shared == min(len(row["chosen"]), len(row["rejected"])):
        yield "fields chosen and rejected: found no answer in which they differ, expected one"


def turns_preference_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row of ShareGPT's turns with two last turns."""
    yield from turns_problems(row)
    for name in ("chosen", "rejected"):
        yield from turn_problems(name, row[name])


def preference(row: Row) -> Preference:
    """The messages of a checked row of prompt, chosen and rejected."""
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if isinstance(prompt, str):
        prompt, chosen, rejected = (
            _said("user", prompt),
            _said("assistant", chosen),
            _said("assistant", rejected),
        )
    return Preference(*map(normalized, (prompt, chosen, rejected)))


def implicit_preference(row: Row) -> Preference:
    """The messages of a checked row of two conversations."""
    chosen, rejected = row["chosen"], row["rejected"]
    shared = _shared(chosen, rejected)
    return Preference(*map(normalized, (chosen[:shared], chosen[shared:], rejected[shared:])))


def turns_preference(row: Row) -> Preference:
    """The messages of a checked row of ShareGPT's turns with two last turns."""
    system = row.get("system")
    before: list[Message] = [{"role": "system", "content": system}] if system else []
    prompt = [*before, *turns_to_messages(row["conversations"])]
    return Preference(
        prompt, turns_to_messages([row["chosen"]]), turns_to_messages([row["rejected"]])
    )


def _shared(chosen: list[Any], rejected: list[Any]) -> int:
    """How many messages the two have in common at their beginning."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))


def _said(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]
