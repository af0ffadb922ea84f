"""The intrinsic dimension of a task: the dimension of the smallest random subspace in which
training reaches 90% of the improvement of full training.

    reached(d) = (L_base - L_d) / (L_base - L_full) >= 0.9          L the held-out loss, in nats

Li et al. 2018, arXiv 1804.08838, sec. 2; for fine-tuning Aghajanyan et al. 2021, arXiv 2012.13255,
whose subspace is used (`methods.fastfood`). The search bisects powers of 2, so the result is exact
to a factor of 2. The loss of every run is stored, so the same command continues a stopped search.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafold.data.chat_template import with_date
from lorafold.data.row_store import Rows
from lorafold.errors import Interrupted, LorafoldError, differing_keys
from lorafold.files.atomic import read_object, write_json
from lorafold.files.claims import TOKEN, measure_all, share_work, silent
from lorafold.files.html_page import ShownInNotebooks
from lorafold.identity import of_adapter
from lorafold.methods.fastfood import Fastfood
from lorafold.recipe.recipe import Recipe
from lorafold.recipe.resolve_settings import with_method
from lorafold.training.checkpoint import FILES, RunDirectory
from lorafold.training.inputs import RunRequest, objective_of, prepare_tokenizer, tokenize_rows
from lorafold.training.run import train

SEARCH = "search.json"


@dataclass(frozen=True)
class HeldOutLoss:
    loss: float


@dataclass(frozen=True)
class SubspaceRun:
    dimension: int
    loss: float
    reached: float


@dataclass(frozen=True)
class Intrinsic(ShownInNotebooks):
    """The result of a search; `dimension` is None if no tested dimension reaches `share`."""

    dimension: int | None
    share: float
    base_loss: float
    full_loss: float
    points: list[SubspaceRun]

    def __str__(self) -> str:
        bound = f"more than {self.points[-1].dimension}"
        dimension = bound if self.dimension is None else f"at most {self.dimension} (a power of 2)"
        return (
            f"held-out loss: {self.base_loss:.4f} before, {self.full_loss:.4f} after full"
            f" training\nintrinsic dimension: {dimension}"
        )


def search(
    request: RunRequest,
    smallest: int,
    largest: int,
    share: float,
    on_run: Callable[[SubspaceRun], None],
    say: Callable[[str], object] = silent,
) -> Intrinsic:
    out, recipe = request.out, request.recipe
    if recipe.new_tokens:
        raise LorafoldError(
            f"recipe: new_tokens: found {', '.join(recipe.new_tokens)}, expected none: the base"
            " model has no embeddings for them, and so no loss to compare with"
        )
    if "storage" not in recipe.model_fields_set:
        # full training can't train quantized weights
        recipe = recipe.model_copy(update={"storage": "fp32"})
    stored = request.base.stored(recipe.storage)
    day = stored.date(recipe.chat_template)
    if day and (out / SEARCH).is_file():  # a continued search keeps its date
        day = str(read_object(out / SEARCH).get("day") or day)
    request = replace(request, base=stored, day=day)
    check_search(out, identity_of(request, recipe))
    # the recipe's learning rate is for full training and heads; a subspace has its own
    no_lr = recipe.model_copy(update={"lr": None})
    head_options = {"head_lr": recipe.lr} if recipe.lr else {}
    losses = {}

    def record_loss(file: Path, cell: HeldOutLoss) -> None:
        losses[file.stem] = cell.loss
        base, full = losses.get("base"), losses.get("full")
        if base is not None and full is not None and full >= base:
            raise LorafoldError(
                "intrinsic: full training did not reduce the held-out loss"
                f" ({base:.4f} before, {full:.4f} after); try another learning rate (lr), more"
                " steps or more data"
            )

    def in_subspace(d: int) -> dict[Path, Callable[[], HeldOutLoss]]:
        options, path = {"dimension": d, **head_options}, out / str(d)
        return {path.with_suffix(".json"): lambda: run(request, no_lr, path, "fastfood", **options)}

    low, high = (smallest - 1).bit_length(), largest.bit_length() - 1
    fixed_runs = {
        out / "base.json": lambda: base_model_loss(request, recipe),
        out / "full.json": lambda: run(request, recipe, out / "full", "full"),
    }
    measure_all(HeldOutLoss, fixed_runs | in_subspace(2**high), record_loss, say)
    base, full = losses["base"], losses["full"]
    points = {}

    def reaches(exponent: int) -> bool:
        d = 2**exponent
        measure_all(HeldOutLoss, in_subspace(d), record_loss, say)
        loss = losses[str(d)]
        points[d] = SubspaceRun(d, loss, (base - loss) / (base - full))
        on_run(points[d])
        return points[d].reached >= share

    reached = reaches(high)
    while reached and low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle + 1, high)
    return Intrinsic(
        2**high if reached else None, share, base, full, [points[d] for d in sorted(points)]
    )


def identity_of(request: RunRequest, recipe: Recipe) -> dict[str, Any]:
    """All inputs that the losses of a search depend on."""
    return {
        **request.base.cache_key(recipe.chat_template, "inspecting"),
        "adapters": [*map(of_adapter, request.adapters)],
        "model": request.base.name,
        "day": request.day,
        "recipe": recipe.model_dump(mode="json"),
        "rate": Fastfood.lr,
        "data": request.data.identity,
        "held_out": Rows.of(request.eval_rows or ()).sha256,
    }


def check_search(out: Path, identity: dict[str, Any]) -> None:
    file = out / SEARCH
    out.mkdir(parents=True, exist_ok=True)
    others = [path for path in out.iterdir() if SEARCH not in path.name and path.name != TOKEN]
    if others and not file.exists():
        raise LorafoldError(f"{out}: found files that are not from a search; choose another --out")
    share_work({file: lambda: write_json(file, identity)})
    recorded_identity = read_object(file)
    if FILES not in recorded_identity:
        raise LorafoldError(
            f"{out}: found a search of an earlier lorafold, which does not record the"
            " files of its model; choose another --out"
        )
    if changed := differing_keys(recorded_identity, json.loads(json.dumps(identity))):
        raise LorafoldError(
            f"{out}: found another search with other values of {', '.join(changed)}; choose"
            " another --out"
        )


def run(
    request: RunRequest, recipe: Recipe, out: Path, method: str, **options: float
) -> HeldOutLoss:
    """The held-out loss of a training run, which is resumed if it was stopped. The run's files are
    removed afterwards.
    """
    recipe = with_method(recipe, method).model_copy(update={"options": options})
    resume = bool(RunDirectory(out).checkpoints())
    try:
        trained = train(
            replace(request, out=out, recipe=recipe, resume=resume, overwrite=not resume),
            Console(quiet=True),
        )
    except Interrupted as stop:
        raise Interrupted(
            f"stopped; the finished runs are in {request.out}. To continue the search, run the"
            " same command again",
            stop.code,
        ) from stop
    shutil.rmtree(out)
    shutil.rmtree(out.with_name(out.name + ".best"), ignore_errors=True)
    assert trained.eval_loss is not None  # there are held-out rows
    return HeldOutLoss(trained.eval_loss)


def base_model_loss(request: RunRequest, recipe: Recipe) -> HeldOutLoss:
    quiet, request = Console(quiet=True), replace(request, recipe=recipe)
    objective = objective_of(request)
    tokenizer, _ = prepare_tokenizer(request, objective, quiet)
    _, held_out, _ = tokenize_rows(request, with_date(tokenizer, request.day), objective, quiet)
    model = objective.load(request.base, tokenizer, recipe.seed)
    with objective.loss(model, tokenizer, recipe.packing, quiet) as loss:
        return HeldOutLoss(objective.measure(loss, held_out).loss)
