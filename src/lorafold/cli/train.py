"""`lorafold train`: one adapter from a model and a file of examples."""

from pathlib import Path
from typing import Annotated

import typer

from lorafold.cli.common import (
    DataOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    RevisionOption,
    TrustRemoteCodeOption,
    emit,
    messages,
)  # fmt: skip
from lorafold.step.reading import load_recipe
from lorafold.step.recipe import Recipe

FIELDS = "\n\n".join(
    f"{name} ({field.get_default()!r}): {field.description}"
    for name, field in Recipe.model_fields.items()
)
EPILOG = f"Recipe fields, for --set and --config, with their defaults:\n\n{FIELDS}"


def command(
    data: DataOption,
    out: Annotated[
        Path,
        typer.Option(
            help=(
                "Where the adapter goes, in PEFT's format. Checkpoints lie in OUT.run until it is"
                " done."
            )
        ),
    ],
    model: ModelOption = "smollm2",
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Held-out examples; without them --set eval_fraction=0.1 splits some off."
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="The adaptation method, by its word; lora unless the recipe says otherwise."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="How the base's weights are held: nf4 (4 bits), int8, bf16, fp32 or auto."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="sft (next token of completions) or classify (the class of a text)."),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help=(
                "adamw, adamw8bit, paged-adamw8bit or auto: fp32 state, but paged 8-bit on CUDA"
                " where memory is short."
            )
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        str | None,
        typer.Option(
            help=(
                "on or off: recompute activations in the backward pass, for less memory, more time;"
                " auto: if short."
            )
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A recipe in YAML; --set and flags go over it.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="One recipe field, as in --set rank=8; repeat it for more."),
    ] = None,
    new_tokens: Annotated[
        str | None,
        typer.Option(
            help=(
                'Words to be single tokens, as in "<|user|>,<|bot|>": their rows train too, also'
                " where known."
            )
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help=(
                "A file with a Jinja chat template, used in place of the model's own and saved with"
                " the adapter; none joins prompt and completion as they stand (a file of that name"
                " is ./none)."
            )
        ),
    ] = None,
    init_adapter: Annotated[
        Path | None, typer.Option(help="Start from this saved adapter instead of a fresh one.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initialization, data order and dropout.")
    ] = None,
    preview: Annotated[
        bool,
        typer.Option(
            help="Show the first rows as the model will see them, with the loss mask, and stop."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(help="Go on from the last checkpoint of a run that was stopped or killed."),
    ] = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Train one adapter on your data and write it in PEFT's format.

    The defaults are the practical recipe: a base packed into 4 bits (QLoRA), LoRA of rank 16 on all
    linear layers of the blocks, alpha 2r, dropout 0.05, LoRA+ learning rates 2e-4 and 3e-3, cosine
    with 3% warm-up, AdamW, loss on completions only.
    """
    words = None if new_tokens is None else [word.strip() for word in new_tokens.split(",")]
    recipe = load_recipe(
        config,
        sets or (),
        method=method,
        base=base,
        objective=objective,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        new_tokens=words,
        chat_template=chat_template,
    )
    from dataclasses import asdict

    from lorafold.data.rows import read_rows
    from lorafold.training.request import Request, show
    from lorafold.training.run import train

    console = messages()
    request = Request(
        model,
        out,
        recipe,
        read_rows(data),
        data,
        None if eval_data is None else read_rows(eval_data),
        init_adapter,
        device,
        revision,
        trust_remote_code,
        resume,
        overwrite,
    )
    if preview:
        return show(request, console)
    result = train(request, console)
    text = (
        f"adapter: {result.adapter} ({result.trainable_parameters:,} parameters, {result.steps}"
        f" steps, loss {result.train_loss:.4f}"
    )
    held_out = "" if result.eval_loss is None else f", held out {result.eval_loss:.4f}"
    emit(json, asdict(result), f"{text}{held_out}, {result.tokens_per_second:,.0f} tokens/s)")
