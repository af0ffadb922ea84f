"""Which columns of a user's rows may be the prompt and the completion: the `--columns` to try.

    {"Frage": "Wann?", "Antwort": "Morgen.", "id": "3"}      prompt=Frage,completion=Antwort

By their names where these are known, else of two columns of text the first and the last, which is
said to be a guess. Nothing is read under other names unless the user asks for it.
"""

import re
import shlex
from collections.abc import Sequence

from lorafold.data.parsing import Row

ASKED = {
    *("prompt", "question", "query", "instruction", "input", "user", "q"),
    *("frage", "eingabe", "anfrage"),
}
SAID = {
    *("completion", "answer", "response", "output", "reply", "assistant", "a"),
    *("antwort", "ausgabe"),
}
WORDED = re.compile(r"[^\W\d_]")  # a text with a letter is no number or date


def proposed(row: Row) -> str:
    """The options to try for a row of no known shape; empty where there is no plain guess."""
    texts = [key for key, value in row.items() if isinstance(value, str) and WORDED.search(value)]
    asked, said = _named(texts, ASKED), _named(texts, SAID)
    if len(asked) == len(said) == 1:
        return _columns({"prompt": asked[0], "completion": said[0]})
    if len(texts) == 2:
        found = _columns({"prompt": texts[0], "completion": texts[1]})
        return f"{found} (a guess by their order, if the file begins with names)" * bool(found)
    return ""


def _named(keys: Sequence[str], names: set[str]) -> list[str]:
    return [key for key in keys if key.strip().lower() in names]


def _columns(names: dict[str, str]) -> str:
    """The option, with which `columns_of` reads these names; empty if it could not."""
    pairs = [f"{name}={column}" for name, column in names.items() if name != column]
    if any("," in pair or pair != pair.strip() for pair in pairs) or not pairs:
        return ""
    return f"did you mean --columns {shlex.quote(','.join(pairs))}"
