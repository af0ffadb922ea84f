"""A chat template in Ollama's language, which is Go's, and the Modelfile that has it.

    {{ if .System }}before{{ .System }}between{{ else }}start{{ end }}
    {{ range .Messages }} user: content, and `end` after the last
                          assistant: a_open, content, and u_open unless it is the last

Ollama joins all system messages to `.System`, and neighbours of one role to one message. The
Modelfile has texts in three quotation marks, which are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

from lorafold.errors import LorafoldError
from lorafold.exporting.turns import Turns

QUOTES = '"""'
LAST = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"


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
