"""`lf.compare`: every method on one's own model and data, measured in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.api.arguments import (
    Columns,
    Data,
    Rewarding,
    as_path,
    or_quiet,
    recipe_to_train,
    with_rewards,
)
from lorafold.api.task import train_and_test
from lorafold.comparing import run
from lorafold.comparing.measure import Measurement, Task, Vary, variants
from lorafold.comparing.paired import Difference, alike, chosen_apart, over_base, verdict
from lorafold.comparing.report import markdown
from lorafold.comparing.run import known_methods, methods_for, unfit
from lorafold.errors import LorafoldError
from lorafold.files.atomic import check_folder, write_text
from lorafold.files.claims import check_token
from lorafold.files.page import Shown
from lorafold.opening import Base
from lorafold.quickstart.story import RECIPE
from lorafold.recipe.fitting import fitting, settled_length, spec_of, without
from lorafold.recipe.recipe import Recipe
from lorafold.rewards.judging import check_judges

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Comparison(Shown):
    """The figures of every method, setting and seed, in the order asked for, and what they were
    measured on. Those of the base come first.
    """

    rows: tuple[Measurement, ...]
    model: str
    source: str

    @property
    def over_base(self) -> dict[str, Difference]:
        """By how much each line's reward is above the base's, paired by prompts; or its loss,
        paired by rows, where below 0 is better. A line is named as in "lora" or "lora rank=8".
        """
        return over_base(self.rows)

    @property
    def verdict(self) -> str:
        """The method of the lowest loss or the highest reward, where the held-out rows and at least
        three seeds tell it from all others; else those among which they can't tell.
        """
        return verdict(self.rows)

    def as_json(self) -> dict[str, Any]:
        """The figures under the keys of `lorafold compare --json`."""
        gains = {method: asdict(one) for method, one in self.over_base.items()}
        rows = [asdict(one) for one in self.rows]
        for row in rows:
            del row["row_losses"]  # one for each held-out row; OUT/rows.json has them
        return {"rows": rows, "over_base": gains, "verdict": self.verdict}

    def __str__(self) -> str:
        return markdown(self.rows)


def compare(
    out: str | Path,
    *,
    model: str | Path = "smollm2",
    data: Data | None = None,
    eval_data: Data | None = None,
    rewards: Rewarding = (),
    columns: Columns | None = None,
    methods: Sequence[str] = (),
    vary: Vary | None = None,
    seeds: int = 1,
    recipe: Recipe | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Train every method on the same rows with the same budget, or with several values of settings,
    and measure quality, forgetting, size, speed and latency, each in a process of its own. The base
    is measured too. Policies are compared by the reward of held-out prompts.

    Args:
        out: The directory of the figures, and of the table as `table.md`. Figures are written as
            they are measured, and a second call continues after them.
        model: A name or path as `lf.load_model` takes it.
        data: Training rows; None takes the quickstart's task.
        eval_data: Held-out rows; None holds out the recipe's `eval_fraction`, or a tenth.
        rewards: What judges completions that the model draws: one or several names such as
            "rewards.py:score", beside the recipe's; no functions, as these can't be kept figures
            of.
        columns: The keys of the rows under other names, as in {"prompt": "question"}.
        methods: Names of methods; empty for all that can learn the recipe's objective.
        vary: The values of fields of the recipe, as in {"rank": [8, 16], "lr": [1e-4, 2e-4]}, or
            of entries of a field, as in {"options.init": ["kaiming", "gaussian"]}. Each method is
            trained with every combination of those that it has. One half of the held-out rows
            chooses the best, and the other half gives the losses or rewards.
        seeds: How many seeds of each method and setting; fewer than 3 give no verdict.
        recipe: The recipe of all runs; without a learning rate each method has its own.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        console: A rich console for one line a measurement; None is quiet.

    Raises LorafoldError, before anything is trained, for an unknown method, for one that can't
    learn the objective, for recipe options and varied settings that none of the methods has, for
    fields that change what is measured, and for rewards that are missing or that the objective does
    not take.
    """
    check_folder(as_path(out))
    check_token(as_path(out))
    console, recipe = or_quiet(console), recipe_to_train(recipe, Recipe() if data else RECIPE)
    recipe, functions = with_rewards(recipe, rewards)
    if functions:
        raise LorafoldError(
            f"rewards: found {functions[0]!r:.80}, expected names such as rewards.py:score: each"
            " method is measured in a process of its own, and figures are kept under the digest of"
            " a reward's file"
        )
    rows, held_out, source = train_and_test(data, eval_data, recipe, columns, console, True)
    recipe = recipe.model_copy(update={"eval_fraction": 0.0})  # the runs hold out no more
    base = Base(model, device=device, revision=revision, trust_remote_code=trust_remote_code)
    names = known_methods(methods) or methods_for(recipe.objective)
    left_out: dict[str, str] = {}
    if not methods:
        left_out = {name: why for name in names if (why := unfit(recipe, name))}
        names = [name for name in names if name not in left_out]
    asked = variants(recipe, names, vary or {})
    fitted = [fitting(one.of(recipe), one.method) for one in asked]
    before = max(spec_of(one).positions for one in fitted)
    recipe = settled_length(recipe, base, before, console)
    task = Task(base, rows, held_out, source, recipe)
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

    def tell(one: Measurement, done: int, total: int) -> None:
        console.print(f"{done}/{total} {one}", highlight=False, markup=False)

    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    rows_found = run.compare(task, asked, range(seeds), as_path(out), tell, say)
    for same in alike(rows_found):
        say(f"the same loss on every row: {', '.join(same)}; what they differ in did nothing")
    found = Comparison(tuple(chosen_apart(rows_found)), str(model), source)
    write_text(as_path(out) / "table.md", str(found))
    return found
