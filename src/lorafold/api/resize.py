"""`lf.resize` and `lf.extract`: the best LoRA of a rank for an adapter, and for the difference of
two models.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.api.arguments import Columns, Data, Paths, as_path, as_paths, as_rows
from lorafold.api.opened import length_for, opened
from lorafold.inspecting import resize as best
from lorafold.inspecting.paths import losses_of
from lorafold.opening import Base, base_for
from lorafold.peft.saved import Saved, open_all

if TYPE_CHECKING:
    from rich.console import Console

    from lorafold.inspecting.resize import Resized


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    over: Paths = (),
    rank: int | None = None,
    energy: float | None = None,
    data: Data | None = None,
    columns: Columns | None = None,
    max_length: int | None = None,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Resized:
    """Write the best LoRA for a saved adapter of any method that changes matrices: of one rank, or
    at each site of the smallest rank that keeps a share of the energy.

    Args:
        out: The directory to write.
        model: Its base, as `lf.load_model` takes it; None takes the one that it says it was trained
            on. Only `data` makes it load all weights.
        over: The adapters that it was trained over, lowest first; the result lies over the same.
        rank: The rank of every site; smaller where an update has a smaller one.
        energy: Instead of a rank, a share above 0 and at most 1.
        data: Rows to measure the loss on before and after, in nats a token.
        columns: The keys of the rows under other names, as in {"prompt": "question"}.
        max_length: Longer rows are cut to this many tokens; None takes 1,024, or as many as the
            model has positions.
        storage: How the base stores its weights where the loss is measured.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept an adapter whose fingerprint names another base.
        overwrite: Replace `out` if it exists.
        console: A rich console for notices; None is quiet.

    Raises LorafoldError unless exactly one of rank and energy is given, for bad rows, and for an
    adapter that has no form in weight space, changes biases with its weights or can't be read.
    """
    best.check_request(rank, energy)  # before any rows are read
    rows = None if data is None else as_rows(data, columns, console)
    stack = open_all([*as_paths(over), as_path(adapter, "adapter")])
    base = base_for(
        model,
        stack,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    length = 0 if rows is None else length_for(base, max_length, stack, console)
    result = best.resize(base, stack, out, rank=rank, energy=energy, overwrite=overwrite)
    if rows is None:
        return result
    # their base, and what they lie over, were checked when they were read
    base, both = replace(base, allow_other_base=True), (*stack, Saved.open(out))
    loaded, tokenizer = opened(base, both, console=console)
    return replace(result, losses=losses_of(loaded, tokenizer, rows, length, len(stack) - 1))


def extract(
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int,
    model: str | Path = "smollm2",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Resized:
    """Write the best LoRA for the difference of a fine-tuned model and its base, in the linear
    layers of the blocks. One tensor at a time is in memory.

    Args:
        tuned: The fine-tuned model, as `lf.load_model` takes it.
        out: The directory to write.
        rank: The rank of every site.
        model: The model before fine-tuning.
        revision: The branch, tag or commit of a hub model before fine-tuning.
        trust_remote_code: Run Python code that comes with the models.
        overwrite: Replace `out` if it exists.

    Raises LorafoldError where the models have different modules, or equal weights in those layers.
    """
    before = Base(model, revision=revision, trust_remote_code=trust_remote_code)
    after = Base(tuned, trust_remote_code=trust_remote_code)
    return best.extract(before, after, out, rank=rank, overwrite=overwrite)
