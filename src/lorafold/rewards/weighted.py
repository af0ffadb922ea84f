"""Several rewards, summed with their weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from lorafold.errors import LorafoldError
from lorafold.rewards.calling import LARGEST, Function, Item, Wrong, number
from lorafold.rewards.judged import Judged, Reward, failure
from lorafold.rewards.naming import reward_of
from lorafold.rewards.separate import LIMIT, SeparateReward


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


class Rewards:
    """Rewards of one run. A context, which closes them.

    Args:
        rewards: each with a name of its own.
        limit: the seconds that a call of one may take, where it runs in a process of its own.
    """

    def __init__(self, rewards: Sequence[Reward], limit: float = LIMIT) -> None:
        names = [reward.name for reward in rewards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise LorafoldError(f"rewards: found {', '.join(twice)} twice, expected each once")
        if not names:
            raise LorafoldError("rewards: found none, expected at least one")
        if not isinstance(limit, int | float) or isinstance(limit, bool):
            raise LorafoldError(f"rewards: found a limit of {limit!r}, expected seconds")
        if not 0 < limit < math.inf:
            raise LorafoldError(f"rewards: found a limit of {limit} s, expected more than 0")
        self._rewards = tuple(rewards)
        for reward in self._rewards:
            if isinstance(reward, SeparateReward):
                reward.limit = limit

    @classmethod
    def of(cls, *given: str | Callable[..., Any] | Reward, limit: float = LIMIT) -> Self:
        """Rewards from what stands for them: names as `reward_of` reads them, functions, which run
        in this process and without a limit, and rewards. Functions of one name are numbered.
        """
        made, names = list[Reward](), Counter[str]()
        try:
            for one in given:
                found: Any = reward_of(one) if isinstance(one, str) else one
                made.append(found := found if isinstance(found, Reward) else DirectReward(found))
                names[found.name] += 1
                if isinstance(found, DirectReward) and names[found.name] > 1:
                    found.name += f" {names[found.name]}"  # two lambdas have one name
            return cls(made, limit)
        except BaseException:
            for reward in made:
                reward.close()
            raise

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each, by its name."""
        return {reward.name: reward.weight for reward in self._rewards}

    def __call__(
        self, judged: Sequence[Judged]
    ) -> tuple[list[float | None], dict[str, list[float | None]]]:
        """The weighted sum for each completion, and the numbers of each reward by its name; None
        stands for a reward that does not apply, and for the sum where none does. Raises
        LorafoldError, which names the reward and the completion that it fails on.
        """
        each = {reward.name: _checked(reward, judged) for reward in self._rewards}
        weights, sums = self.weights.values(), list[float | None]()
        for numbers in zip(*each.values(), strict=True):
            applied = [w * x for w, x in zip(weights, numbers, strict=True) if x is not None]
            sums.append(sum(applied) if applied else None)
        for one, found in zip(judged, sums, strict=True):
            if found is not None and not abs(found) <= LARGEST:
                told = f"with weights it is {found:g}, expected at most {LARGEST:g} either way"
                raise failure(" + ".join(each), told, [one])
        return sums, each

    def close(self) -> None:
        """End what the rewards run."""
        for reward in self._rewards:
            reward.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _checked(reward: Reward, judged: Sequence[Judged]) -> list[float | None]:
    """The numbers of a reward, which may be one that others wrote."""
    found = reward(judged)
    if len(found) != len(judged):
        told = f"it returned {len(found)} rewards, expected {len(judged)}, one a completion"
        raise failure(reward.name, told, judged)
    try:
        return [number(value, at) for at, value in enumerate(found)]
    except Wrong as wrong:
        about = judged if wrong.at is None else judged[wrong.at : wrong.at + 1]
        raise failure(reward.name, wrong.told, about) from None
