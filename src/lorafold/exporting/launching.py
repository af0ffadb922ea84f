"""How exported files are used, in lines that a shell takes as they are, whatever a path has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from shlex import quote

OUT = "{out}"  # stands for the directory of the export
CONTENT = "$(cat "  # begins a word that is the content of a file, whose path follows
LITERAL = re.compile(r'"\{out\}([^"]*)"')

Word = str | Callable[[str], str]  # or what makes it from the directory
Line = str | tuple[Word, ...]  # text, Python or words of a command


def placed(line: Line, out: str) -> str:
    """A line with the directory in it. Words are quoted as a shell wants them; in text, the path
    may be in a Python string alone.
    """
    if isinstance(line, tuple):
        return " ".join(_word(word, out) for word in line)
    return LITERAL.sub(lambda found: json.dumps(out + found[1], ensure_ascii=False), line)


def _word(word: Word, out: str) -> str:
    if callable(word):
        return quote(word(out))
    if word.startswith(CONTENT):
        return f'"$(cat {quote(word.removeprefix(CONTENT).replace(OUT, out))})"'
    return quote(word.replace(OUT, out))
