"""The progress display of a run, in a terminal, notebook or file, and its trackers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lorafold.files.terminal import print_lines
from lorafold.recipe.recipe import Recipe

PAUSE = 0.5  # least seconds between updates of a notebook's bar
FEW = 2  # figures of a step in a sentence; more stand in columns


class Display:
    """Context: shows loss, tokens per second and time left, and reports them to trackers."""

    def __init__(
        self, console: Console, steps: int, done: int = 0, trackers: Sequence[Any] = ()
    ) -> None:
        self.console, self.steps, self.trackers = console, steps, trackers
        self.bar = Progress(
            "training", BarColumn(), MofNCompleteColumn(),
            "loss {task.fields[loss]}{task.fields[first]}", "{task.fields[rate]} tokens/s",
            TimeElapsedColumn(), "left", TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(
            "training", total=steps, completed=done, loss="-", rate="-", first=""
        )

        self.cell: Any = None  # the handle of a notebook's output
        self.drawn = self.began = monotonic()
        self.before = done

    def __enter__(self) -> Display:
        self.bar.start()
        if self.console.is_jupyter and not self.console.quiet:
            from IPython.display import HTML, display

            self.cell = display(HTML(self.drawing(self.before, "")), display_id=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        for tracker in self.trackers:
            tracker.finish()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def note(self, text: str) -> None:
        print_lines(self.console, text)

    def step(
        self, step: int, loss: float, rate: float, figures: Mapping[str, float], lr: float
    ) -> None:
        if self.trackers:
            self.log({"loss": loss, "lr": lr, **figures}, step)
        shown = [f", {name} {value:.4g}" for name, value in figures.items()]
        first = "".join(shown[:1])
        self.bar.update(
            self.task, completed=step, loss=f"{loss:.3f}", rate=f"{rate:,.0f}", first=first
        )
        if self.cell is not None:
            self.draw(step, f"loss {loss:.4f}, {rate:,.0f} tokens/s{''.join(shown)}")
        elif not self.console.is_terminal and (
            step == self.steps or step % max(1, self.steps // 10) == 0
        ):
            line = f"step {step}/{self.steps}: loss {loss:.4f}, {rate:,.0f} tokens/s"
            if len(figures) > FEW:  # in columns
                line = f"{line:<{2 * len(str(self.steps)) + 38}}"
                shown = [f"  {name} {value:<9.4g}" for name, value in figures.items()]
            self.note((line + "".join(shown)).rstrip())

    def draw(self, step: int, figures: str) -> None:
        """Update a notebook's bar, at most every PAUSE seconds."""
        now = monotonic()
        if step == self.steps or now - self.drawn >= PAUSE:
            from IPython.display import HTML

            self.drawn = now
            left = (now - self.began) * (self.steps - step) / max(step - self.before, 1)
            minutes, seconds = divmod(round(left), 60)
            self.cell.update(HTML(self.drawing(step, f"{figures}, {minutes}:{seconds:02} left")))

    def drawing(self, step: int, figures: str) -> str:
        bar = f'<progress value="{step}" max="{self.steps}"></progress>'
        return f"{bar} step {step}/{self.steps} {html.escape(figures)}"


def started(recipe: Recipe, logs: Path) -> list[Any]:
    """The recipe's trackers (of accelerate), started."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    PartialState()  # accelerate's trackers need it
    trackers = []
    for name in filter_trackers([*recipe.trackers], str(logs)):
        kind = LOGGER_TYPE_TO_CLASS[str(name)]
        where = [str(logs)] if kind.requires_logging_directory else []
        trackers.append(tracker := kind("lorafold", *where))
        tracker.start()
        tracker.store_init_configuration({k: str(v) for k, v in recipe.model_dump().items()})
    return trackers
