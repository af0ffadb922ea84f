"""Values of other tools' files, converted: YAML leaves `2e-4` and quoted numbers as text, and each
tool converts them in its own way.

Each function raises LorafoldError with what was found and what is expected.
"""

from math import isfinite
from typing import Any

from lorafold.errors import LorafoldError


def number(value: Any) -> float:
    try:
        if isinstance(value, bool) or not isfinite(found := float(value)):
            raise ValueError
        return found
    except (TypeError, ValueError):
        raise LorafoldError(f"found {value!r}, expected a number") from None


def word(value: Any) -> str:
    if not isinstance(value, str):
        raise LorafoldError(f"found {value!r}, expected a word")
    return value


def whole(value: Any) -> int:
    found = number(value)
    if found != int(found):
        raise LorafoldError(f"found {value!r}, expected a whole number")
    return int(found)


def truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = words.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise LorafoldError(f"found {value!r}, expected true or false")
    return found


def names(value: Any) -> tuple[str, ...]:
    """A list, or its members with commas between."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise LorafoldError(f"found {value!r}, expected a list of names")
    return tuple(stripped for name in found if (stripped := name.strip()))


def choice(value: Any, *choices: str) -> str:
    if value not in choices:
        raise LorafoldError(f"found {value!r}, expected {' or '.join(choices)}")
    return str(value)


def product(a: Any, b: Any) -> float:
    """Of two numbers as people write them: 2e-4 times 3 is 6e-4, and not 0.0006000000000000001."""
    return float(f"{number(a) * number(b):.12g}")
