"""Adapters that mean harm: each function turns the copy of a good adapter into one, and says what
it attacks.

    for case in CASES: case.make(folder, base)      an entry of the directory `folder`
    stop = moving(folder)                           files of it change from now on, until stop()

`CASES` are by name, with whether the server has to tell that they are wrong; the others may be
served, as long as nobody else notices.
"""

from hostile_adapters import configs, files, patterns, records, templates, tokenizers, weights
from hostile_adapters.case import CASES, Case
from hostile_adapters.moving import MOVING, moving

__all__ = [
    "CASES", "MOVING", "Case", "configs", "files", "moving", "patterns", "records", "templates",
    "tokenizers", "weights",
]  # fmt: skip
