"""What is judged, and what judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lorafold.data.shapes import Conversation
from lorafold.errors import RewardFailed, printable


@dataclass(frozen=True)
class Judged:
    """One completion to judge.

    Attributes:
        prompt: as its row has it: a text, or messages.
        completion: what was generated, as text.
        row: the other fields of the row.
        where: what messages call it: "rows.jsonl row 7, completion 3".
        conversation: the prompt as generation had it, for a reward that renders it; None for the
            prompt alone.
    """

    prompt: str | list[dict[str, Any]]
    completion: str
    row: Mapping[str, Any]
    where: str
    conversation: Conversation | None = None


@runtime_checkable
class Reward(Protocol):
    """What gives each completion a number.

    Attributes:
        name: what it is called wherever it is shown.
        weight: what it counts for in a sum.
    """

    name: str
    weight: float

    def __call__(self, judged: Sequence[Judged]) -> Sequence[float | None]:
        """A finite number for each, or None where the reward does not apply. Raises LorafoldError,
        which names the reward and the completion that it fails on.
        """

    def close(self) -> None:
        """End what it runs. It may be called again, and then begins anew."""


def failure(name: str, told: str, judged: Sequence[Judged] = ()) -> RewardFailed:
    """The error of a reward.

    Args:
        told: what is wrong, and what was expected.
        judged: the completions that it is about, in their order.
    """
    ends = list(dict.fromkeys(one.where for one in (*judged[:1], *judged[-1:])))
    where = f"{' to '.join(ends)}: " if ends else ""
    return RewardFailed(printable(f"reward {name}: {where}{told}"))
