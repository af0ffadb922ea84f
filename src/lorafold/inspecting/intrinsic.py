"""The intrinsic dimension of a task: the smallest random subspace in which training gets most of
the way that full training gets.

    reached(d) = (L_base - L_d) / (L_base - L_full) >= 0.9          L the held-out loss, in nats

Li et al. 2018, arXiv 1804.08838, sec. 2; on fine-tuning Aghajanyan et al. 2021, arXiv 2012.13255,
whose subspace it is (`methods.fastfood`). Powers of 2 are bisected, so it is found to a factor of
2. Every run that is done is kept as a file, and one that was stopped goes on from its checkpoint:
the same command goes on with the search.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from lorafold.errors import Interrupted, LorafoldError
from lorafold.evaluation import evaluate
from lorafold.files.atomic import write_json
from lorafold.files.record import read_object
from lorafold.machine.devices import choose_device
from lorafold.methods.fastfood import Fastfood
from lorafold.models.loading import load_model, load_tokenizer
from lorafold.models.sources import resolve_model
from lorafold.models.storage import choose_storage
from lorafold.step.fitting import fitting
from lorafold.step.recipe import Recipe
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.request import Request, digest
from lorafold.training.run import train


@dataclass(frozen=True)
class Point:
    """A run in a subspace: its dimension, the held-out loss it ended with, and the share of full
    training's gain that is.
    """

    dimension: int
    loss: float
    reached: float


@dataclass(frozen=True)
class Intrinsic:
    """dimension: None where not even the largest tried gets there; points: all runs, by
    dimension.
    """

    dimension: int | None
    share: float
    base_loss: float
    full_loss: float
    points: list[Point]


def search(
    request: Request, smallest: int, largest: int, share: float, tell: Callable[[Point], None]
) -> Intrinsic:
    """Bisect the powers of 2 from `smallest` to `largest`.

    `request` says model, data, recipe and, as `out`, where runs are kept; its recipe's method is
    left aside; it needs held-out rows. `tell` hears of every point.

    LorafoldError as `train`, for a directory that holds another search, and where full training
    gains nothing.
    """
    out, recipe = request.out, request.recipe
    if "base" not in recipe.model_fields_set:
        recipe = recipe.model_copy(update={"base": "fp32"})  # which full training can't do without
    check(
        out,
        {
            "model": request.model,
            "recipe": recipe.model_dump(mode="json"),
            "rate": Fastfood.lr,
            "data": digest(request.rows),
            "held_out": digest(request.eval_rows or ()),
        },
    )
    base = kept(out / "base.json", lambda: bare_loss(request, recipe))
    full = kept(out / "full.json", lambda: run(request, recipe, out / "full", "full"))
    if full >= base:
        raise LorafoldError(
            f"intrinsic: full training raised the held-out loss from {base:.4f} to {full:.4f};"
            " expected it to learn"
        )
    points: dict[int, Point] = {}

    def reaches(exponent: int) -> bool:
        d = 2**exponent
        loss = kept(
            out / f"{d}.json", lambda: run(request, recipe, out / str(d), "fastfood", dimension=d)
        )
        points[d] = Point(d, loss, (base - loss) / (base - full))
        tell(points[d])
        return points[d].reached >= share

    low, high = (smallest - 1).bit_length(), largest.bit_length() - 1
    found = reaches(high)
    while found and low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle + 1, high)
    return Intrinsic(
        2**high if found else None, share, base, full, [points[d] for d in sorted(points)]
    )


def check(out: Path, identity: dict) -> None:
    """Start the directory, or see that it is this search's."""
    file = out / "search.json"
    if file.exists():
        found = read_object(file)
        # fields that the recipe did not know yet count as their defaults
        found["recipe"] = Recipe().model_dump(mode="json") | found.get("recipe", {})
        if found != json.loads(json.dumps(identity)):
            raise LorafoldError(
                f"{out} holds another search: its model, data or recipe differ; choose another"
                " --out"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise LorafoldError(f"{out} exists and is no search's; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, identity)


def kept(file: Path, measure: Callable[[], float]) -> float:
    """The loss in the file; measured, and written there, if there is none."""
    if not file.exists():
        write_json(file, {"loss": measure()})
    return float(read_object(file)["loss"])


def run(request: Request, recipe: Recipe, out: Path, method: str, **options: int) -> float:
    """The held-out loss at the end of a run, which leaves nothing but that."""
    recipe = fitting(recipe, method).model_copy(update={"options": options})
    resume = bool(RunDirectory(out).checkpoints())
    try:
        trained = train(
            replace(request, out=out, recipe=recipe, resume=resume, overwrite=not resume),
            Console(quiet=True),
        )
    except Interrupted as stop:
        raise Interrupted(
            f"stopped; what is done lies in {request.out}, and the same command goes on from there",
            stop.code,
        ) from stop
    shutil.rmtree(out)
    shutil.rmtree(out.with_name(out.name + ".best"), ignore_errors=True)
    return float(trained.eval_loss)  # type: ignore[arg-type]  # there are held-out rows


def bare_loss(request: Request, recipe: Recipe) -> float:
    source, device = resolve_model(request.model, request.revision), choose_device(request.device)
    model = load_model(
        source,
        choose_storage(recipe.base, device),
        device,
        trust_remote_code=request.trust_remote_code,
    )
    tokenizer = load_tokenizer(source, trust_remote_code=request.trust_remote_code)
    return evaluate(
        model, tokenizer, request.eval_rows or (), recipe.max_length, generate=False
    ).loss
