"""The progress of a run: a bar on a terminal, and about ten lines in a file or pipe."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

NONE: Mapping[str, float] = MappingProxyType({})


class Display:
    """A context that shows the loss, tokens per second and time left on a console."""

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self.console, self.steps = console, steps
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[first]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(
            "training", total=steps, completed=done, loss="-", rate="-", first=""
        )

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False)

    def step(
        self, step: int, loss: float, rate: float, figures: Mapping[str, float] = NONE
    ) -> None:
        """Show the figures of a step.

        Args:
            step: How many steps are done.
            loss: The mean loss of the step in nats.
            rate: Tokens per second, over the whole run.
            figures: What else it has to show, by name.
        """
        shown = [f", {name} {value:.4g}" for name, value in figures.items()]
        first = "".join(shown[:1])
        self.bar.update(
            self.task, completed=step, loss=f"{loss:.3f}", rate=f"{rate:,.0f}", first=first
        )
        if not self.console.is_terminal and (
            step == self.steps or step % max(1, self.steps // 10) == 0
        ):
            told = f"step {step}/{self.steps}: loss {loss:.4f}, {rate:,.0f} tokens/s"
            self.note(told + "".join(shown))
