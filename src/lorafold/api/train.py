"""`lf.train`: train an adapter; `lf.preview`: the rows of such a run."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from lorafold.api import options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.data.row_checks import Findings
    from lorafold.recipe.recipe import Recipe
    from lorafold.training.finish import Trained
    from lorafold.training.inputs import RunRequest

RunRecipe = Annotated["Recipe | None", opt.RecipeOptions()]
DefaultProgress = Annotated[
    "Console | Literal[False] | None",
    opt.Option(
        "A rich console for progress and messages. None prints them if stderr is a terminal, and in"
        " a notebook; False prints nothing.",
        python_only=True,
    ),
]


class RunInputs(opt.DataOptions, opt.StackOptions, total=False):
    """The inputs of a run besides its recipe, base model and training rows."""

    eval_data: Annotated[
        opt.Data | None,
        opt.Option("Held-out rows. Default: hold out `eval_fraction` of the rows.", kind=str),
    ]
    rewards: opt.Rewards
    environment: opt.Environment
    init_adapter: Annotated[
        str | Path | None,
        opt.Option("Initialize from this saved adapter, with its method and targets.", rare=True),
    ]
    over: Annotated[
        opt.Paths,
        opt.Option(
            "Train on top of this saved adapter, which stays frozen. For an adapter stack, repeat"
            " the option, with the bottom adapter first.",
            rare=True,
            default=(),
        ),
    ]


@opt.verb
def train(
    recipe: RunRecipe = None,
    *,
    data: opt.TrainingRows,
    out: opt.Out,
    model: opt.ModelOrLoaded = None,
    tokenizer: opt.Tokenizer = None,
    plot: Annotated[str | Path | None, opt.Option(rare=True)] = None,
    resume: bool = False,
    overwrite: opt.Overwrite = False,
    verbose: bool = False,
    console: DefaultProgress = None,
    **inputs: Unpack[RunInputs],
) -> "Trained":
    """Train one adapter on your data and write it in PEFT format.

    The default recipe works for most tasks: a 4-bit base model (QLoRA), LoRA of rank 16 on all
    linear layers of the blocks, alpha 2r, dropout 0.05, learning rates 2e-4 for A and 3e-3 for B
    (LoRA+), a cosine schedule with 3% warm-up, AdamW, and the loss on completions only.

    In Python, `model` can be a loaded model without adapters. Its weights, as they are, are the
    base, and it is unchanged afterwards. Its tokenizer is found by its name unless you pass one.

    Args:
        recipe: The training settings: method, targets, quantization, objective, optimizer, steps.
            None uses the defaults (`lf.Recipe()`).
        plot: Also plot the run's curves to one HTML file. You can do that later with `lorafold
            history`.
        resume: Continue a stopped or killed run from its last checkpoint, in OUT.run.
        verbose: Print the details of the setup too: chat template, adapter, kernels, optimizer,
            learning rates. The adapter's record (lorafold.json) always contains them.

    Raises LorafoldError for anything wrong with the arguments, before weights are loaded if
    possible, and Interrupted after SIGINT or SIGTERM, once a checkpoint is written.

    Examples:
        lorafold train --data demo/train.jsonl --preview
        lorafold train --data demo/train.jsonl --out adapter
        lorafold train --data demo/train.jsonl --out small --rank 8 --plot small.html
    """
    from rich.console import Console

    from lorafold.api.arguments import as_html_path, console_or_default
    from lorafold.files.terminal import keeping_details, print_lines
    from lorafold.runtime.devices import device_of_rank
    from lorafold.runtime.processes import detect_launch, process_group

    html_path = None if plot is None else as_html_path(plot, "plot")
    console, launch = console_or_default(console), detect_launch()
    if launch.world > 1:
        inputs["device"] = device_of_rank(inputs.get("device"), launch)
    device = inputs.get("device")
    with keeping_details(verbose), process_group(launch, device) as processes:
        if not processes.first:  # only rank 0 prints
            console = Console(quiet=True)
        request = build_request(
            recipe, data, out, model, inputs, console, tokenizer, resume=resume, overwrite=overwrite
        )
        from lorafold.training import run

        result = run.train(request, console, processes)
    if html_path is not None and launch.is_main:
        from lorafold.inspecting.history import read_history
        from lorafold.inspecting.history_page import page

        page(read_history(request.out), html_path)
        print_lines(console, f"page: {html_path}")
    return result


@opt.verb
def preview(
    recipe: RunRecipe = None,
    *,
    data: opt.TrainingRows,
    model: opt.ModelOrLoaded = None,
    tokenizer: opt.Tokenizer = None,
    html: str | Path | None = None,
    console: opt.Progress = None,
    **inputs: Unpack[RunInputs],
) -> "Findings":
    """Print the first rows as the model will see them, including tools and turns, highlight the
    tokens that count in the loss, and return a check of all rows. Nothing is trained.

    Args:
        recipe: The recipe of the run. None uses the defaults (`lf.Recipe()`).
        html: Also write the preview and the results of the check to one HTML file.

    Raises LorafoldError as `lf.train` does before it loads weights.
    """
    from lorafold.api.arguments import as_html_path, console_or_quiet

    html_path, console = as_html_path(html), console_or_quiet(console)
    request = build_request(recipe, data, "", model, inputs, console, tokenizer)
    from lorafold.training.preview import show

    return show(request, console, html=html_path)


def build_request(
    recipe: "Recipe | None",
    data: opt.Data,
    out: str | Path,
    model: opt.ModelOrLoaded,
    inputs: RunInputs,
    console: "Console",
    tokenizer: opt.Tokenizer = None,
    **fields: Any,
) -> "RunRequest":
    """Builds the request of a run; `fields` are further fields of `RunRequest`."""
    from lorafold.api.arguments import (
        as_path,
        as_paths,
        as_reading,
        as_recipe,
        as_rows,
        as_stream,
        source_label,
        with_rewards,
    )
    from lorafold.models.tokenizer import BUILT_IN, read_template
    from lorafold.recipe.recipe import Recipe

    run_recipe, functions = as_recipe(recipe, Recipe(), trains=True), tuple[Any, ...]()
    if (template := run_recipe.chat_template) and template not in BUILT_IN:
        read_template(template)  # before anything that takes long
    environment = inputs.pop("environment", None) or ""
    if (rewards := inputs.pop("rewards", ())) or environment:
        run_recipe, functions, environment = with_rewards(run_recipe, rewards, environment)
    reading, held_out = as_reading(inputs), inputs.pop("eval_data", None)
    rows = (
        as_stream(data, reading, console, run_recipe.objective)
        if run_recipe.streaming
        else as_rows(data, reading, console, recipe=run_recipe)
    )
    if held_out is not None:
        held_out = as_rows(held_out, reading, console, objective=run_recipe.objective)
    from lorafold.peft.provenance import RecordedBase
    from lorafold.resolve import base_for
    from lorafold.training.inputs import RunRequest

    over_paths, init_path = inputs.pop("over", ()), inputs.pop("init_adapter", None)
    over = () if over_paths == () else tuple(as_paths(over_paths))
    init_adapter = None if init_path is None else as_path(init_path, "init_adapter")
    below = (*over, *([init_adapter] if init_adapter else []))
    if model is None or isinstance(model, str | Path):
        records = [] if model else [*map(RecordedBase.read, below)]
        base = base_for(model, records, console, **inputs)
    else:
        from lorafold.api.model_arguments import loaded_base

        base = loaded_base(model, run_recipe, console, **inputs)
    return RunRequest(
        replace(base, words=tokenizer),
        as_path(out),
        run_recipe,
        rows,
        source_label(data),
        held_out,
        init_adapter,
        over=over,
        rewards=functions,
        environment=environment,
        **fields,
    )
