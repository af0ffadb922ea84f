"""The law of an objective that has one, made of the options of a recipe: its class, by the row of
the table, and for policies what they draw in each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES, Declared
from lorafold.objectives.objective import given_options
from lorafold.training_step import policy_algorithms, preference_algorithms
from lorafold.training_step.policy_algorithms import PolicyLaw
from lorafold.training_step.preference_algorithms import Law, algorithm

L = TypeVar("L")


def law_class(declared: Declared, laws: ModuleType) -> Any:
    """The class of the law that a row of the table names, itself or by its name among `laws`."""
    return getattr(laws, declared.law) if isinstance(declared.law, str) else declared.law


def checked_options(
    kind: type[L], given: Mapping[str, Any], objective: str, others: Sequence[str] = ()
) -> L:
    """A law, or other options, as they are given. The objective has others elsewhere."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in given if name not in known]:
        field = "objective_options: " * (unknown != ["beta"])
        raise LorafoldError(
            f"{field}{', '.join(unknown)}: the objective {objective} has no such option; it has:"
            f" {', '.join([*known, *others])}"
        )
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise LorafoldError(
            f"objective {objective}: {'.'.join(map(str, first['loc']))}: found {first['input']!r},"
            f" expected {first['msg'].removeprefix('Input should be ')}"
        ) from None


@algorithm
class SamplingOptions:
    """What is drawn of a prompt, and what judges it.

    Args:
        group: completions of a prompt.
        max_new_tokens: the most tokens of one.
        fill: how often a group from which nothing is learned is drawn again.
        updates: how often the weights are updated by the completions of a step.
        truncated: whether completions that were cut off there count in the loss.
        exact: draw bit by bit as the step computes, which takes longer.
        rewards: names as `lorafold.rewards.reward_of` reads them.
        reward_seconds: the seconds that a call of one may take.
    """

    group: Annotated[int, Field(ge=2)] = 8
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    fill: Annotated[int, Field(ge=0)] = 0
    updates: Annotated[int, Field(ge=1)] = 1
    truncated: Literal["counted", "masked"] = "counted"
    exact: bool = False
    rewards: tuple[str, ...] = ()
    reward_seconds: Annotated[float, Field(gt=0)] = 30.0


def policy_options(
    objective: str, beta: float | None, options: Mapping[str, Any]
) -> tuple[PolicyLaw, SamplingOptions]:
    """The law of an objective of policies, and its sampling."""
    given = given_options(beta, options)
    names = [field.name for field in fields(SamplingOptions)]
    own = {name: given.pop(name) for name in names if name in given}
    sampling = checked_options(SamplingOptions, own, objective)
    kind = law_class(OBJECTIVES[objective], policy_algorithms)
    return checked_options(kind, given, objective, names), sampling


def law_of(objective: str, beta: float | None, options: Mapping[str, Any]) -> Law:
    """The law of an objective."""
    kind = law_class(OBJECTIVES[objective], preference_algorithms)
    return checked_options(kind, given_options(beta, options), objective)
