"""Values of other tools' files, converted: YAML leaves `2e-4` and quoted numbers as text, and each
tool converts them in its own way.

Each function raises LorafoldError with what was found and what is expected.
"""

from math import isfinite
from typing import Any

from lorafold.errors import LorafoldError


def number(value: Any) -> float:
    """A finite number, also where YAML left it as text."""
    try:
        if isinstance(value, bool) or not isfinite(found := float(value)):
            raise ValueError
        return found
    except (TypeError, ValueError):
        raise LorafoldError(f"found {value!r}, expected a number") from None


def text(value: Any) -> str:
    """The value, which must be text."""
    if not isinstance(value, str):
        raise LorafoldError(f"found {value!r}, expected text")
    return value


def integer(value: Any) -> int:
    """A whole number, also where it is written as text or as 3.0."""
    found = number(value)
    if found != int(found):
        raise LorafoldError(f"found {value!r}, expected a whole number")
    return int(found)


def boolean(value: Any) -> bool:
    """True or false, also as the texts true, yes, on, false, no and off."""
    texts = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    found = texts.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise LorafoldError(f"found {value!r}, expected true or false")
    return found


def names(value: Any) -> tuple[str, ...]:
    """The names in a list, or in a text with commas between them."""
    found = value.split(",") if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise LorafoldError(f"found {value!r}, expected a list of names")
    return tuple(stripped for name in found if (stripped := name.strip()))


def choice(value: Any, *choices: str) -> str:
    """The value, which must be one of `choices`."""
    if value not in choices:
        raise LorafoldError(f"found {value!r}, expected {' or '.join(choices)}")
    return str(value)


def product(a: Any, b: Any) -> float:
    """The product of two numbers in 12 digits: 2e-4 times 3 is 6e-4, not 0.0006000000000000001."""
    return float(f"{number(a) * number(b):.12g}")
