"""`lf.evaluate`: loss, perplexity and exact match of a model or adapter on rows, or the reward of
completions that it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.api.arguments import (
    Columns,
    Data,
    Paths,
    Rewarding,
    as_paths,
    as_rewards,
    as_rows,
    missing,
)
from lorafold.data.shapes import LABELS, PROMPT_ALONE, PROMPTS
from lorafold.data.stored import Rows
from lorafold.errors import LorafoldError
from lorafold.objectives import OBJECTIVES

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafold.evaluation import Evaluation, RewardEvaluation
    from lorafold.peft.saved import Saved
    from lorafold.step.preference_laws import Law

DRAWS = next(name for name, one in OBJECTIVES.items() if one.draws)  # all of them read rows alike


def evaluate(
    model: str | Path | PreTrainedModel | None = None,
    data: Data | None = None,
    *,
    columns: Columns | None = None,
    adapters: Paths = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    completions: bool = True,
    max_new_tokens: int | None = None,
    rewards: Rewarding = (),
    group: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    reward_seconds: float | None = None,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    console: Console | None = None,
) -> Evaluation | RewardEvaluation:
    """Measure loss in nats a labelled token, perplexity and exact match, with 95% intervals.

    On rows of preferences these are of the chosen completions, and the accuracy, the margin and the
    change of the preference are measured as well. With rewards the model draws completions of
    prompts, and what they are worth is measured instead of all that.

    Args:
        model: A name or path, or a loaded model, which is measured with its active adapters and
            takes no other `storage`, `device`, `revision` or `allow_other_base`. None takes the
            base that the adapters say they were trained on; without adapters smollm2.
        data: Rows, of the forms that `lf.train` takes; texts with labels need a classifier.
        columns: The keys of the rows under other names, as in {"prompt": "question"}.
        adapters: Saved adapters to load on a model that is named.
        tokenizer: None takes that of the adapters or the model.
        max_length: Longer rows are cut to this many tokens for the loss; None takes 1,024, or as
            many as the model has positions. With rewards a prompt and its completion have at most
            as many, and a longer prompt is refused.
        completions: Generate completions for the exact match; False measures the loss alone.
        max_new_tokens: The most tokens of a completion; None takes the longest reference, and with
            rewards 256.
        rewards: What judges completions that the model draws, as for `lf.train`: one or several
            functions, or names such as "rewards.py:score". Rows are prompts then, and their other
            keys the rewards'.
        group: With rewards: how many completions of each prompt; None takes 1.
        temperature: With rewards: None takes 1, as in training; 0 takes the most likely tokens.
        seed: With rewards: what the draws follow from; None takes 0. Under a run's seed they are
            those of its held-out rows.
        reward_seconds: With rewards: the seconds that a call of one may take, which judges about 64
            completions; None takes 30.
        storage: How the base stores its weights: auto, fp32, bf16, nf4 or int8.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError for bad rows, for a model or adapter that can't be loaded or does not suit
    the rows, for a loss that is not finite, and for a reward that fails.
    """
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
    from lorafold.api.opened import at_hand, length_for, opened
    from lorafold.peft.saved import open_all

    found = open_all(as_paths(adapters))
    asked = at_hand(
        model,
        found,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    labels = rows.give(LABELS) and not judges
    length = length_for(asked, max_length, found, console, head=labels)
    if judges:
        from lorafold.objectives.laws import Drawing
        from lorafold.rewards import Rewards

        longest = Drawing.max_new_tokens if max_new_tokens is None else max_new_tokens
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


def check_prompts(rows: Rows) -> None:
    """Raise LorafoldError for rows that give no prompts."""
    if wrong := [one for one in rows.shapes if one is None or PROMPTS not in one.gives]:
        raise LorafoldError(
            f"data: found rows of {wrong[0]}, expected rows with a prompt for rewards, such as"
            f" {PROMPT_ALONE} with or without a completion"
        )


def law_of_adapters(adapters: Sequence[Saved]) -> Law:
    """The law of pairs that the last adapter was trained with, from its record; that of DPO if it
    was trained otherwise.
    """
    from lorafold.objectives.laws import law_of
    from lorafold.step.preference_laws import Dpo

    recipe = adapters[-1].recipe if adapters else {}
    objective = str(recipe.get("objective"))
    declared = OBJECTIVES.get(objective)
    if declared is None or not declared.law or declared.draws:
        return Dpo()
    return law_of(objective, recipe.get("beta"), recipe.get("objective_options") or {})
