"""The progress display of a run, in a terminal, notebook or file, and its trackers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Column

from lorafold.files.terminal import print_lines
from lorafold.recipe.recipe import Recipe

MIN_UPDATE_SECONDS = 0.5  # least seconds between updates of a notebook's bar
MAX_INLINE_METRICS = 2  # metrics of a step in one sentence; more are printed in columns


class Display:
    """Context manager that shows loss, tokens per second and time left, and reports metrics to
    trackers.
    """

    def __init__(
        self, console: Console, steps: int, done: int = 0, trackers: Sequence[Any] = ()
    ) -> None:
        self.console, self.steps, self.trackers = console, steps, trackers
        self.bar = Progress(
            # of a fixed width, because narrow terminals shorten other columns
            BarColumn(10), MofNCompleteColumn(),
            TimeRemainingColumn(True, table_column=Column(width=7)), "left",
            "loss {task.fields[loss]}{task.fields[first]}", "{task.fields[rate]} tokens/s",
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(
            "training", total=steps, completed=done, loss="-", rate="-", first=""
        )

        self.cell: Any = None  # the handle of a notebook's output
        self.updated = self.started = monotonic()
        self.first_step = done

    def __enter__(self) -> Display:
        self.bar.start()
        if self.console.is_jupyter and not self.console.quiet:
            from IPython.display import HTML, display

            self.cell = display(HTML(self.bar_html(self.first_step, "")), display_id=True)
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
        clauses = [f", {name} {value:.4g}" for name, value in figures.items()]
        first = "".join(clauses[:1])
        self.bar.update(
            self.task, completed=step, loss=f"{loss:.3f}", rate=f"{rate:,.0f}", first=first
        )
        seconds = (monotonic() - self.started) * (self.steps - step) / (step - self.first_step)
        left = timedelta(seconds=round(seconds))
        line = f"step {step}/{self.steps}: loss {loss:.4f}, {rate:,.0f} tokens/s, {left} left"
        if self.cell is not None:
            self.update_cell(step, line + "".join(clauses))
        elif not self.console.is_terminal and (
            step in (self.first_step + 1, self.steps) or step % max(1, self.steps // 10) == 0
        ):
            if len(figures) > MAX_INLINE_METRICS:  # in columns
                line = f"{line:<{2 * len(str(self.steps)) + 52}}"
                clauses = [f"  {name} {value:<9.4g}" for name, value in figures.items()]
            print_lines(self.console, (line + "".join(clauses)).rstrip())

    def update_cell(self, step: int, figures: str) -> None:
        time = monotonic()
        if step == self.steps or time - self.updated >= MIN_UPDATE_SECONDS:
            from IPython.display import HTML

            self.updated = time
            self.cell.update(HTML(self.bar_html(step, figures)))

    def bar_html(self, step: int, figures: str) -> str:
        bar = f'<progress value="{step}" max="{self.steps}"></progress>'
        return f"{bar} {html.escape(figures)}"


def start_trackers(recipe: Recipe, logs: Path) -> list[Any]:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    PartialState()  # accelerate's trackers need it
    trackers = []
    for name in filter_trackers([*recipe.trackers], str(logs)):
        tracker_class = LOGGER_TYPE_TO_CLASS[str(name)]
        directory = [str(logs)] if tracker_class.requires_logging_directory else []
        trackers.append(tracker := tracker_class("lorafold", *directory))
        tracker.start()
        tracker.store_init_configuration({k: str(v) for k, v in recipe.model_dump().items()})
    return trackers
