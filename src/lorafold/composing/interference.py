"""Interference, measured: each task is evaluated with the base, with each adapter alone, and with
each composition.

    task x (base, adapters, compositions)       loss in nats a token and, for rows with references,
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
from lorafold.evaluation import Evaluation, EvaluationSettings, evaluate


@dataclass(frozen=True)
class Interference:
    """Evaluations by task, then by the name of what was active; and how the updates of every two
    adapters relate.
    """

    tasks: dict[str, dict[str, Evaluation]]
    pairs: list[Pair]

    def as_json(self) -> dict[str, Any]:
        """All figures: the evaluations under `tasks`, the pairs of adapters under `geometry`."""
        tasks = {
            task: {name: found.as_json() for name, found in by_name.items()}
            for task, by_name in self.tasks.items()
        }
        return {"tasks": tasks, "geometry": [pair.as_json() for pair in self.pairs]}

    def __str__(self) -> str:
        """A table with a line for the base, each adapter and each composition, and the pairs."""
        names = list(next(iter(self.tasks.values())))
        cells = [
            ["", *self.tasks],
            *([name, *(_cell(task[name]) for task in self.tasks.values())] for name in names),
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        table = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*table, *map(str, self.pairs)])


def measure(job: Job, composed: Mapping[str, Composed]) -> Interference:
    """Evaluate the base, the adapters and the compositions on every task of the request.

    Raises LorafoldError as `evaluate`.
    """
    model, tokenizer = job.opened()
    active: dict[str, Sequence[str]] = {"base": ()}
    for number, name in enumerate(job.updates.names, 1):
        first = 1 if job.updates.adapters[number - 1].over else number  # all below it are needed
        active[name if name != "base" else "base (adapter)"] = tuple(
            f"adapter{n}" for n in range(first, number + 1)
        )
    for way, made in composed.items():
        # the fingerprints of the adapters were checked when they were read
        load(model, made.out, f"composed-{way}", allow_other_base=True)
        active[way if way not in active else f"{way} (composed)"] = (f"composed-{way}",)
    watched = job.console if job.console.is_terminal else None
    tasks: dict[str, dict[str, Evaluation]] = {}
    for task, rows in job.request.tasks.items():
        tasks[task] = {}
        for name, chosen in active.items():
            job.console.print(f"{task}: {name}", highlight=False, markup=False)
            with only(model, *chosen):
                tasks[task][name] = evaluate(
                    model,
                    tokenizer,
                    rows,
                    job.request.recipe.max_length,
                    EvaluationSettings(completions=job.request.completions),
                    watched,
                )
    return Interference(tasks, meetings(job.updates, job.console))


def _cell(found: Evaluation) -> str:
    return f"loss {found.loss:.4f}" + (
        "" if found.exact_match is None else f", exact {found.exact_match:.1%}"
    )
