"""Creates an objective's algorithm and sampling options from a recipe."""

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
from lorafold.training_step.policy_algorithms import PolicyAlgorithm
from lorafold.training_step.preference_algorithms import Law, validated_dataclass

L = TypeVar("L")


def algorithm_class(declared: Declared, laws: ModuleType) -> Any:
    return getattr(laws, declared.law) if isinstance(declared.law, str) else declared.law


def checked_options(
    kind: type[L], options: Mapping[str, Any], objective: str, other_names: Sequence[str] = ()
) -> L:
    """Validates options. `other_names` are further valid names, which the error message lists."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in options if name not in names]:
        field = "objective_options: " * (unknown != ["beta"])
        raise LorafoldError(
            f"{field}{', '.join(unknown)}: the objective {objective} has no such option; it has:"
            f" {', '.join([*names, *other_names])}"
        )
    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        raise LorafoldError(
            f"objective {objective}: {'.'.join(map(str, first['loc']))}: found {first['input']!r},"
            f" expected {first['msg'].removeprefix('Input should be ')}"
        ) from None


@validated_dataclass
class SamplingOptions:
    """Options of sampling and rewards.

    group: the number of completions per prompt.
    max_new_tokens: the maximum number of tokens of a completion.
    temperature: the temperature of sampling, also in the loss.
    dynamic_sampling: the maximum number of times that a group without a learning signal is sampled
        again (DAPO: Yu et al. 2025, arXiv 2503.14476, section 3.2).
    updates: how often a step updates the weights with each mini-batch.
    mini_batches: the number of parts of a step's prompts, each of which updates the weights.
    entropy_floor: entropy in nats per token, below which the weight of an entropy bonus grows (He
        et al. 2025, arXiv 2505.22312, section 4.2).
    overlong: the number of tokens before `max_new_tokens` over which a penalty grows from 0 to 1
        (DAPO, eq. 13).
    truncated: whether completions cut off at `max_new_tokens` count in the loss.
    long_prompts: whether prompts without room for `max_new_tokens` within max_length are an error.
    exact: make sampling and training log-probabilities bit-identical, which is slower.
    rewards: names for `lorafold.rewards.reward_of`.
    environment: FILE.py:NAME or tools:FILE.py (see `lorafold.rewards.environments`).
    turns: the maximum number of the model's turns in an environment.
    reward_seconds: the time limit of a reward for each completion, and of an environment for each
        turn.
    reward_concurrency: the number of concurrent calls of an asynchronous reward.
    reward_retries: how often a failed call of an asynchronous reward is retried.
    """

    group: Annotated[int, Field(ge=2)] = 8
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    updates: Annotated[int, Field(ge=1)] = 1
    mini_batches: Annotated[int, Field(ge=1)] = 1
    entropy_floor: Annotated[float, Field(ge=0)] = 0.0
    overlong: Annotated[int, Field(ge=0)] = 0
    truncated: Literal["counted", "masked"] = "counted"
    long_prompts: Literal["refused", "dropped"] = "refused"
    exact: bool = False
    rewards: tuple[str, ...] = ()
    environment: str = ""
    turns: Annotated[int, Field(ge=1)] = 16
    reward_seconds: Annotated[float, Field(gt=0)] = 30.0
    reward_concurrency: Annotated[int, Field(ge=1)] = 16
    reward_retries: Annotated[int, Field(ge=0)] = 2


def policy_options(
    objective: str, beta: float | None, options: Mapping[str, Any]
) -> tuple[PolicyAlgorithm, SamplingOptions]:
    given = given_options(beta, options)
    if "fill" in given and "dynamic_sampling" not in given:  # its name until 0.2
        given["dynamic_sampling"] = given.pop("fill")
    names = [field.name for field in fields(SamplingOptions)]
    sampling_options = {name: given.pop(name) for name in names if name in given}
    sampling = checked_options(SamplingOptions, sampling_options, objective)
    kind = algorithm_class(OBJECTIVES[objective], policy_algorithms)
    return checked_options(kind, given, objective, names), sampling


def preference_algorithm(objective: str, beta: float | None, options: Mapping[str, Any]) -> Law:
    kind = algorithm_class(OBJECTIVES[objective], preference_algorithms)
    return checked_options(kind, given_options(beta, options), objective)
