"""A run that is to be resumed and is finished already: its adapter is kept as it is.

A job that is always started with --resume, as on a cluster that stops and restarts it, may be
started once more after its run has ended. The same request then has the same result, which the
adapter's record tells; another request is refused, since it would replace the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lorafold.errors import LorafoldError, listed, shortened
from lorafold.files.atomic import check_intact, read_object
from lorafold.files.record import RECORD, named_as_now
from lorafold.identity import of_adapter
from lorafold.peft.provenance import BASE_IDENTITY, parse
from lorafold.peft.saved import Saved, open_all
from lorafold.recipe.recipe import Recipe
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.finish import GUESSING, INIT_ADAPTER, SKIPPED, Trained, mean_of_last
from lorafold.training.request import Request, objective_of
from lorafold.training.start import depends_on, free_on_resume

DEPENDS_ON = "depends_on"  # in a record
MADE = {"resized", "composed", "extracted"}  # in records of adapters that no run wrote


def finished(request: Request, console: Console) -> Trained | None:
    """The result of the run, if it is to be resumed and is finished; None if there is a run to do.

    Args:
        request: Says whether to resume.
        console: For the line that says that there is nothing to resume.

    Raises LorafoldError where the finished run had another recipe, model or data, and where
    something else than a trained adapter is in its place.
    """
    out, replaced = request.out, request.overwrite or not request.resume
    if replaced or RunDirectory(out).path.exists() or not (out / RECORD).is_file():
        return None
    check_intact(out, [RECORD])
    record = read_object(out / RECORD)
    made = MADE & record.keys()
    if made or not isinstance(record.get("recipe"), dict) or not record.get("losses"):
        raise LorafoldError(
            f"{out}: --resume: found an adapter that no run of training wrote, expected a run that"
            " was stopped; choose another --out, or replace it with --overwrite"
        )
    if differing := list(_differing(request, record)):
        raise LorafoldError(
            f"nothing to resume: {out} is finished, and this is another run: {listed(differing)};"
            " choose another --out, or replace it with --overwrite"
        )
    told = f"nothing to resume: {out} is finished"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    return _told_by(record, out)


def _differing(request: Request, record: Mapping[str, Any]) -> Iterator[str]:
    """What the finished run had in another way."""
    then = Recipe().model_dump(mode="json") | named_as_now(record["recipe"])
    asked = request.recipe
    now = asked.model_dump(mode="json")
    # a run settles these where they are left to it
    left = {"storage", "max_length", "packing"} - asked.model_fields_set
    left |= {"storage"} if asked.storage == "auto" else set()
    for name in sorted(now.keys() - free_on_resume(asked) - left):
        if now[name] != then[name]:
            yield f"{name} was {_short(then[name])}, now {_short(now[name])}"
    base = record.get(BASE_IDENTITY)  # which earlier versions did not write
    if base and base != request.base.identity:
        yield "the model was another one"
    data, given = record.get("data", {}), request.data.record
    if any(data.get(key) != given[key] for key in ("sha256", "streamed") if key in given):
        yield "the rows were others"
    below = [origin.sha256 for origin in parse(record)]
    if below != [one.sha256 for one in open_all(request.over)]:
        yield "it lay over other adapters"
    if DEPENDS_ON in record:  # which earlier versions did not write
        here = depends_on(request, objective_of(request, open_all(request.adapters)))
        for name in sorted(here.keys() | record[DEPENDS_ON].keys()):
            if here.get(name) != record[DEPENDS_ON].get(name):
                yield f"{name} had other contents"
    began = request.init_adapter and of_adapter(Saved.open(request.init_adapter))
    if record.get(INIT_ADAPTER, {}).get("sha256") != began:
        yield "it started from another adapter"


def _short(value: Any) -> str:
    return shortened(repr(value), 40)


def _told_by(record: Mapping[str, Any], out: Path) -> Trained:
    """The result as far as a record has it: no times, memory and counts."""
    losses = [math.nan if loss is None else loss for loss in record["losses"]]
    evals = record.get("evals", {})
    return Trained(
        train_loss=mean_of_last(losses),
        eval_loss=evals.get(str(record.get("step", len(losses)))),
        tokens_per_second=math.nan,
        peak_bytes=None,
        trainable_parameters=None,
        steps=len(losses),
        seconds=math.nan,
        adapter=str(out),
        losses=losses,
        figures=record.get("figures", {}),
        files=record.get("data", {}).get("files", {}),
        skipped=record.get(SKIPPED, []),
        guessing=record.get(GUESSING, {}),
    )
