"""What the options of a method may be. Each check returns what is wrong, as an error says it, and
`refuse` raises with all that is.
"""

from __future__ import annotations

from typing import Any

from lorafold.errors import LorafoldError


def whole(name: str, value: Any) -> list[str]:
    """That an option is not a whole number from 1, or nothing."""
    fine = isinstance(value, int) and value >= 1
    return [] if fine else [f"{name}: found {value!r}, expected a whole number from 1"]


def below_one(name: str, value: float) -> list[str]:
    """That an option is not a probability below 1, or nothing."""
    return [] if 0 <= value < 1 else [f"{name}: found {value!r}, expected 0 or more, below 1"]


def one_of(name: str, value: str, choices: tuple[str, ...]) -> list[str]:
    """That an option is none of the choices, or nothing."""
    wrong = f"{name}: found {value!r}, expected {' or '.join(choices)}"
    return [] if value in choices else [wrong]


def refuse(spec: object, *wrong: list[str]) -> None:
    """Raise LorafoldError with all that is wrong with the options of a spec, if anything is."""
    if found := [one for several in wrong for one in several]:
        raise LorafoldError(f"{type(spec).__name__}: {'; '.join(found)}")
