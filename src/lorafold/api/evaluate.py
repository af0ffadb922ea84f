"""`lf.evaluate`: loss, perplexity and exact match of a model or adapter on rows, or the reward of
completions that it draws.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES
from lorafold.rewards.judging import FORMS

if TYPE_CHECKING:
    from lorafold.data.row_store import Rows
    from lorafold.evaluation import Evaluation, RewardEvaluation
    from lorafold.peft.saved import Saved
    from lorafold.training_step.preference_algorithms import Law

DRAWS = next(name for name, one in OBJECTIVES.items() if one.draws)  # all of them read rows alike
REWARDS = "Rewards"


@opt.verb
def evaluate(
    model: opt.ModelOrLoaded = None,
    data: opt.MeasuredRows = None,
    *,
    columns: opt.Columns = None,
    adapters: opt.Adapters = (),
    tokenizer: opt.Tokenizer = None,
    max_length: Annotated[int | None, opt.Option(min=2)] = None,
    completions: opt.Completions = True,
    max_new_tokens: Annotated[int | None, opt.Option(min=1)] = None,
    rewards: Annotated[
        opt.Rewarding,
        opt.Option(
            "Measure what completions are worth that the model draws: what judges them, as"
            f" {FORMS}, with a weight as in 0.5* or without; several are added. Rows are prompts"
            " then, with whatever else the reward wants. In Python also functions.",
            kind=list[str],
            flag="--reward",
            panel=REWARDS,
        ),
    ] = (),
    group: Annotated[int | None, opt.Option(panel=REWARDS, min=1)] = None,
    temperature: Annotated[float | None, opt.Option(panel=REWARDS, min=0)] = None,
    seed: Annotated[int | None, opt.Option(panel=REWARDS, min=0, max=2**32 - 1)] = None,
    reward_seconds: Annotated[float | None, opt.Option(panel=REWARDS)] = None,
    console: opt.Progress = None,
    **opening: Unpack[opt.Opening],
) -> "Evaluation | RewardEvaluation":
    """Measure loss, perplexity and exact match on held-out rows, with 95% intervals.

    The loss counts completions only. Exact match is the share of greedy completions that equal the
    reference, surrounding whitespace aside; rows of plain text have none. On rows of text and label
    the model is a classifier, and exact match is its accuracy.

    On rows of preferences these are of the chosen completions. Besides there are the share of pairs
    whose chosen completion the model finds more likely, and against the model without the last
    adapter the reward accuracy and margin, the change of both log-probabilities, and the KL.

    With `rewards` nothing of that is measured, but what completions are worth that the model draws:
    the mean reward over all of them and each reward, with intervals over prompts, how long they
    are, the entropy, and the three best and worst. Rows are prompts, as for training a policy.

    Args:
        max_length: Longer rows are cut to this many tokens for the loss. Default: 1,024, or as many
            as the model has positions. With rewards it has prompt and completion, and a longer
            prompt is refused.
        max_new_tokens: The most tokens of a completion. Default: those of the longest reference,
            and with rewards 256.
        group: How many completions of a prompt. Default: 1.
        temperature: 0 takes the most likely tokens; above 0 they are drawn. Default: 1, as in
            training.
        seed: What the draws follow from: under the seed of a run they are those of its held-out
            rows. Default: 0.
        reward_seconds: The seconds that a call of a reward may take, which judges about 64
            completions. Default: 30.

    Raises LorafoldError for bad rows, for a model or adapter that can't be loaded or does not suit
    the rows, for a loss that is not finite, and for a reward that fails.

    Examples:
        lorafold eval demo/adapter --data demo/test.jsonl
        lorafold eval --data demo/test.jsonl --no-completions
        lorafold eval demo/adapter --data demo/test.jsonl --reward "regex:^\\{"
    """
    from lorafold.api.arguments import as_paths, as_rewards, as_rows, missing
    from lorafold.data.shapes import LABELS

    if data is None:
        raise missing("data")
    judges = as_rewards(rewards)
    drawn: dict[str, Any] = {"group": group, "temperature": temperature, "seed": seed}
    drawn = {name: value for name, value in drawn.items() if value is not None}
    limit = {} if reward_seconds is None else {"limit": reward_seconds}
    check_given(judges, [*drawn, *(["reward_seconds"] if limit else [])], completions)
    rows = as_rows(data, columns, console, objective=DRAWS if judges else None)
    if judges:
        check_prompts(rows)
    from lorafold import evaluation
    from lorafold.api.loaded_model import at_hand, length_for, opened
    from lorafold.peft.saved import open_all

    found = open_all(as_paths(adapters))
    asked = at_hand(model, found, console, **opening)
    labels = rows.give(LABELS) and not judges
    length = length_for(asked, max_length, found, console, head=labels)
    if judges:
        from lorafold.objectives.algorithms import SamplingOptions
        from lorafold.rewards import Rewards

        longest = SamplingOptions.max_new_tokens if max_new_tokens is None else max_new_tokens
        settings = evaluation.RewardSettings(length, longest, **drawn)
        with Rewards.of(*judges, **limit) as judging:
            loaded, tokenizer = opened(asked, found, tokenizer, console=console)
            return evaluation.evaluate_rewards(loaded, tokenizer, rows, judging, settings, console)
    loaded, tokenizer = opened(asked, found, tokenizer, classify=labels, console=console)
    return evaluation.evaluate(
        loaded,
        tokenizer,
        rows,
        length,
        evaluation.EvaluationSettings(completions, max_new_tokens, law_of_adapters(found)),
        console,
    )


def check_given(judges: Sequence[Any], drawn: Sequence[str], completions: bool) -> None:
    """Raise LorafoldError for arguments that have no effect with rewards, or without.

    Args:
        judges: The rewards.
        drawn: The names of the arguments that are given of what is drawn for rewards.
        completions: Whether completions are asked for.
    """
    if drawn and not judges:
        raise LorafoldError(
            f"{', '.join(drawn)}: expected none without rewards, which judge what is drawn"
        )
    if judges and not completions:
        raise LorafoldError("completions: found False, expected True, as rewards judge them")


def check_prompts(rows: "Rows") -> None:
    """Raise LorafoldError for rows that give no prompts."""
    from lorafold.data.shapes import PROMPT_ALONE, PROMPTS

    if wrong := [one for one in rows.shapes if one is None or PROMPTS not in one.gives]:
        raise LorafoldError(
            f"data: found rows of {wrong[0]}, expected rows with a prompt for rewards, such as"
            f" {PROMPT_ALONE} with or without a completion"
        )


def law_of_adapters(adapters: Sequence["Saved"]) -> "Law":
    """The law of pairs that the last adapter was trained with, from its record; that of DPO if it
    was trained otherwise.
    """
    from lorafold.objectives.algorithms import law_of
    from lorafold.training_step.preference_algorithms import Dpo

    recipe = adapters[-1].recipe if adapters else {}
    objective = str(recipe.get("objective"))
    declared = OBJECTIVES.get(objective)
    if declared is None or not declared.law or declared.draws:
        return Dpo()
    return law_of(objective, recipe.get("beta"), recipe.get("objective_options") or {})
