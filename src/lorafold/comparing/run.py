"""Runs a comparison. Every variant and seed is a cell, stored in `<out>/rows/` under the method,
the seed and a digest of all its inputs, so the same call continues a stopped comparison, and
concurrent calls share the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from lorafold.comparing.measure import (
    BASE,
    ComparisonTask,
    Measurement,
    Variant,
    measure,
    recipe_of,
)
from lorafold.data.row_store import Rows
from lorafold.errors import LorafoldError, listed
from lorafold.files.atomic import write_json
from lorafold.files.claims import digest_of, measure_all, report_other_claims, silent
from lorafold.methods import METHODS, known_options, make_spec
from lorafold.objectives import OBJECTIVES
from lorafold.recipe.recipe import Recipe
from lorafold.recipe.resolve_settings import resolve_storage, spec_of
from lorafold.rewards import RewardName
from lorafold.runtime.forked_workers import end_with_parent


def known_methods(names: Sequence[str]) -> Sequence[str]:
    if unknown := [name for name in names if name not in METHODS]:
        raise LorafoldError(
            f"unknown method {listed(unknown)}; expected one of {', '.join(METHODS)}"
        )
    return names


def methods_for(objective: str) -> list[str]:
    specs = {name: make_spec(name) for name in METHODS}
    head = OBJECTIVES[objective].head
    return [n for n, s in specs.items() if not s.diagnostic and (head or not s.head_alone)]


def unsupported_reason(recipe: Recipe, method: str) -> str | None:
    if not OBJECTIVES[recipe.objective].draws:
        return None
    spec, rewards = make_spec(method), recipe.objective_options.get("rewards", ())
    if spec.asks_losses:
        return "chooses the trained entries by the losses of rows, which a policy does not have"
    if spec.trains_base and any(RewardName.parse(name).is_adapter for name in rewards):
        return "trains the base model's own weights, which the reward adapter uses too"
    return None


def compare(
    task: ComparisonTask,
    variant_list: Sequence[Variant],
    seeds: Sequence[int],
    out: Path,
    on_measurement: Callable[[Measurement, int, int], None],
    say: Callable[[str], object] = silent,
) -> list[Measurement]:
    """Measures every variant, the base first, with several seeds only if its result is random."""
    if task.recipe.new_tokens:
        raise LorafoldError(
            f"recipe: new_tokens: found {', '.join(task.recipe.new_tokens)}, expected none, because"
            " the base model lacks these tokens and can't be compared; use lorafold train for each"
            " method"
        )
    methods = known_methods([*dict.fromkeys(one.method for one in variant_list)])
    for method in methods:
        if reason := unsupported_reason(task.recipe, method):
            raise LorafoldError(f"method: found {method}, which {reason}")
    if unknown_options := [
        option
        for option in task.recipe.options
        if not any(option in known_options(m, task.recipe.options.get("over")) for m in methods)
    ]:
        raise LorafoldError(
            f"recipe: options {listed(unknown_options)}: expected options of the methods"
            f" {', '.join(methods)}"
        )
    declared = OBJECTIVES[task.recipe.objective]
    base_seeds = seeds if declared.draws or declared.head else seeds[:1]
    plan = [(Variant(BASE), seed) for seed in base_seeds]
    plan += [(one, seed) for one in variant_list for seed in seeds]
    (out / "rows").mkdir(parents=True, exist_ok=True)
    cells = {}
    settings = {}
    for variant, seed in plan:
        cell = replace(task, recipe=variant.of(task.recipe))
        file = out / "rows" / f"{variant.method}-{seed}-{cell_digest(cell, variant.method)}.json"
        cells[file] = partial(measure_in_process, cell, variant.method, seed)
        settings[file] = variant.settings
    report_other_claims(cells, say)
    rows = {}

    def record_row(file: Path, row: Measurement) -> None:
        # not in the file, because another call may have them in its recipe
        rows[file] = replace(row, settings=settings[file])
        on_measurement(rows[file], len(rows), len(cells))

    measure_all(Measurement, cells, record_row, say)
    measurements = [rows[file] for file in cells]
    write_json(out / "rows.json", {"rows": [asdict(row) for row in measurements]})
    return measurements


def measure_in_process(task: ComparisonTask, method: str, seed: int) -> Measurement:
    """Calls `measure` in a new process, so that peak memory is measured for one method only."""
    try:
        spawned = get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawned, initializer=end_with_parent) as pool:
            return pool.submit(measure, task, method, seed).result()
    except BrokenProcessPool:
        raise LorafoldError(
            f"{method}: the process of this method ended unexpectedly, perhaps because it ran out"
            " of memory; in a script, call lf.compare under `if __name__ == '__main__':`, because"
            " each process imports the script"
        ) from None


def cell_digest(task: ComparisonTask, method: str) -> str:
    """A digest of all inputs of a measurement but the seed: model, rows, recipe, rewards, code."""
    recipe = recipe_of(task.recipe, method)
    spec = spec_of(recipe)
    base = task.base.stored(resolve_storage(recipe, spec, task.base))
    environment = base.cache_key(recipe.chat_template, "comparing", "merging")
    rows = [Rows.of(task.rows).identity, Rows.of(task.held_out).identity]
    settings = recipe.model_dump(mode="json", exclude={"seed"})
    rest = [repr(spec), spec.lr, spec.lr_b, task.day, task.identity]
    return digest_of([environment, *rows, settings, *rest])
