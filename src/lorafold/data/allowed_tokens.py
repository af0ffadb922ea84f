"""Which control tokens the contents of messages may have as tokens, written in the chat template.

    {# control tokens in contents: ["<|user|>"] #}        or true, for all of them

A comment, so that every program renders the same, and whatever keeps, compares or sends the
template has it. Tokens that it does not name are read as text (`data.control_tokens`). A template
that joins contents as they stand has no turns that one could forge: it allows all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorafold.models.joined import JOINED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTE = re.compile(r"\A\{# control tokens in contents: (.*?) #\}\n")
ALL = None  # in place of words


def allow(tokenizer: PreTrainedTokenizerBase, words: Iterable[str] | None = ALL) -> None:
    """Let contents have these tokens, besides those that they may have already.

    Args:
        tokenizer: With its chat template, or with several; without one nothing is to be said.
        words: The texts of the tokens; None allows all.
    """
    template = tokenizer.chat_template
    if isinstance(template, str):
        tokenizer.chat_template = _noted(template, words)
    elif template:
        tokenizer.chat_template = {k: _noted(v, words) for k, v in template.items()}


def allowed(template: str) -> frozenset[str] | None:
    """The tokens that contents may have under a chat template; None for all."""
    if template.endswith(JOINED):
        return ALL
    found = NOTE.match(template)
    words = json.loads(found[1]) if found else []
    return ALL if words is True else frozenset(words)


def without_note(template: str) -> str:
    """A chat template without what this module wrote in it."""
    return NOTE.sub("", template)


def _noted(template: str, words: Iterable[str] | None) -> str:
    before = allowed(template)
    given = ALL if words is None or before is None else sorted({*before, *words})
    if given == [] or template.endswith(JOINED):
        return template
    # a comment ends with #}, which no word may write
    said = json.dumps(True if given is None else given).replace("#", "\\u0023")
    return f"{{# control tokens in contents: {said} #}}\n{without_note(template)}"
