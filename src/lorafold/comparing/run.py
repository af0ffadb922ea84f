"""The table: every method and seed measured one after the other, each row kept as soon as it is
done.

An interrupted comparison goes on where it was: rows lie in `<out>/rows/`, named after method, seed
and a digest of all that bears on them, and what is found there is not measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from lorafold.comparing.measure import Row, Task, measure
from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_json
from lorafold.files.record import read_object
from lorafold.methods import METHODS, known_options, make_spec
from lorafold.training.request import digest


def known_methods(names: Sequence[str]) -> Sequence[str]:
    """The names. LorafoldError where one is no method's."""
    if unknown := [name for name in names if name not in METHODS]:
        raise LorafoldError(f"unknown method {', '.join(unknown)}; there are: {', '.join(METHODS)}")
    return names


def methods_for(objective: str) -> list[str]:
    """The methods that are there to learn this objective, by name, in the order of the table."""
    specs = {name: make_spec(name) for name in METHODS}
    return [n for n, spec in specs.items() if objective in spec.objectives and not spec.diagnostic]


def compare(
    task: Task,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    tell: Callable[[Row, int, int], None],
) -> list[Row]:
    """All rows, in order; `tell` hears of each with how many are done of how many.

    LorafoldError, at once, for an unknown method, an option that no method has, and new tokens: the
    base does not know them.
    """
    if task.recipe.new_tokens:
        raise LorafoldError(
            "recipe: new_tokens: methods are compared with the base, on words that it knows; train"
            " them one by one"
        )
    known_methods(methods)
    if strange := [
        option
        for option in task.recipe.options
        if not any(option in known_options(m, task.recipe.options.get("over")) for m in methods)
    ]:
        raise LorafoldError(
            f"recipe: options {', '.join(strange)}: none of {', '.join(methods)} has such an option"
        )
    plan = [(method, seed) for method in methods for seed in seeds]
    (out / "rows").mkdir(parents=True, exist_ok=True)
    rows = []
    for method, seed in plan:
        file = out / "rows" / f"{method}-{seed}-{key(task, method)}.json"
        row = read(file) or in_own_process(task, method, seed)
        write_json(file, asdict(row))
        rows.append(row)
        tell(row, len(rows), len(plan))
    write_json(out / "rows.json", {"rows": [asdict(row) for row in rows]})
    return rows


def in_own_process(task: Task, method: str, seed: int) -> Row:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, task, method, seed).result()


def key(task: Task, method: str) -> str:
    """What bears on a row, in twelve letters: the task, the method's own defaults and the version
    of the code.
    """
    recipe = task.recipe.model_dump(mode="json", exclude={"method", "seed"})
    spec = make_spec(method)
    own = [repr(spec), spec.lr, spec.lr_b, version("lorafold")]
    text = json.dumps(
        [task.model, digest(task.rows), digest(task.held_out), recipe, own], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(file: Path) -> Row | None:
    if not file.is_file():
        return None
    stored = read_object(file)
    interval = stored["exact_match_interval"]
    return Row(
        **{f.name: stored[f.name] for f in fields(Row)}
        | {"exact_match_interval": interval and tuple(interval)}
    )
