"""Implements `lf.compose`: reads adapters, composes them with each method, and measures the
results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorafold.composing.interference import Interference, measure
from lorafold.composing.methods import RECIPE, arithmetic, lorahub, mixture
from lorafold.composing.request import Composed, ComposeRequest, Job, Opened
from lorafold.composing.updates import RULES, read_updates
from lorafold.data.batches import split
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, check_out
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.paths import check_not_replaced
from lorafold.files.templates import render_text
from lorafold.resolve.base import check_language_model

COMPOSITIONS: dict[str, Callable[[Job, Path], Composed]] = {
    **{rule: partial(arithmetic, rule) for rule in RULES},
    "lorahub": lorahub,
    "mixture": mixture,
}
LEARNING_METHODS = ("lorahub", "mixture")  # the methods that learn from examples


@dataclass(frozen=True)
class Composition(ShownInNotebooks):
    """The result of `lf.compose`: an adapter per method; `interference` is None without tasks."""

    composed: dict[str, Composed]
    adapters: tuple[str, ...]
    out: str
    interference: Interference | None

    def as_json(self) -> dict[str, Any]:
        """Every method under `compositions`; the keys of a single method are also at the top level.
        """
        made = {way: asdict(one) for way, one in self.composed.items()}
        top = next(iter(made.values())) if len(made) == 1 else {"out": self.out}
        content = {**top, "adapters": list(self.adapters), "compositions": made}
        if self.interference is not None:
            content["interference"] = self.interference.as_json()
        return content

    def __str__(self) -> str:
        return render_text("composing/composition.jinja", made=self)


def compose(request: ComposeRequest, opened: Callable[[], Opened], console: Console) -> Composition:
    check(request)
    check_out(request.out, request.overwrite)
    check_not_replaced(request.out, [one.path for one in request.adapters])
    request = with_examples(request)
    check_language_model(request.base, request.adapters)
    job = Job(request, read_updates(request.base, request.adapters), cache(opened), console)
    if len(request.ways) == 1:
        composed = {way: make(way, job, request.out) for way in request.ways}
    else:
        with atomic_directory(request.out, request.overwrite) as tmp:
            composed = {way: make(way, job, tmp / way) for way in request.ways}
        composed = {way: replace(one, out=str(request.out / way)) for way, one in composed.items()}
    interference = measure(job, composed) if request.tasks else None
    return Composition(composed, job.updates.names, str(request.out), interference)


def make(way: str, job: Job, out: Path) -> Composed:
    """Composes with one method, seeded by the request; torch's global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.request.seed)
        return COMPOSITIONS[way](job, out)


def check(request: ComposeRequest) -> None:
    problems = [
        f"--how: found {way}, expected one of {', '.join(COMPOSITIONS)}"
        for way in request.ways
        if way not in COMPOSITIONS
    ]
    problems += [
        f"--how {way}: given several times, expected once"
        for way in dict.fromkeys(request.ways)
        if request.ways.count(way) > 1
    ]
    if "lorahub" in request.ways and find_spec("cma") is None:
        problems.append("--how lorahub: the package cma is missing; install lorafold[lorahub]")
    problems += ["--adapter: found none, expected at least one"] * (not request.adapters)
    weights, n = len(request.weights), len(request.adapters)
    if weights and weights != n:
        problems.append(
            f"--weight: found {weights}, expected one for each of the {n} adapters, in their order"
        )
    if weights and (learned := [way for way in request.ways if way in LEARNING_METHODS]):
        problems.append(f"--weight: learned by --how {' and '.join(learned)}; remove this option")
    if request.density is not None and not 0 < request.density <= 1:
        problems.append(
            f"--density: found {request.density:g}, expected a share above 0 and at most 1"
        )
    recipe = request.recipe
    problems += ["recipe: found join=auto; compose does not join rows"] * (recipe.join == "auto")
    fields = recipe.model_fields_set - {"max_length"}  # the model may limit it
    options = {
        "--density": (request.density is not None, [n for n, rule in RULES.items() if rule.prune]),
        "--examples": (bool(request.examples), LEARNING_METHODS),
        "--evaluations": (request.evaluations != ComposeRequest.evaluations, ["lorahub"]),
        "--gates": (request.gates != ComposeRequest.gates, ["mixture"]),
        "--set": (any(getattr(recipe, f) != getattr(RECIPE, f) for f in fields), ["mixture"]),
    }
    problems += [
        f"{option}: used by --how {' and '.join(users)} only; remove this option"
        for option, (given, users) in options.items()
        if given and not {*users} & {*request.ways}
    ]
    if problems:
        raise LorafoldError("; ".join(problems))


def with_examples(request: ComposeRequest) -> ComposeRequest:
    """Adds examples for lorahub and mixture if there are none: half of each task's rows."""
    if request.examples or not request.tasks or not set(request.ways) & set(LEARNING_METHODS):
        return request
    halves = {task: split(rows, 0.5, request.seed) for task, rows in request.tasks.items()}
    examples, tasks = ({task: half[i] for task, half in halves.items()} for i in (0, 1))
    return replace(request, examples=examples, tasks=tasks)
