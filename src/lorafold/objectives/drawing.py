"""What an objective of policies draws in each step, and its law, from the options of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from lorafold.objectives import OBJECTIVES
from lorafold.objectives.laws import class_of, made
from lorafold.objectives.objective import given_options
from lorafold.step import policy_laws
from lorafold.step.policy_laws import STRICT, PolicyLaw


@checked(frozen=True, config=STRICT)
class Drawing:
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


def chosen(
    objective: str, beta: float | None, options: Mapping[str, Any]
) -> tuple[PolicyLaw, Drawing]:
    """The law of an objective of policies, and what it draws.

    Raises LorafoldError for an option that neither has, or a value out of its range.
    """
    given = given_options(beta, options)
    own = [field.name for field in fields(Drawing)]
    drawing = made(Drawing, {k: v for k, v in given.items() if k in own}, objective)
    kind: type[PolicyLaw] = class_of(OBJECTIVES[objective], policy_laws)
    law = made(kind, {k: v for k, v in given.items() if k not in own}, objective, own)
    return law, drawing
