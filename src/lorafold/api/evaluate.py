"""`lf.evaluate`: loss, perplexity and exact match on rows, or rewards of sampled completions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.rewards import Calls, Rewards
from lorafold.rewards.reward import FORMS, environment_of

if TYPE_CHECKING:
    from lorafold.evaluation import Evaluation, RewardEvaluation
    from lorafold.peft.adapter_directory import SavedAdapter
    from lorafold.training_step.preference_algorithms import Law

SAMPLING = next(name for name, one in OBJECTIVES.items() if one.draws)  # all read the same rows
REWARDS = "Rewards"  # a panel of the help


@opt.verb
def evaluate(
    model: opt.ModelOrLoaded = None,
    data: opt.MeasuredRows = None,
    *,
    adapters: opt.Adapters = (),
    tokenizer: opt.Tokenizer = None,
    max_length: opt.OptionalLength = None,
    completions: opt.Completions = True,
    max_new_tokens: opt.OptionalCount = None,
    rewards: Annotated[
        opt.RewardSources,
        opt.Option(
            f"Measure the reward of sampled completions instead: {FORMS}, optionally with a weight,"
            " as in 0.5*adapter:DIR. Several rewards are added up. Rows are then prompts, with the"
            " fields that the reward needs. In Python, also functions.",
            kind=list[str],
            flag="--reward",
            panel=REWARDS,
        ),
    ] = (),
    environment: opt.Environment = None,
    turns: Annotated[int | None, opt.Option(panel=REWARDS, min=1)] = None,
    group: Annotated[int | None, opt.Option(panel=REWARDS, min=1)] = None,
    temperature: Annotated[float | None, opt.Option(panel=REWARDS, min=0)] = None,
    seed: Annotated[int | None, opt.Option(panel=REWARDS, min=0, max=2**32 - 1)] = None,
    reward_seconds: Annotated[float | None, opt.Option(panel=REWARDS)] = None,
    console: opt.Progress = None,
    **base_options: Unpack[opt.RowsOptions],
) -> "Evaluation | RewardEvaluation":
    """Measure loss, perplexity and exact match on held-out rows, with 95% intervals.

    The loss covers only completions. Exact match is the share of greedy completions that equal the
    reference, ignoring surrounding whitespace; rows of plain text have none. On rows of text and
    label, the model is a classifier and exact match is its accuracy.

    On preference rows, these figures are for the chosen completions. They are followed by the share
    of pairs in which the model prefers the chosen completion, and, compared with the model without
    the last adapter, reward accuracy and margin, the change of both log-probabilities, and the KL.

    With `rewards`, rows are prompts, the model samples completions, and the result is the mean
    total reward and each reward, with intervals over prompts, completion lengths, entropy, and the
    three best and worst completions.

    Args:
        max_length: Truncate rows to this many tokens for the loss. Default: 1,024, or the model's
            maximum if it is smaller. With rewards, the limit is for prompt and completion, and
            prompts that leave no room for `max_new_tokens` are rejected.
        max_new_tokens: The maximum number of tokens per completion. Default: 8 more than the
            longest reference has, or 256 with rewards.
        turns: The maximum number of turns in an environment. Default: 16.
        group: Completions per prompt (num_generations). Default: 1.
        temperature: 0 takes the most likely tokens; above 0 they are sampled. Default: 1, as in
            training.
        seed: The seed for sampling. The seed of a training run reproduces the completions that it
            sampled for held-out rows. Default: 0.
        reward_seconds: The time limit in seconds of a reward for each completion, and of an
            environment for each turn. Default: 30.

    Raises LorafoldError for bad rows, for a model or adapter that can't be loaded or does not match
    the rows, for a loss that is not finite, and for a reward that fails.

    Examples:
        lorafold eval demo/adapter --data demo/test.jsonl
        lorafold eval --data demo/test.jsonl --no-completions
        lorafold eval demo/adapter --data demo/test.jsonl --reward "regex:^\\{"
    """
    from lorafold.api.arguments import as_reading, as_rewards, as_rows, missing_argument
    from lorafold.data.formats import LABELS, PROMPT_ONLY, PROMPTS

    if data is None:
        raise missing_argument("data")
    sampling: dict[str, Any] = {
        "group": group, "temperature": temperature, "seed": seed, "reward_seconds": reward_seconds
    }  # fmt: skip
    sampling = {name: value for name, value in sampling.items() if value is not None}
    rewards = as_rewards(rewards)
    is_rewarded = bool(rewards or environment)
    if turns is not None and not environment:
        raise LorafoldError("turns: used only in an environment; pass --environment")
    if sampling and not is_rewarded:
        raise LorafoldError(
            f"{', '.join(sampling)}: used only for completions that rewards judge; pass --reward"
        )
    if is_rewarded and not completions:
        raise LorafoldError("completions: found False, expected True: rewards judge completions")
    objective = SAMPLING if is_rewarded else None
    rows = as_rows(data, as_reading(base_options), console, objective=objective)
    wrong = [one for one in rows.formats if one is None or PROMPTS not in one.provides]
    if is_rewarded and wrong:
        raise LorafoldError(
            f"data: found rows of {wrong[0]}, expected rows with a prompt for rewards, such as"
            f" {PROMPT_ONLY} with or without a completion"
        )
    from lorafold import evaluation
    from lorafold.api.model_arguments import load_with_adapters, resolve_model, truncation_length

    base, saved = resolve_model(model, adapters, console, **base_options)
    labels = rows.provides(LABELS) and not is_rewarded
    length = truncation_length(base, max_length, saved, console, head=labels)
    if is_rewarded:
        from lorafold.objectives.algorithm_options import SamplingOptions

        calls = Calls()._replace(seconds=sampling.pop("reward_seconds", Calls().seconds))
        longest = SamplingOptions.max_new_tokens if max_new_tokens is None else max_new_tokens
        turns = turns or (SamplingOptions.turns if environment else 1)
        options = evaluation.RewardSettings(length, longest, turns=turns, **sampling)
        with (
            Rewards.of(*rewards, calls=calls) as judge,
            environment_of(environment, calls) as played,
        ):
            model, words = load_with_adapters(base, saved, tokenizer, console=console)
            return evaluation.evaluate_rewards(model, words, rows, judge, options, console, played)
    loaded, tokenizer = load_with_adapters(base, saved, tokenizer, classify=labels, console=console)
    algorithm = preference_algorithm(saved)
    settings = evaluation.EvaluationSettings(completions, max_new_tokens, algorithm)
    return evaluation.evaluate(loaded, tokenizer, rows, length, settings, console)


def preference_algorithm(adapters: Sequence["SavedAdapter"]) -> "Law":
    """Returns the preference algorithm that the last adapter was trained with, or else DPO."""
    from lorafold.objectives.algorithm_options import preference_algorithm
    from lorafold.training_step.preference_algorithms import Dpo

    recipe = adapters[-1].recipe if adapters else {}
    objective = str(recipe.get("objective"))
    declared = OBJECTIVES.get(objective)
    if declared is None or not declared.law or declared.draws:
        return Dpo()
    options = recipe.get("objective_options") or {}
    return preference_algorithm(objective, recipe.get("beta"), options)
