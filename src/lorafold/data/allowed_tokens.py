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

from lorafold.data.messages import Message
from lorafold.data.template_forms import ASKED, VALUE, attempt, form_of
from lorafold.models.templates import JOINED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTE = re.compile(r"\A\{# control tokens in contents: (.*?) #\}\n")
ALL = None  # in place of words


def allow(tokenizer: PreTrainedTokenizerBase, words: Iterable[str] | None = ALL) -> None:
    """Let contents have these tokens, besides those that they may have already, and without those
    that the template writes.

    Args:
        tokenizer: With its chat template, or with several; without one nothing is to be said.
        words: The texts of the tokens; None allows all.
    """
    if not (template := tokenizer.chat_template):
        return
    named = template if isinstance(template, dict) else {"": template}
    if words is not None:
        words = frozenset(words)
        if words:
            words -= written_by("".join(named.values()), tokenizer, words)
        if not words:
            return
    noted = {name: _noted(text, words) for name, text in named.items()}
    tokenizer.chat_template = noted if isinstance(template, dict) else noted[""]


def written_by(
    template: str, tokenizer: PreTrainedTokenizerBase, words: Iterable[str]
) -> frozenset[str]:
    """Those of some words that a chat template writes itself, of pieces (as <|user|>) or as a word.

    Args:
        tokenizer: With this template, which probes of each role show.
    """
    form, system = form_of(tokenizer), {"role": "system", "content": VALUE}
    said: list[Message] = [ASKED, {"role": "assistant", "content": VALUE}, ASKED]
    texts = [
        attempt(form.of(messages), tokenizer, for_generation=True)
        for messages in (said, [system, *said], [*said[:2], {"role": "tool", "content": VALUE}])
    ]
    text = "".join([without_note(template), *texts])
    return frozenset(word for word in words if word in text)


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
    if template.endswith(JOINED):
        return template
    # a comment ends with #}, which no word may write
    said = json.dumps(True if given is None else given).replace("#", "\\u0023")
    return f"{{# control tokens in contents: {said} #}}\n{without_note(template)}"
