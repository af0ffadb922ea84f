"""`lf.compose`: one adapter from several, and the interference between their tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Paths, Tasks, as_path, as_paths, as_recipe, as_rows, or_quiet
from lorafold.api.opened import opened
from lorafold.composing import run
from lorafold.composing.job import Request
from lorafold.composing.run import Composition
from lorafold.composing.updates import names
from lorafold.composing.ways import RECIPE
from lorafold.data.sources import Row
from lorafold.methods.parts.mixture import Gating
from lorafold.opening import base_for
from lorafold.peft.saved import open_all
from lorafold.recipe.fitting import settled_length
from lorafold.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console


def compose(
    adapters: Paths,
    out: str | Path,
    *,
    model: str | Path | None = None,
    how: str | Sequence[str] = "linear",
    weights: Sequence[float] = (),
    rank: int | None = None,
    density: float | None = None,
    gates: Gating = "global",
    data: Tasks = (),
    examples: Tasks = (),
    recipe: Recipe | None = None,
    evaluations: int = 40,
    completions: bool = True,
    seed: int = 0,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Composition:
    """Make one adapter from several, in one way or in each of several ways, and write it to `out`.

    Args:
        adapters: Saved adapters of one base whose updates are additive (LoRA, VeRA, LoHa ...).
        out: The directory of the new adapter; with several ways, that of each is `out/<way>`.
        model: The base of the adapters; None takes the one that they say they were trained on.
        how: linear, task-arithmetic, svd, ties, dare, dare-ties, magnitude, lorahub or mixture.
        weights: One for each adapter, in their order; empty for the way's defaults.
        rank: Cut every site to this rank; None is the way's default.
        density: The share of entries that ties, dare and magnitude keep; None is the way's default.
        gates: What a mixture's gates depend on: global, layer or token.
        data: Rows of tasks on which adapters and compositions are measured.
        examples: Rows that lorahub and mixture learn from; empty for half of each task's.
        recipe: The recipe by which a mixture's gates are trained.
        evaluations: How many choices of weights lorahub may measure.
        completions: Also measure exact match, which generates completions.
        seed: All random numbers follow from it.
        storage: How the base stores its weights where it is loaded.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        overwrite: Replace `out` if it exists.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError, with nothing written, for everything that is wrong with the arguments, an
    adapter or rows.
    """
    saved, console = open_all(as_paths(adapters)), or_quiet(console)
    base = base_for(
        model,
        saved,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    before = sum(one.spec.positions for one in saved)
    recipe = settled_length(as_recipe(recipe, RECIPE), base, before, console)
    request = Request(
        base,
        saved,
        (how,) if isinstance(how, str) else tuple(how),
        as_path(out),
        weights=tuple(weights),
        rank=rank,
        density=density,
        seed=seed,
        tasks=by_name(data, console),
        examples=by_name(examples, console),
        recipe=recipe,
        gates=gates,
        evaluations=evaluations,
        completions=completions,
        overwrite=overwrite,
    )
    return run.compose(request, partial(opened, base, saved, console=console), console)


def by_name(tasks: Tasks, console: Console) -> dict[str, Sequence[Row]]:
    """Rows by the name of their task; that of a file is the last part of its path. The console is
    told which keys of the rows are ignored.
    """
    if not isinstance(tasks, Mapping):
        sources = [str(source) for source in tasks]
        tasks = dict(zip(names(sources), sources, strict=True))
    return {name: as_rows(rows, None, console) for name, rows in tasks.items()}
