"""Interference, measured: how each task fares under the base, each adapter alone, and each
composition.

    task x (base, adapters, compositions)       loss in nats a token and, where rows have answers,
                                                exact match: `lorafold.evaluation`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafold.adapter import load
from lorafold.composing.geometry import Pair, meetings
from lorafold.composing.job import Composed, Job
from lorafold.core.attach import only
from lorafold.evaluation import Evaluation, evaluate


@dataclass(frozen=True)
class Interference:
    """`tasks`: by task, then by what was live.

    `pairs`: how the adapters' updates lie to each other.
    """

    tasks: dict[str, dict[str, Evaluation]]
    pairs: list[Pair]

    def as_json(self) -> dict[str, Any]:
        tasks = {
            task: {name: found.as_json() for name, found in row.items()}
            for task, row in self.tasks.items()
        }
        return {"tasks": tasks, "geometry": [pair.as_json() for pair in self.pairs]}

    def __str__(self) -> str:
        """A table, a line for each thing that was live, and what the geometry says."""
        live = list(next(iter(self.tasks.values())))
        cells = [
            ["", *self.tasks],
            *([name, *(_cell(row[name]) for row in self.tasks.values())] for name in live),
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        table = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*table, *map(str, self.pairs)])


def measure(job: Job, composed: Mapping[str, Composed]) -> Interference:
    """Evaluate everything on every task of the request. LorafoldError as `evaluate`."""
    model, tokenizer = job.opened()
    live: dict[str, Sequence[str]] = {"base": ()}
    for number, name in enumerate(job.updates.names, 1):
        live[name if name != "base" else "base (adapter)"] = (f"adapter{number}",)
    for word, made in composed.items():
        # its parts were checked when they were read
        load(model, made.out, f"composed-{word}", allow_other_base=True)
        live[word if word not in live else f"{word} (composed)"] = (f"composed-{word}",)
    watched = job.console if job.console.is_terminal else None
    tasks: dict[str, dict[str, Evaluation]] = {}
    for task, rows in job.request.tasks.items():
        tasks[task] = {}
        for name, chosen in live.items():
            job.console.print(f"{task}: {name}", highlight=False, markup=False)
            with only(model, *chosen):
                length = job.request.recipe.max_length
                tasks[task][name] = evaluate(
                    model, tokenizer, rows, length, generate=job.request.answers, console=watched
                )
    return Interference(tasks, meetings(job.updates, job.console))


def _cell(found: Evaluation) -> str:
    return f"loss {found.loss:.4f}" + (
        "" if found.exact_match is None else f", exact {found.exact_match:.1%}"
    )
