"""`lorafold train`: one adapter, trained on a model and rows."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.columns import ColumnsOption, columns_of
from lorafold.cli.common import (
    AllowOtherOption,
    Computing,
    JsonOption,
    Output,
    TrainDataOption,
    emit,
    messages,
)
from lorafold.cli.groups import grouped
from lorafold.cli.pages import page_option
from lorafold.cli.recipe_options import RecipeFlags, of_recipe
from lorafold.cli.rewards import RewardAdapterOption, RewardOption, rewards_of
from lorafold.errors import LorafoldError
from lorafold.machine.processes import launched
from lorafold.recipe.recipe import Recipe

EXAMPLES = (
    "lorafold train --data demo/train.jsonl --out adapter --preview",
    "lorafold train --data demo/train.jsonl --out adapter",
    "lorafold train --data demo/train.jsonl --out small --rank 8 --plot small.html",
)


@of_recipe(Recipe.model_fields)
class Flags(RecipeFlags):
    """The recipe of a run."""


@grouped
def command(
    data: TrainDataOption,
    output: Output,
    computing: Computing,
    flags: Flags,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Held-out rows. Without them --eval-fraction 0.1 holds some out."),
    ] = None,
    reward: RewardOption = None,
    reward_adapter: RewardAdapterOption = None,
    columns: ColumnsOption = None,
    init_adapter: Annotated[
        Path | None,
        typer.Option(
            hidden=True, help="Start from this saved adapter, with its method and targets."
        ),
    ] = None,
    over: Annotated[
        list[Path] | None,
        typer.Option(
            hidden=True,
            help="Train over this saved adapter, which stays frozen below the new one; over a"
            " stack, each of it, the lowest first.",
        ),
    ] = None,
    allow_other_base: AllowOtherOption = False,
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="Print the first rows as the model will see them, with their tools and turns, mark"
            " the tokens that count in the loss, say what is found in all rows, and stop.",
        ),
    ] = False,
    html: Annotated[
        Path | None,
        page_option(
            "With --preview: write the rows as a page that needs no other file.", rare=True
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        page_option(
            "Also draw the curves of the run, as one HTML file; `lorafold history` draws them later"
            " too.",
            rare=True,
            name="--plot",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue a run that was stopped or killed from its last checkpoint, in OUT.run.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train one adapter on your data and write it in PEFT's format.

    The defaults are a recipe that works for most tasks: a base in 4 bits (QLoRA), LoRA of rank 16
    on all linear layers of the blocks, alpha 2r, dropout 0.05, learning rates 2e-4 for A and 3e-3
    for B (LoRA+), a cosine schedule with 3% warm-up, AdamW, and the loss on completions only.
    """
    recipe = flags.recipe()
    from dataclasses import asdict

    from lorafold.api.train import base_to_train, train

    console = messages()
    rewards = rewards_of(reward, reward_adapter)
    if preview and plot is not None:
        raise LorafoldError("--plot draws a run, and --preview starts none; expected one of them")
    if preview:
        from lorafold.api.arguments import as_rows, rows_to_train, source_of, with_rewards

        recipe, _ = with_rewards(recipe, rewards)
        named, objective = columns_of(columns), recipe.objective
        rows, where = rows_to_train(data, recipe, named, console), source_of(data)
        held_out = eval_data and as_rows(eval_data, named, console, objective=objective)
        from lorafold.training.preview import show
        from lorafold.training.request import Request

        request = Request(
            base_to_train(
                computing.model,
                over or (),
                init_adapter,
                console,
                allow_other_base=allow_other_base,
                **computing.how,
            ),
            output.out,
            recipe,
            rows,
            where,
            held_out or None,
            init_adapter=init_adapter,
            over=tuple(over or ()),
        )
        findings = show(request, console, html=html)
        if json:
            emit(json, {"data": findings.as_json()}, "")
        return
    if html is not None:
        raise LorafoldError("--html writes the page of --preview; expected both")
    result = train(
        recipe,
        data=data,
        out=output.out,
        model=computing.model,
        eval_data=eval_data,
        rewards=rewards,
        columns=columns_of(columns),
        init_adapter=init_adapter,
        over=over or (),
        allow_other_base=allow_other_base,
        resume=resume,
        overwrite=output.overwrite,
        console=console,
        **computing.how,
    )
    if plot is not None and launched().speaks:
        from lorafold.inspecting.history import read_history
        from lorafold.inspecting.history_page import page

        page(read_history(output.out), plot)
        console.print(f"page: {plot}", highlight=False, markup=False, soft_wrap=True)
    from lorafold.cli.pasted import after_training

    told = [str(result), *after_training(result, recipe, over or ())]
    emit(json, asdict(result), "\n".join(told))
