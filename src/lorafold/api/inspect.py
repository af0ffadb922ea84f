"""`lf.inspect`: figures of an adapter's update, and advice on its rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.api.arguments import Data, Paths, as_path, as_paths, as_rows, or_quiet
from lorafold.api.opened import length_for, opened
from lorafold.errors import LorafoldError
from lorafold.files.page import Shown
from lorafold.inspecting import run
from lorafold.inspecting.paths import measured_paths
from lorafold.inspecting.run import of_paths
from lorafold.opening import base_for
from lorafold.peft.saved import Saved, open_all

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Inspection(Shown):
    """The figures of one adapter; `lorafold.inspecting` defines each.

    `sites` has the figures of every module path, and of each matrix of experts as
    `...gate_up_proj[3]`; `whole` those of all sites together, `beside` the number of deltas that
    are not measured, `layers` the overlaps of the blocks' top directions, and `advice` the
    conclusions in sentences. `over` is None for an adapter over the bare base, `against` without a
    second adapter, `paths` without data; without experts so are `experts`, the overlaps of their
    top directions, and `experts_left_out`, which of them have tokens. `heads_left_out` says which
    projections of an attention have no heads.
    """

    adapter: str
    model: str
    method: str
    beside: dict[str, int]
    whole: dict[str, Any]
    sites: dict[str, dict[str, Any]]
    layers: dict[str, Any]
    chance_cosine: dict[str, Any]
    tokens_left_out: str | None
    advice: list[str]
    over: list[str] | None = None
    against: dict[str, Any] | None = None
    paths: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None
    experts_left_out: str | None = None
    heads_left_out: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All figures under the keys of `lorafold inspect --json`."""
        optional = (
            "over", "against", "paths", "experts", "experts_left_out", "heads_left_out",
        )  # fmt: skip
        return {k: v for k, v in asdict(self).items() if k not in optional or v is not None}

    def __str__(self) -> str:
        return "\n".join(self.advice)


def inspect(
    adapter: str | Path,
    model: str | Path | None = None,
    *,
    over: Paths = (),
    against: str | Path | None = None,
    directions: str | Path | None = None,
    data: Data | None = None,
    rows: int = 64,
    max_length: int | None = None,
    full: bool = False,
    storage: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    console: Console | None = None,
) -> Inspection:
    """Measure a saved adapter: its effective rank, its relation to the base, the tokens that it
    reads and writes and, with data, the loss along the update.

    Args:
        adapter: A saved adapter of any method that folds.
        model: Its base, as `lf.load_model` takes it; None takes the one that it says it was trained
            on. Only `data` makes it load all weights.
        over: The adapters that it was trained over, lowest first; they count as its base.
        against: A second adapter of the same base: another rank, seed or task. With `over`, one
            over the same adapters, or one of these.
        directions: A safetensors file of named vectors in the residual stream.
        data: Rows, of the forms that `lf.train` takes, for the loss along base + t dW.
        rows: How many rows of the data to use; each point of a line takes one pass over them.
        max_length: Longer rows are cut to this many tokens; None takes 1,024, or as many as the
            model has positions.
        full: Also compare with the spectrum of the base: it takes the SVD of every base matrix,
            which is slow the first time.
        storage: How the loaded base stores its weights: auto, fp32, bf16, nf4 or int8.
        device: cpu, cuda, cuda:N or mps; None takes the fastest that is available.
        revision: The branch, tag or commit of a hub model.
        trust_remote_code: Run Python code that comes with the model.
        allow_other_base: Accept an adapter whose fingerprint names another base.
        console: A rich console for progress and notices; None is quiet.

    Raises LorafoldError as `lf.load` does, and for a method that does not change matrices.
    """
    console, below = or_quiet(console), as_paths(over)
    if below and against is not None and data is not None:
        raise LorafoldError(
            "over, against, data: expected at most two of them; the loss between two adapters is"
            " measured over the bare base only"
        )
    examples = None if data is None else as_rows(data, None, console)[:rows]
    stack = open_all([*below, as_path(adapter, "adapter")])
    other = None if against is None else Saved.open(against)
    known = stack if other is None else (*stack, other)
    base = base_for(
        model,
        known,
        console,
        storage=storage,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_other_base=allow_other_base,
    )
    length = 0 if examples is None else length_for(base, max_length, stack, console)
    with console.status("sites") as status:
        found = run.inspect(
            base,
            stack,
            against=other,
            directions=None if directions is None else as_path(directions, "directions"),
            full=full,
            progress=lambda done, total: status.update(f"site {done} of {total}"),
        )
    if found["tokens_left_out"]:
        console.print(found["tokens_left_out"], highlight=False, markup=False, soft_wrap=True)
    if examples is not None:
        both = stack if other is None else (stack[-1], other)
        loaded, tokenizer = opened(base, both, console=console)
        with console.status("measuring the loss along lines in weight space"):
            found["paths"] = measured_paths(loaded, tokenizer, examples, length, len(below))
        found["advice"] += of_paths(found["paths"])
    return Inspection(**found)
