"""A conversation without its oldest exchanges, where it is too long.

What the system says, the last message of the user and the last exchange stay. An exchange goes as a
whole, so that the roles alternate as before and every result has its call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from lorafold.data.messages import Message


def shortened(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message]:
    """The messages without as many of the oldest ones as have to go; without all that may go, if
    that is not enough.

    Args:
        fits: whether some of its messages, in their order, are few enough.
    """
    units = _units(messages)

    def without(n: int) -> list[Message]:
        gone = {i for unit in units[:n] for i in unit}
        return [message for i, message in enumerate(messages) if i not in gone]

    n = bisect_left(range(len(units)), True, key=lambda n: fits(without(n)))
    return without(n)


def _units(messages: list[Message]) -> list[list[int]]:
    """The positions of what may go together, the oldest first: a user's message and all that
    follows up to the next one; after the last one, a message of the assistant and its results.
    """
    roles = [message["role"] for message in messages]
    last = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    units: list[list[int]] = []
    for i, role in enumerate(roles):
        if role == "system":
            continue
        if not units or role == "user" or (i > last and role == "assistant"):
            units.append([])
        units[-1].append(i)
    return [unit for unit in units[:-1] if last not in unit]
