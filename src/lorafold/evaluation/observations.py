"""Warnings about a run: entropy, truncated completions, missing signals, lengths, held-out rewards.

Single steps are noisy, so the means of the first and the last tenth of the steps (at least three
each) are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, variance
from typing import Any

from lorafold.errors import escape_unprintable
from lorafold.files.templates import render_text

Values = Sequence[float | None]
MIN_STEPS = 3  # steps at an end
# what is worth a warning: shares of the initial entropy, of completions and groups; a length ratio
LIMITS = {"entropy": 0.1, "cut_off": 0.5, "no_signal": 0.8, "length": 2.0}
REWARD_PREFIX = "reward "  # prefix of the name of one reward of several


def first_and_last(values: Values) -> tuple[list[float], list[float]] | None:
    """The first and the last tenth of the known values, at least three each, or None."""
    known = [value for value in values if value is not None]
    n = max(MIN_STEPS, len(known) // 10)
    return None if len(known) < 2 * n else (known[:n], known[-n:])


def significant_change(values: Values) -> tuple[float, float] | None:
    """The means of the first and the last tenth; None if they differ by less than two standard
    errors.
    """
    if (ends := first_and_last(values)) is None:
        return None
    error = sqrt(sum(variance(end) / len(end) for end in ends))
    first, last = map(fmean, ends)
    return None if first == last or abs(last - first) < 2 * error else (first, last)


def observations_of(
    steps: Mapping[str, Values],
    held_out: Mapping[str, Sequence[Any]],
    options: Mapping[str, Any],
    saved_at: int | None = None,
) -> list[str]:
    """Warnings about a run; `saved_at` is the step at which the adapter was saved."""
    names = ("entropy", "cut off", "groups without signal")
    ends = {name: first_and_last(steps.get(name, ())) or ([0.0], [0.0]) for name in names}
    changes = {name: significant_change(values) for name, values in steps.items()}
    columns = (held_out.get(name, ()) for name in ("step", "reward", "reward_interval"))
    evaluations = [row for row in zip(*columns, strict=False) if row[1] is not None]
    trained = (row for row in evaluations if row[0])  # step 0 is before training
    return render_text(
        "evaluation/observations.jinja",
        means={name: [*map(fmean, pair)] for name, pair in ends.items()},
        counts={name: len(last) for name, (_, last) in ends.items()},
        changes={escape_unprintable(name): change for name, change in changes.items() if change},
        evaluations=evaluations,
        best=max(trained, key=lambda row: row[1], default=None),
        saved_at=saved_at,
        options={"max_new_tokens": None, "environment": "", **options},
        limits=LIMITS,
        prefix=REWARD_PREFIX,
    ).splitlines()
