"""What a model's chat template does with a conversation."""

from __future__ import annotations

from collections.abc import Iterator

from lorafold.data.findings import account_of
from lorafold.diagnosis.finding import Finding
from lorafold.opening.base import Base


def findings(base: Base) -> Iterator[Finding]:
    """What there is to know of the template.

    Args:
        base: The model; its tokenizer is read.
    """
    tokenizer = base.tokenizer()
    if tokenizer.chat_template is None:
        yield Finding("template", "none; a plain one is used (### User: / ### Assistant:)", "")
        return
    account = account_of(tokenizer)
    yield Finding("template", "; ".join(account.lines), account.as_json())
