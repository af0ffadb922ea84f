"""`lf.train`: one adapter, trained on a model and rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorafold.api.arguments import (
    Columns,
    Data,
    Paths,
    Rewarding,
    as_path,
    as_paths,
    as_rows,
    or_shown,
    recipe_to_train,
    rows_to_train,
    source_of,
    with_rewards,
)
from lorafold.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.opening import Base
    from lorafold.training.finish import Trained


def train(
    recipe: Recipe | None = None,
    *,
    data: Data,
    out: str | Path,
    model: str | Path | None = None,
    eval_data: Data | None = None,
    rewards: Rewarding = (),
    columns: Columns | None = None,
    init_adapter: str | Path | None = None,
    over: Paths = (),
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | Literal[False] | None = None,
) -> Trained:
    """Train one adapter and write it to `out` in PEFT's format, whole or not at all.

    Args:
        recipe: Every choice of the run; None takes the defaults (`lf.Recipe()`).
        data: Training rows: a file of JSON lines, JSON, CSV, Parquet or Arrow, a directory or a
            pattern of such files, a hub dataset, a list of these ("more.jsonl:0.3" takes 0.3 of its
            rows an epoch), or a list of rows such as {"prompt": ..., "completion": ...}.
        out: The directory of the adapter. During the run, checkpoints are in `<out>.run`.
        model: smollm2 (embedded), a directory, a .gguf file or a hub id; None takes the base of the
            adapters of `over` and `init_adapter`, and without them smollm2.
        eval_data: Held-out rows, of the same forms as `data`.
        rewards: What judges completions that the model draws: one or several functions, or names
            such as "rewards.py:score", beside the recipe's.
        columns: The keys of the rows under other names, as in {"prompt": "question"}.
        init_adapter: A saved adapter to start from instead of a fresh one.
        over: One saved adapter or several, loaded in this order and frozen below the new one, which
            is then loaded over the same ones only.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept adapters of `init_adapter` and `over` that were trained on another
            base, or over other adapters.
        resume: Continue from the last checkpoint of a run that was stopped or killed.
        overwrite: Replace `out` if it exists.
        console: A rich console for progress and notices; None shows them on a terminal (on stderr)
            and in a notebook, and else nothing, as False does everywhere.

    Raises LorafoldError for anything wrong with the arguments, if possible before weights are
    loaded, and Interrupted after SIGINT or SIGTERM, once a checkpoint is written.
    """
    from lorafold.machine.processes import launched

    console, here = or_shown(console), launched()
    recipe, functions = with_rewards(recipe_to_train(recipe, Recipe()), rewards)
    from lorafold.machine.devices import own_device
    from lorafold.machine.processes import together

    device = own_device(device, here)
    with together(here, device) as processes:
        console = processes.voice(console)
        rows, objective = rows_to_train(data, recipe, columns, console), recipe.objective
        held_out = (
            None
            if eval_data is None
            else as_rows(eval_data, columns, console, objective=objective)
        )
        from lorafold.training import run
        from lorafold.training.request import Request

        request = Request(
            base_to_train(
                model,
                over,
                init_adapter,
                console,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
                allow_other_base=allow_other_base,
            ),
            as_path(out),
            recipe,
            rows,
            source_of(data),
            held_out,
            None if init_adapter is None else as_path(init_adapter, "init_adapter"),
            resume,
            overwrite,
            tuple(as_paths(over)),
            rewards=functions,
        )
        return run.train(request, console, processes)


def base_to_train(
    model: str | Path | None, over: Paths, init_adapter: str | Path | None, console: Console,
    **how: Any,
) -> Base:  # fmt: skip
    """The base that is named, or else that of the adapters that a run loads, or the embedded model.

    Args:
        model: A name or path, or None.
        over: The adapters below.
        init_adapter: The one to start from, or None.
        console: Is told which base is taken, where none was named.
        how: The other fields of `Base`.

    Raises LorafoldError as `base_for`, and for adapters that can't be read.
    """
    from lorafold.opening import base_for
    from lorafold.peft.provenance import OwnBase

    first = [] if init_adapter is None else [as_path(init_adapter, "init_adapter")]
    paths = [*as_paths(over), *first]
    return base_for(model, [] if model else [*map(OwnBase.read, paths)], console, **how)
