"""How a chat template ends a turn of the assistant, found by rendering a probe once per template.

    with the turn               ... answer<end>\\n
    with the next message       ... answer<user>\\nnext          what opens that one ends it
    not at all                  ... answer

A model stops at a token, so an end is the special token behind the answer, the last one if several
follow upon each other. Where a template writes none with the turn, its rendering lacks what
generation has to produce: the token that the next message begins with is trained as the end, or the
tokenizer's own end token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal

from lorafold.data.messages import Message
from lorafold.data.template_forms import (
    ASKED,
    KEY,
    KNOWN,
    NAME,
    PROBE_TOOL,
    VALUE,
    attempt,
    call,
    form_of,
    template_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD, NEXT = "probe answer", "probe next"
CALL = "probe0000"
WITH_TURN: Final = "with the turn"
WITH_NEXT: Final = "with the next message"
NOWHERE: Final = "not at all"


@dataclass(frozen=True)
class Ending:
    """Where a template ends a turn.

    written: With what the end is written.
    text: The end; where nothing writes one, the tokenizer's end token, empty if it has none.
    tokens: The ids of the special tokens that end a turn, whoever speaks next.
    """

    written: Literal["with the turn", "with the next message", "not at all"]
    text: str
    tokens: frozenset[int]


def ending_of(tokenizer: "PreTrainedTokenizerBase") -> Ending:
    """How the tokenizer's chat template ends a turn."""
    return _ending_of(template_of(tokenizer), tokenizer, len(tokenizer))


def specials_of(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """What matches the special tokens of a tokenizer in a text."""
    return _specials(tokenizer, len(tokenizer))


def through_special(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The beginning of a text up to its first special token, and that token; empty without one."""
    found = specials_of(tokenizer).search(text)
    return text[: found.end()] if found else ""


def _through_all(text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The same through all special tokens that follow upon the first, with or without white space.
    """
    end = 0
    for found in specials_of(tokenizer).finditer(text):
        if end and text[end : found.start()].strip():
            break
        end = found.end()
    return text[:end]


@lru_cache(maxsize=KNOWN)
def _ending_of(template: str, tokenizer: "PreTrainedTokenizerBase", size: int) -> Ending:
    form = form_of(tokenizer)
    said = form.of([ASKED, {"role": "assistant", "content": WORD}])
    behind = attempt(said, tokenizer).rpartition(WORD)[2]
    if end := _through_all(behind, tokenizer):
        return Ending(WITH_TURN, end, _ids([end], tokenizer))
    following = attempt([*said, *form.of([{"role": "user", "content": NEXT}])], tokenizer)
    between = following.rpartition(NEXT)[0].rpartition(WORD)[2]
    if end := through_special(between, tokenizer):
        return Ending(WITH_NEXT, end, _ids([end, _before_result(tokenizer)], tokenizer))
    end = _own_end(tokenizer)
    return Ending(NOWHERE, end, _ids([end], tokenizer))


def _before_result(tokenizer: "PreTrainedTokenizerBase") -> str:
    """What ends a call where its result comes next; empty if the template shows no such thing."""
    calls = [call(NAME, {KEY: VALUE}) | {"id": CALL}]
    result: Message = {"role": "tool", "content": NEXT, "name": NAME, "tool_call_id": CALL}
    form = form_of(tokenizer, [PROBE_TOOL])
    called = form.of([ASKED, {"role": "assistant", "tool_calls": calls}])
    text = attempt(called, tokenizer, [PROBE_TOOL]).rstrip()
    longer = attempt([*called, *form.of([result])], tokenizer, [PROBE_TOOL])
    between = longer[len(text) :].partition(NEXT)[0] if longer.startswith(text) and text else ""
    return through_special(between, tokenizer)


def _own_end(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.special_tokens_map.get("eos_token") or "")


def _ids(ends: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    last = (tokenizer(end, add_special_tokens=False).input_ids[-1:] for end in ends if end)
    return frozenset(int(i) for ids in last for i in ids)


@lru_cache(maxsize=KNOWN)
def _specials(tokenizer: "PreTrainedTokenizerBase", size: int) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    named = {token.content for token in added if token.special} | {_own_end(tokenizer)}
    known = sorted(filter(None, named), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or r"(?!)")
