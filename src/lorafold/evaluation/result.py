"""The figures of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafold.evaluation.intervals import Interval
from lorafold.evaluation.preferences import PreferenceFigures
from lorafold.files.page import Shown


@dataclass(frozen=True)
class Measured:
    """What a run measures on held-out rows: the loss in nats, further figures by name, how they are
    told, and completions to read, as JSON.
    """

    loss: float
    figures: Mapping[str, Any] = field(default_factory=dict)
    told: str = ""
    samples: Sequence[Mapping[str, Any]] = ()

    @property
    def numbers(self) -> dict[str, float]:
        """The figures that are numbers, as trackers take them."""
        return {f"eval_{k}": v for k, v in self.figures.items() if isinstance(v, int | float)}

    def __str__(self) -> str:
        return f"held-out loss {self.loss:.4f}{self.told}"


@dataclass(frozen=True)
class Answer:
    """One row: its last message before the completion (or its text), the reference, and the model's
    completion (or class) in `answer`.
    """

    prompt: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        """Whether the completion equals the reference, surrounding whitespace aside."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Evaluation(Shown):
    """The loss in nats a labelled token (or a classified text), and exact match as a share of the n
    rows. Exact match is None for rows without references, the loss interval for a single row.
    Rows of preferences have both for their chosen completions, and `preference` besides. `losses`
    has of each row its summed loss and the tokens that it is over.
    """

    loss: float
    loss_interval: Interval | None
    exact_match: float | None
    exact_match_interval: Interval | None
    n: int
    rows: tuple[Answer, ...]
    preference: PreferenceFigures | None = None
    losses: tuple[tuple[float, int], ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def as_json(self) -> dict[str, Any]:
        """All figures, without the completions."""
        names = ("loss", "perplexity", "exact_match", "n", "loss_interval", "exact_match_interval")
        preference = {} if self.preference is None else self.preference.as_json()
        return {name: getattr(self, name) for name in names} | preference

    def __str__(self) -> str:
        def within(interval: Interval | None, form: str) -> str:
            return f" (95%: {interval[0]:{form}} to {interval[1]:{form}})" if interval else ""

        text = (
            f"{self.n} rows: loss {self.loss:.4f}{within(self.loss_interval, '.4f')}, perplexity"
            f" {self.perplexity:.3f}"
        )
        if self.exact_match is not None:
            text += (
                f", exact match {self.exact_match:.1%}{within(self.exact_match_interval, '.1%')}"
            )
        return text if self.preference is None else f"{text}\n{self.preference}"
