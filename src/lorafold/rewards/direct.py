"""A reward that is a Python function of this process, without a limit of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorafold.rewards.calling import Function, Item, Wrong
from lorafold.rewards.judged import Judged, failure


class DirectReward:
    """A function as a reward.

    Args:
        function: as `calling.py` says.
    """

    def __init__(self, function: Callable[..., Any], weight: float = 1.0) -> None:
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self.weight = weight
        code = getattr(function, "__code__", None)
        try:
            self._function = Function(function, code and code.co_filename)
        except Wrong as wrong:
            raise failure(self.name, wrong.told) from None

    def __call__(self, judged: Sequence[Judged]) -> list[float | None]:
        """A finite number for each, or None. Raises LorafoldError."""
        if not judged:
            return []
        items = [Item(one.prompt, one.completion, one.row) for one in judged]
        try:
            return [reward for part in self._function.rewards(items) for reward in part]
        except Wrong as wrong:
            about = judged if wrong.at is None else judged[wrong.at : wrong.at + 1]
            raise failure(self.name, wrong.told, about) from None

    def close(self) -> None:
        """Nothing runs."""
