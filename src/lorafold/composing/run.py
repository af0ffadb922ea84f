"""One adapter from many, from paths to paths: the whole of `lorafold compose`, and its table of
compositions by word.

    read -> compose, one word after the other -> measure        several words: each goes to
                                                                <out>/<word>
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafold.composing import lora, lorahub, mixture
from lorafold.composing.interference import Interference, measure
from lorafold.composing.job import Composed, Job, Opened, Request
from lorafold.composing.rules import RULES
from lorafold.composing.updates import read
from lorafold.data.batches import split
from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, check_out
from lorafold.models.sources import resolve_model

if TYPE_CHECKING:
    from rich.console import Console

COMPOSITIONS: dict[str, Callable[[Job, Path], Composed]] = {
    **{word: partial(lora.compose, word) for word in RULES},
    "lorahub": lorahub.compose,
    "mixture": mixture.compose,
}
LEARNED = ("lorahub", "mixture")  # from examples


@dataclass(frozen=True)
class Result:
    """What was made, by word, where it lies, and what was measured if there were tasks."""

    composed: dict[str, Composed]
    adapters: tuple[str, ...]
    out: str
    interference: Interference | None

    def as_json(self) -> dict[str, Any]:
        """A single composition's own keys stand at the top; `compositions` has those of all."""
        made = {word: one.as_json() for word, one in self.composed.items()}
        measured = (
            {} if self.interference is None else {"interference": self.interference.as_json()}
        )
        top = next(iter(made.values())) if len(made) == 1 else {"out": self.out}
        return {**top, "adapters": list(self.adapters), "compositions": made, **measured}

    def __str__(self) -> str:
        lines = []
        for word, one in self.composed.items():
            weights = (
                "learned gates"
                if one.weights is None
                else ", ".join(
                    f"{weight:.3g} {name}"
                    for weight, name in zip(one.weights, self.adapters, strict=True)
                )
            )
            lines.append(
                f"{word}: {one.out} ({weights}); {one.truncation_error:.2%} of the update's norm"
                " was cut off"
            )
        return "\n".join(
            [*lines, *([] if self.interference is None else ["", str(self.interference)])]
        )


def compose(request: Request, opened: Callable[[], Opened], console: Console) -> Result:
    """Make every composition of the request and, where it has tasks, measure them.

    `opened` loads the base with the adapters on it, named adapter1 and so forth, if it is needed.

    LorafoldError, with nothing left behind, for a word, a weight, an adapter, rows or an `out` that
    won't do.
    """
    check(request)
    check_out(request.out, request.overwrite)
    request = set_apart(request)
    source = resolve_model(request.model, request.revision)
    updates = read(
        source,
        request.adapters,
        allow_other_base=request.allow_other_base,
        trust_remote_code=request.trust_remote_code,
    )
    job = Job(request, source, updates, cache(opened), console)
    if len(request.words) == 1:
        composed = {word: make(word, job, request.out) for word in request.words}
    else:
        with atomic_directory(request.out, request.overwrite) as tmp:
            composed = {word: make(word, job, tmp / word) for word in request.words}
        composed = {
            word: replace(one, out=str(request.out / word)) for word, one in composed.items()
        }
    interference = measure(job, composed) if request.tasks else None
    return Result(composed, updates.names, str(request.out), interference)


def make(word: str, job: Job, out: Path) -> Composed:
    """One composition, whose randomness (an SVD by subspace iteration has some) is the request's
    seed's and its own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.request.seed)
        return COMPOSITIONS[word](job, out)


def check(request: Request) -> None:
    """LorafoldError lists what is wrong with the request itself."""
    problems = [
        f"--how {word}: unknown; expected {', '.join(COMPOSITIONS)}"
        for word in request.words
        if word not in COMPOSITIONS
    ]
    problems += [
        f"--how {word}: given twice"
        for word in dict.fromkeys(request.words)
        if request.words.count(word) > 1
    ]
    problems += ["--adapter: found none, expected at least one"] * (not request.adapters)
    given, n = len(request.weights), len(request.adapters)
    if given and given != n:
        problems.append(
            f"--weight: found {given}, expected one for each of the {n} adapters, in their order"
        )
    if given and (learned := [word for word in request.words if word in LEARNED]):
        problems.append(f"--weight: {', '.join(learned)} finds its own")
    if request.density is not None and not 0 < request.density <= 1:
        problems.append(
            f"--density: found {request.density:g}, expected a share above 0, at most 1"
        )
    if problems:
        raise LorafoldError("; ".join(problems))


def set_apart(request: Request) -> Request:
    """The request with examples for the words that learn: its own, or half of each task's rows,
    which is then measured on the others.
    """
    if request.examples or not request.tasks or not set(request.words) & set(LEARNED):
        return request
    halves = {task: split(rows, 0.5, request.seed) for task, rows in request.tasks.items()}
    examples, tasks = ({task: half[i] for task, half in halves.items()} for i in (0, 1))
    return replace(request, examples=examples, tasks=tasks)
