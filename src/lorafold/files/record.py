"""`lorafold.json`, the record of an adapter or a trained model: how it was trained, and on which
base. Adapters from PEFT have no record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafold.errors import LorafoldError, two_names_message

RECORD = "lorafold.json"
BASE = "base"  # the base's fingerprint
TRAINED_ON = "trained_on"  # {"storage": "nf4", "dtype": "bf16"}
TURNS = "turns"  # the most questions in a row that it was trained on
OTHER_BASE = "other_base"  # another base on which the adapter was loaded
RENAMED = {"base": "storage"}  # old names of fields, which existing files may contain
ALIASES = {"quantization": "storage"}  # other names of fields and options
NAMES = RENAMED | ALIASES


def current_names(fields: Mapping[str, Any], names: Mapping[str, str] = NAMES) -> dict[str, Any]:
    """Renames old fields and aliases. Raises if two names of one field are set."""
    for name, now in names.items():
        same = [n for n in (now, *names) if n != name and n in fields and names.get(n, n) == now]
        if name in fields and same:
            raise LorafoldError(two_names_message(name, same[0]))
    return {names.get(name, name): value for name, value in fields.items()}
