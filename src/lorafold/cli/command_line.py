"""The words of a command line as they are typed: each option with its values, and what stands
without an option.

    --rank 8 --json rows.jsonl      --rank with 8, --json, and rows.jsonl under no name
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Word(NamedTuple):
    """An option by the name that is typed, with its values.

    name: Empty for a word that belongs to no option; it is the only value then.
    option: The declared option; None where there is none of that name.
    """

    name: str
    option: Any | None
    values: tuple[str, ...] = ()


def words(
    args: Sequence[str], options: Mapping[str, Any], interspersed: bool = True
) -> Iterator[Word]:
    """The words of a command line, in their order. A value may read like an option; of an option
    that there is not, the next word is its value unless it begins with two dashes.

    Args:
        options: The command's options, by each of their names.
        interspersed: Whether options may follow a word that belongs to none; else that word is the
            last one.
    """
    rest = deque(args)
    while rest:
        name, equals, value = rest.popleft().partition("=")
        option = options.get(name)
        if name == "--" and not equals:
            yield from (Word("", None, (one,)) for one in rest)
            return
        if option is not None:
            count = 0 if getattr(option, "is_flag", False) else option.nargs
            given = (value,) * bool(equals)
            following = min(max(count - len(given), 0), len(rest))
            yield Word(name, option, (*given, *(rest.popleft() for _ in range(following))))
        elif name.startswith("-") and name.strip("-"):
            has_value = not equals and rest and not rest[0].startswith("--")
            yield Word(name, None, (rest.popleft(),) if has_value else (value,) * bool(equals))
        else:
            yield Word("", None, (name + equals + value,))
            if not interspersed:
                return
