"""`lorafold eval`: loss, perplexity and exact match of a model or adapter on rows, or the reward of
completions that it draws.
"""

from dataclasses import dataclass
from typing import Annotated

import typer

from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import Adapters, DataOption, JsonOption, Opening, emit, messages
from lorafold.cli.groups import grouped
from lorafold.rewards.judging import FORMS

REWARDS = "Rewards"
EXAMPLES = (
    "lorafold eval demo/adapter --data demo/test.jsonl",
    "lorafold eval --data demo/test.jsonl --no-completions",
    'lorafold eval demo/adapter --data demo/test.jsonl --reward "regex:^\\{"',
)


@dataclass(frozen=True)
class Rewarding:
    """What judges completions that are drawn, and how they are."""

    reward: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=REWARDS,
            help=f"Measure what completions are worth that the model draws: what judges them, as"
            f" {FORMS}, with a weight as in 0.5* or without; several are added. Rows are"
            " prompts then, with whatever else the reward wants.",
        ),
    ] = None
    group: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=REWARDS, help="How many completions of a prompt; without it 1."
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            rich_help_panel=REWARDS,
            help="0 takes the most likely tokens; above 0 they are drawn. Without it 1, as in"
            " training.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**32 - 1,
            rich_help_panel=REWARDS,
            help="What the draws follow from: under the seed of a run they are those of its"
            " held-out rows. Without it 0.",
        ),
    ] = None
    reward_seconds: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=REWARDS,
            help="The seconds that a call of a reward may take, which judges about 64 completions."
            " Without it 30.",
        ),
    ] = None


@grouped
def command(
    data: DataOption,
    adapters: Adapters,
    opening: Opening,
    rewarding: Rewarding,
    columns: ColumnsOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=(
                "Longer rows are cut to this many tokens for the loss. Without it 1,024, or as many"
                " as the model has positions. With rewards it has prompt and completion, and a"
                " longer prompt is refused."
            ),
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most tokens of a completion. Without it those of the longest reference, and"
            " with rewards 256.",
        ),
    ] = None,
    completions: Annotated[
        bool,
        typer.Option(help="Generate completions for the exact match, or measure only the loss."),
    ] = True,
    json: JsonOption = False,
) -> None:
    """Measure loss, perplexity and exact match on held-out rows, with 95% intervals.

    The loss counts completions only. Exact match is the share of greedy completions that equal the
    reference, surrounding whitespace aside; rows of plain text have none. On rows of text and label
    the model is a classifier, and exact match is its accuracy.

    On rows of preferences these are of the chosen completions. Besides there are the share of pairs
    whose chosen completion the model finds more likely, and against the model without the last
    adapter the reward accuracy and margin, the change of both log-probabilities, and the KL.

    With --reward nothing of that is measured, but what completions are worth that the model draws:
    the mean reward over all of them and each reward, with intervals over prompts, how long they
    are, the entropy, and the three best and worst. Rows are prompts, as for training a policy.
    """
    from lorafold.api.evaluate import evaluate

    result = evaluate(
        opening.model,
        data,
        columns=columns_of(columns),
        adapters=adapters.paths,
        max_length=max_length,
        completions=completions,
        max_new_tokens=max_new_tokens,
        rewards=rewarding.reward or (),
        group=rewarding.group,
        temperature=rewarding.temperature,
        seed=rewarding.seed,
        reward_seconds=rewarding.reward_seconds,
        console=messages(),
        **opening.how,
    )
    emit(json, result.as_json(), str(result))
