"""`lf.compare`: every method on one's own model and data, measured in one table."""

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
    rewards: opt.Judges = (),
    columns: opt.Columns = None,
    methods: Annotated[Sequence[str], opt.Option(metavar="NAME,NAME")] = (),
    vary: Annotated[
        Mapping[str, Sequence[Any]] | None, opt.Option(kind=list[str], metavar="FIELD=VALUE,VALUE")
    ] = None,
    seeds: Annotated[int, opt.Option(min=1)] = 1,
    recipe: Annotated[
        "Recipe | None", opt.RecipeOptions(without=("method", "seed"), defaults=opt.of_quickstart)
    ] = None,
    html: str | Path | None = None,
    console: opt.Progress = None,
    **opening: Unpack[opt.Computing],
) -> "Comparison":
    """Train every method on the same data with the same budget, and measure what the choice between
    them depends on.

    The table has the figures that decide: the held-out loss, how far it is from that of the base
    (which is the first line), forgetting on text outside the task, peak memory, seconds and trained
    parameters. Only --wide, --json and the page have adapter size, tokens/s, exact match, latency
    attached and merged relative to the base, whether the method can be merged (proved by folding),
    and whether it adds modules. A best method is named only where the rows, in pairs, and at least
    three seeds tell it from all others. Texts with labels need --objective classify. Unless the
    recipe sets a learning rate, each method has its own.

    `vary` tries several values of a setting, as in --vary rank=8,32, and of several settings every
    combination. One half of the held-out rows chooses the best setting, and the other half gives
    its loss.

    Policies (--objective grpo, with `rewards`) draw as many completions each, and are compared by
    the reward of held-out prompts.

    In Python too rewards are names and no functions, since each method is measured in a process of
    its own, and figures are kept under the digest of a reward's file.

    Args:
        methods: The methods, as in lora,dora. Default: all that can learn the objective.
        vary: A field of the recipe and the values to try, as in rank=8,32 or
            options.init=kaiming,gaussian; values are YAML, as in
            targets=all-linear,[q_proj,v_proj]. In Python a mapping such as {"rank": [8, 16],
            "options.init": ["kaiming", "gaussian"]}.
        seeds: Seeds of each line; a verdict needs 3.
        recipe: The recipe of all runs; without a learning rate each method has its own.
        html: Also write the table with plots as one HTML file.

    Raises LorafoldError, before anything is trained, for an unknown method, for one that can't
    learn the objective, for recipe options and varied settings that none of the methods has, for
    fields that change what is measured, and for rewards that are missing or that the objective does
    not take.

    Examples:
        lorafold compare --out compared
        lorafold compare --out two --methods lora,dora --data demo/train.jsonl
        lorafold compare --out rates --methods lora --vary lr=1e-4,4e-4 --seeds 3
    """
    from functools import partial

    from lorafold.api.arguments import as_page, as_path, as_recipe, or_quiet, with_rewards
    from lorafold.api.task_rows import train_and_test
    from lorafold.comparing import run
    from lorafold.comparing.measure import ComparisonTask, variants
    from lorafold.comparing.paired_tests import alike, with_validation
    from lorafold.comparing.report import Comparison, page
    from lorafold.comparing.run import known_methods, methods_for, unfit
    from lorafold.files.atomic import check_folder, write_text
    from lorafold.files.claims import check_token
    from lorafold.quickstart.story import RECIPE
    from lorafold.recipe.fitting import fitting, settled_length, spec_of, without
    from lorafold.recipe.recipe import Recipe
    from lorafold.resolve import Base
    from lorafold.rewards.judging import check_judges

    place = as_page(html)
    check_folder(as_path(out))
    check_token(as_path(out))
    console = or_quiet(console)
    recipe = as_recipe(recipe, Recipe() if data else RECIPE, trains=True)
    recipe, functions = with_rewards(recipe, rewards)
    if functions:
        raise LorafoldError(
            f"rewards: found {functions[0]!r:.80}, expected names such as rewards.py:score: each"
            " method is measured in a process of its own, and figures are kept under the digest of"
            " a reward's file"
        )
    rows, held_out, source = train_and_test(data, eval_data, recipe, columns, console, True)
    recipe = recipe.model_copy(update={"eval_fraction": 0.0})  # the runs hold out no more
    base = Base(model, **opening)
    names = known_methods(methods) or methods_for(recipe.objective)
    left_out: dict[str, str] = {}
    if not methods:
        left_out = {name: why for name in names if (why := unfit(recipe, name))}
        names = [name for name in names if name not in left_out]
    asked = variants(recipe, names, vary or {})
    fitted = [fitting(one.of(recipe), one.method) for one in asked]
    before = max(spec_of(one).positions for one in fitted)
    recipe = settled_length(recipe, base, before, console)
    task = ComparisonTask(base, rows, held_out, source, recipe)
    _ = task.identity  # what is wrong with rewards is told first
    check_judges(recipe.objective_options.get("rewards", ()))
    for name, why in left_out.items():
        console.print(f"{name} left out: it {why}", highlight=False, soft_wrap=True)
    for name in names:
        if notice := without(recipe.model_copy(update={"method": name})):
            console.print(notice, highlight=False)
        varied = {setting for one in asked if one.method == name for setting in one.settings}
        if same := [setting for setting in vary or {} if setting not in varied]:
            console.print(f"{', '.join(same)} not varied: {name} has no such choice", markup=False)

    def tell(one: "Measurement", done: int, total: int) -> None:
        console.print(f"{done}/{total} {one}", highlight=False, markup=False)

    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    rows_found = run.compare(task, asked, range(seeds), as_path(out), tell, say)
    for same in alike(rows_found):
        say(f"the same loss on every row: {', '.join(same)}; what they differ in did nothing")
    found = Comparison(tuple(with_validation(rows_found)), str(model), source)
    write_text(as_path(out) / "table.md", str(found))
    if place is not None:
        page(found.rows, f"Methods on {found.model}, {found.source}", place)
    return found
