"""`lf.compare`: train several methods on the same data and compare them in a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from lorafold.api import options as opt
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    from lorafold.comparing.measure import Measurement
    from lorafold.comparing.report import Comparison
    from lorafold.recipe.recipe import Recipe


@opt.verb
def compare(
    out: opt.StudyOut,
    *,
    model: opt.OnlyModel = "smollm2",
    data: opt.StudyRows = None,
    eval_data: opt.HeldOut = None,
    rewards: opt.Rewards = (),
    methods: Annotated[Sequence[str], opt.Option(metavar="NAME,NAME")] = (),
    vary: Annotated[
        Mapping[str, Sequence[Any]] | None, opt.Option(kind=list[str], metavar="FIELD=VALUE,VALUE")
    ] = None,
    seeds: opt.Count = 1,
    recipe: Annotated[
        "Recipe | None",
        opt.RecipeOptions(without=("method", "seed"), default=opt.QUICKSTART),
    ] = None,
    html: str | Path | None = None,
    console: opt.Progress = None,
    **base_options: Unpack[opt.StudyOptions],
) -> "Comparison":
    """Train every method on the same data with the same budget, and compare the results.

    The table shows the held-out loss and its difference from the base model's (the first line),
    exact match, forgetting on unrelated text, peak memory, time and trainable parameters. --wide,
    --json and the page add adapter size, tokens/s, latency (attached and merged, relative to the
    base model), whether the method can be merged, and whether it adds modules. A best method is
    named only if paired tests over the rows and at least three seeds separate it from all others.
    Each method uses its own default learning rate, unless the recipe sets one. For labelled texts,
    use --objective classify.

    `vary` sweeps a grid of settings, for example --vary rank=8,32. With 20 or more held-out rows,
    one half of them selects the best setting, and the other half measures its loss.

    Policies (--objective grpo, with `rewards`) sample the same number of completions each, and are
    compared by their reward on held-out prompts.

    Args:
        rewards: As for `lf.train`, but only names and no functions, because each method runs in its
            own process and results are cached under the digest of the reward's file.
        methods: The methods, for example lora,dora. Default: all that support the
            objective, except fastfood.
        vary: A recipe field and the values to try, for example rank=8,32 or
            options.init=kaiming,gaussian. Values are YAML, so targets=all-linear,[q_proj,v_proj]
            works too. In Python, a mapping such as {"rank": [8, 16]}.
        seeds: The number of seeds for each line of the table. A best method is named from 3 on.
        recipe: The recipe of all runs.
        html: Also write the table and plots to one HTML file.

    Raises LorafoldError, before anything is trained, for example for a method that is unknown or
    does not support the objective, for recipe options that no method has, and for missing rewards.

    Examples:
        lorafold compare --out compared
        lorafold compare --out two --methods lora,dora --data demo/train.jsonl
        lorafold compare --out rates --methods lora --vary lr=1e-4,4e-4 --seeds 3
    """
    from functools import partial

    from lorafold.api import arguments as args
    from lorafold.comparing import run
    from lorafold.comparing.measure import ComparisonTask, variants
    from lorafold.comparing.paired_tests import indistinct_methods, with_validation
    from lorafold.comparing.report import Comparison, page
    from lorafold.files.atomic import write_text
    from lorafold.files.terminal import print_lines
    from lorafold.quickstart.run import RECIPE
    from lorafold.recipe.recipe import Recipe
    from lorafold.recipe.resolve_settings import ignored_note, resolve_length, spec_of, with_method
    from lorafold.resolve import Base
    from lorafold.rewards.reward import check_starts

    html_path, study = args.as_html_path(html), args.as_study_path(out)
    console = args.console_or_quiet(console)
    recipe = args.as_recipe(recipe, Recipe() if data else RECIPE, trains=True)
    recipe, functions, _ = args.with_rewards(recipe, rewards)
    if functions:
        raise LorafoldError(
            f"rewards: found {functions[0]!r:.80}, expected names such as rewards.py:score, because"
            " each method runs in its own process and results are cached under the digest of the"
            " reward's file"
        )
    reading = args.as_reading(base_options)
    opening: opt.DeviceOptions = base_options
    rows, held_out, source = args.train_and_test(data, eval_data, recipe, reading, console, True)
    recipe = recipe.model_copy(update={"eval_fraction": 0.0})  # held-out rows are already split off
    base = Base(model, **opening)
    names = run.known_methods(methods) or run.methods_for(recipe.objective)
    skipped = {n: why for n in names if not methods and (why := run.unsupported_reason(recipe, n))}
    names = [name for name in names if name not in skipped]
    settings = variants(recipe, names, vary or {})
    specs = (spec_of(with_method(one.of(recipe), one.method)) for one in settings)
    recipe = resolve_length(recipe, base, max(spec.positions for spec in specs), console)
    task = ComparisonTask(base, rows, held_out, source, recipe)
    _ = task.identity  # reports errors in rewards first
    check_starts(recipe.objective_options.get("rewards", ()))
    for name, reason in skipped.items():
        print_lines(console, f"{name} is left out because it {reason}")
    for name in names:
        if notice := ignored_note(recipe.model_copy(update={"method": name})):
            print_lines(console, notice)
        varied = {field for one in settings if one.method == name for field in one.settings}
        if unchanged := [field for field in vary or {} if field not in varied]:
            print_lines(console, f"{', '.join(unchanged)} not varied: {name} has no such setting")

    def print_measurement(one: "Measurement", done: int, total: int) -> None:
        print_lines(console, f"{done}/{total} {one}")

    say = partial(print_lines, console)
    measured = run.compare(task, settings, range(seeds), study, print_measurement, say)
    for names in indistinct_methods(measured):
        say(f"{', '.join(names)}: the same loss on every row; their settings make no difference")
    comparison = Comparison(tuple(with_validation(measured)), str(model), source)
    write_text(study / "table.md", str(comparison))
    if html_path is not None:
        page(comparison.rows, f"Methods on {comparison.model}, {comparison.source}", html_path)
    return comparison
