"""`lf.compose`: one adapter from many, and what they do to each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.opened import Paths, as_paths, opened, or_quiet
from lorafold.api.rows import Tasks, by_name
from lorafold.composing import run
from lorafold.composing.job import Request
from lorafold.composing.mixture import RECIPE
from lorafold.composing.run import Composition
from lorafold.methods.parts.mixture import Gating
from lorafold.step.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console


def compose(
    adapters: Paths,
    out: str | Path,
    *,
    model: str | Path = "smollm2",
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
        adapters: Saved adapters of additive updates (LoRA, VeRA, LoHa ...) of one base.
        out: The directory of the new adapter; with several ways, each lies in `out/<way>`.
        model: The base of the adapters.
        how: linear, task-arithmetic, svd, ties, dare, dare-ties, magnitude, lorahub or mixture.
        weights: One for each adapter, in their order; without them the way's own.
        rank: Cut every site to this rank; None keeps what the way gives.
        density: The share of entries that ties, dare and magnitude keep; None is the way's own.
        gates: What a mixture's gates depend on: global, layer or token.
        data: Rows of tasks on which adapters and compositions are measured.
        examples: Rows that lorahub and mixture learn from; without them half of each task's.
        recipe: How a mixture's gates are trained.
        evaluations: How often lorahub may measure weights.
        completions: Measure the exact match too, which takes generation.
        seed: Everything drawn at random follows from it.
        storage: How the base stores its weights where it is loaded.
        device: cpu, cuda, cuda:N or mps; None takes the fastest kind that is there.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters whose fingerprint names another base.
        overwrite: Replace what lies in `out` already.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError, with nothing left behind, listing what is wrong with the arguments, an
    adapter or rows.
    """
    paths, console = as_paths(adapters), or_quiet(console)
    request = Request(
        str(model),
        tuple(paths),
        (how,) if isinstance(how, str) else tuple(how),
        Path(out),
        weights=tuple(weights),
        rank=rank,
        density=density,
        seed=seed,
        tasks=by_name(data),
        examples=by_name(examples),
        recipe=recipe or RECIPE,
        gates=gates,
        evaluations=evaluations,
        answers=completions,
        base=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
        overwrite=overwrite,
    )
    return run.compose(
        request,
        lambda: opened(
            model,
            paths,
            storage=storage,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
            console=console,
        ),
        console,
    )

