"""The options that name what judges a policy's completions."""

from typing import Annotated

import typer

from lorafold.rewards.judging import ADAPTER

RewardOption = Annotated[
    list[str] | None,
    typer.Option(
        help="For objectives that draw completions: what judges them, as FILE.py:FUNCTION,"
        " regex:PATTERN, schema:FILE.json, reasoning-gym:TASK or adapter:DIR, with a weight as"
        " in 0.5*... or without; several are added."
    ),
]
RewardAdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        hidden=True,
        help="The same as --reward adapter:DIR: a reward model that was trained on this base"
        " (--objective reward). It scores with the base of the run, which is in memory once.",
    ),
]


def rewards_of(reward: list[str] | None, reward_adapter: list[str] | None) -> list[str]:
    """The names of all rewards, reward models among them."""
    return [*(reward or ()), *(f"{ADAPTER}{path}" for path in reward_adapter or ())]
