"""Exports a whole model for Ollama: a GGUF file, and a Modelfile with its chat template.

Ollama from 0.34.1 on makes no model of a Modelfile with ADAPTER (ollama#14969), so adapters go in
folded. Its templates are in Go's language, which has plain chat here: `turns` finds what the
model's template writes around what is said.

Ollama joins all system messages to `.System`, and neighbouring messages of one role to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lorafold.data.render import ensure_chat_template
from lorafold.data.templates import template_of
from lorafold.errors import LorafoldError
from lorafold.exporting.gguf_model import FILE_TYPES
from lorafold.exporting.target import Progress, Subject, Target, Written
from lorafold.exporting.to_gguf_model import MIXED, TOLERANCE, file_of, problems_of, write_gguf
from lorafold.exporting.turns import Turns, adds, turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUOTES = '"""'
LAST = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
MODELFILE = "Modelfile"
LONGEST = 80  # characters of a name
FOLDED = "adapters are folded in, because Ollama from 0.34.1 on takes no ADAPTER in a Modelfile"
SILENT = "the model's template takes no system message: Ollama's leaves one out"


def go_template(turns: Turns) -> str:
    """The template of these marks."""
    before, between = (_text(part) for part in turns.system or ("", ""))
    start, a_open = _text(turns.start), _text(turns.a_open)
    u_open, end = _text(turns.u_open), _text(turns.end)
    given = f"{before}{{{{ $.System }}}}{between}"
    late = f"{{{{ if and $last $.System }}}}{given}{{{{ end }}}}" if turns.late else ""
    opened = start
    if turns.system is not None and not turns.late:
        opened = f"{{{{ if .System }}}}{given}{{{{ else }}}}{start}{{{{ end }}}}"
    return (
        f"{opened}{{{{ range $i, $m := .Messages }}}}{LAST}"
        f'{{{{ if eq $m.Role "user" }}}}{late}{{{{ $m.Content }}}}'
        f"{{{{ if $last }}}}{end}{{{{ end }}}}"
        f'{{{{ else if eq $m.Role "assistant" }}}}{a_open}{{{{ $m.Content }}}}'
        f"{{{{ if not $last }}}}{u_open}{{{{ end }}}}"
        "{{ end }}{{ end }}"
    )


def _text(part: str) -> str:
    """A text that Go's language takes as it is."""
    return part.replace("{{", '{{ "{{" }}')


def modelfile(weights: str, template: str, stops: Sequence[str]) -> str:
    """The content of a Modelfile.

    Raises LorafoldError for a text that it can't have.

    Args:
        weights: the name of the GGUF file beside it.
        template: in Ollama's language.
        stops: the texts that end a completion.
    """
    for text in (template, *stops):
        odd = [c for c in text if not c.isprintable() and c not in "\n\t"]
        if QUOTES in text or odd:
            found = QUOTES if QUOTES in text else repr(odd[0])
            raise LorafoldError(
                f"the model's chat template has {found}, which a Modelfile can't have"
            )
    ends = "".join(f"PARAMETER stop {QUOTES}{stop}{QUOTES}\n" for stop in stops)
    return f"FROM ./{weights}\nTEMPLATE {QUOTES}{template}{QUOTES}\n{ends}"


def chat_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str], list[str]]:
    """The template in Ollama's language, the texts that end a completion, and what people should
    know of it, a sentence each.

    Raises LorafoldError for a template that can't be said.
    """
    ensure_chat_template(tokenizer)
    turns, notes = turns_of(tokenizer), adds(tokenizer)
    if turns.system is None:
        notes.append(SILENT)
    return go_template(without_first(turns, tokenizer)), stops_of(tokenizer), notes


def without_first(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The marks without the token that begins a text, where the engine itself adds it."""
    first = str(tokenizer.bos_token or "")
    ids = tokenizer("a")["input_ids"]
    if not first or ids[0] != tokenizer.bos_token_id:
        return turns
    system = turns.system and (turns.system[0].removeprefix(first), turns.system[1])
    start = turns.start.removeprefix(first)
    return Turns(start, system, turns.a_open, turns.u_open, turns.end, turns.late)


def stops_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that end a completion."""
    ending = template_of(tokenizer).ending
    ids = [*sorted(ending.tokens), tokenizer.eos_token_id]
    texts = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids if i is not None]
    if not ending.tokens and ending.text.strip():
        texts.append(ending.text)
    return list(dict.fromkeys(texts))


class ToOllama(Target):
    """A model for Ollama, with adapters folded in."""

    name: ClassVar[str] = "ollama"
    engine: ClassVar[str | None] = "llamacpp"
    tensors: ClassVar[tuple[str, ...]] = (*FILE_TYPES, *MIXED)
    merged: ClassVar[bool] = True
    tolerance: ClassVar[Mapping[str, float | None]] = TOLERANCE

    def problems(self, subject: Subject) -> Sequence[str]:
        if found := problems_of(subject):
            return found
        try:
            template, stops, _ = chat_of(subject.tokenizer)
            modelfile(file_of(subject.tensors), template, stops)
        except LorafoldError as error:
            return [str(error)]
        return []

    def write(self, subject: Subject, directory: Path, progress: Progress) -> Written:
        template, stops, notes = chat_of(subject.tokenizer)
        file = file_of(subject.tensors)
        text = modelfile(file, template, stops)
        told = [*write_gguf(subject, directory, progress), *notes]
        (directory / MODELFILE).write_text(text, encoding="utf-8")
        name = directory_name(subject)
        launch = (
            ("ollama", "create", name, "-f", f"{{out}}/{MODELFILE}"),
            ("ollama", "run", name),
        )
        told = [FOLDED, *told] if subject.adapters else told
        return Written((MODELFILE, file), launch, tuple(told), {"base": f"{{out}}/{file}"})


def directory_name(subject: Subject) -> str:
    """A name for the model in Ollama, which takes letters of ASCII."""
    name = subject.called or Path(subject.base.name).name
    kept = [c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name.lower()]
    return "".join(kept).strip("-_")[:LONGEST] or "model"
