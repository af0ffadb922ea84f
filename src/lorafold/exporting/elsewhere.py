"""What another engine is told: which model the base is, and which chat template it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafold.data.render import ensure_chat_template
from lorafold.errors import NoTokenizer
from lorafold.exporting.target import Subject
from lorafold.opening import Base

TEMPLATE = "chat_template.jinja"
SNAPSHOTS = "snapshots"  # the directory of a hub model's commits in its cache


@dataclass(frozen=True)
class Elsewhere:
    """The base as another engine takes it, which reads Hugging Face's directories.

    Attributes:
        model: a hub id, or the path of a directory.
        revision: the commit of a hub model that is in use here.
        notes: a sentence where the name alone would not do.
    """

    model: str
    revision: str | None
    notes: tuple[str, ...]


def elsewhere(base: Base) -> Elsewhere:
    """How another engine finds the base."""
    path = base.source.path
    if base.source.gguf is not None:
        note = f"the base is a GGUF file; its plain copy, which the engine reads, is {path}"
        return Elsewhere(str(path), None, (note,))
    if path.parent.name == SNAPSHOTS and not Path(base.name).is_dir():
        return Elsewhere(base.name, path.name, ())
    return Elsewhere(str(path), None, ())


def write_template(subject: Subject, directory: Path) -> bool:
    """Write the chat template that the adapters were trained with, if the base has another or none.

    Args:
        directory: gets `TEMPLATE`.
    """
    try:
        tokenizer = subject.tokenizer
    except NoTokenizer:
        return False
    ensure_chat_template(tokenizer)
    text = tokenizer.chat_template
    if not isinstance(text, str) or text == subject.base.tokenizer().chat_template:
        return False
    (directory / TEMPLATE).write_text(text, encoding="utf-8")
    return True
