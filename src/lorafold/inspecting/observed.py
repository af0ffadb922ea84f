"""What is to be looked at in the figures of a policy's run, said with its numbers.

An end of a run is a tenth of its steps, three at least, so that the noise of a step does not speak.
Whether something is wrong, only the completions tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from statistics import fmean, variance
from typing import Any

Values = Sequence[float | None]
FEWEST = 3  # steps at an end
COLLAPSED = 0.1  # of the entropy at first
CUT_OFF = 0.5  # of the completions
LONGER = 2.0  # times as long at one end as at the other
SILENT = 0.8  # of the groups
SHARED = "reward "  # begins the name of one reward of several


def ends(values: Values) -> tuple[list[float], list[float]] | None:
    """The values of the first and of the last steps; None where there are too few."""
    found = [value for value in values if value is not None]
    n = max(FEWEST, len(found) // 10)
    return None if len(found) < 2 * n else (found[:n], found[-n:])


def moved(values: Values) -> tuple[float, float, int] | None:
    """(mean at first, mean at last, -1 or 1), or None where these differ by less than two standard
    errors.
    """
    if (found := ends(values)) is None:
        return None
    first, last = found
    error = sqrt(sum(variance(part) / len(part) for part in found))
    change = fmean(last) - fmean(first)
    if change == 0 or abs(change) < 2 * error:
        return None
    return fmean(first), fmean(last), 1 if change > 0 else -1


def observed(
    steps: Mapping[str, Values],
    held_out: Mapping[str, Sequence[Any]],
    options: Mapping[str, Any],
    own: int | None = None,
) -> list[str]:
    """The observations, in sentences.

    Args:
        steps: Figures by name, of each step.
        held_out: Figures by name, of each measure on held-out prompts.
        options: Of the objective.
        own: The step that the adapter is of, if not the last one.
    """
    return [*_of_steps(steps, options), *_of_held_out(held_out, own)]


def _of_steps(steps: Mapping[str, Values], options: Mapping[str, Any]) -> Iterator[str]:
    if (found := ends(steps.get("entropy", ()))) is not None:
        first, last = map(fmean, found)
        if last < COLLAPSED * first:
            yield (
                f"Entropy went from {first:.3g} to {last:.3g} nats a token, {last / first:.0%} of"
                " what it was: the policy hardly explores any more."
            )
    if (found := ends(steps.get("cut off", ()))) is not None and fmean(found[1]) > CUT_OFF:
        most = options.get("max_new_tokens")
        yield (
            f"{fmean(found[1]):.0%} of the completions of the last {len(found[1])} steps were cut"
            f" off at max_new_tokens{'' if most is None else f'={most}'}: the reward judged"
            " beginnings."
        )
    if (
        found := ends(steps.get("groups without signal", ()))
    ) is not None and fmean(found[1]) > SILENT:
        yield (
            f"{fmean(found[1]):.0%} of the groups of the last {len(found[1])} steps had one reward"
            " for all their completions: prompts are too hard, too easy, or learned."
        )
    if (reward := moved(steps.get("reward", ()))) is None or reward[2] < 0:
        return
    rose = f"While the reward rose from {reward[0]:.3g} to {reward[1]:.3g}"
    for name, values in steps.items():
        one = moved(values) if name.startswith(SHARED) else None
        if one is not None and one[2] < 0:
            yield f"{rose}, {name} fell from {one[0]:.3g} to {one[1]:.3g}."
    if (length := moved(steps.get("tokens a completion", ()))) is not None:
        first, last, up = length
        if max(first, last) > LONGER * min(first, last):
            went = "grew" if up > 0 else "shrank"
            yield f"{rose}, completions {went} from {first:.3g} to {last:.3g} tokens."


def _of_held_out(held_out: Mapping[str, Sequence[Any]], own: int | None) -> Iterator[str]:
    names = ("step", "reward", "reward_interval")
    columns = [held_out.get(name, ()) for name in names]
    found = [one for one in zip(*columns, strict=False) if one[1] is not None]
    if len(found) < 2:
        return
    (start, first, low), (end, last, high) = found[0], found[-1]
    if low and high and high[1] < low[0]:
        when = "before the first step" if start == 0 else f"after step {start}"
        yield f"The held-out reward fell from {first:.4g} {when} to {last:.4g} after step {end}."
    trained = [one for one in found if one[0]]  # step 0 is before the first one
    best, most, _ = max(trained, key=lambda one: one[1], default=found[-1])
    if most > last:
        where = "lies beside it, in a directory with .best at the end of its name"
        yield (
            f"The held-out reward was highest after step {best}, {most:.4g}, and {last:.4g} after"
            f" step {end}: the adapter of step {best} {'is this one' if own == best else where}."
        )
