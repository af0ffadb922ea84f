"""What a run shows while it goes: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Loss, tokens per second and time left.

    Everything goes to the console that is given (stderr in the command).
    """

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self.console, self.steps = console, steps
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=steps, completed=done, loss="-", rate="-")

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
        self.console.print(text, highlight=False, markup=False)

    def step(self, step: int, loss: float, rate: float) -> None:
        self.bar.update(self.task, completed=step, loss=f"{loss:.3f}", rate=f"{rate:,.0f}")
        if not self.console.is_terminal and (
            step == self.steps or step % max(1, self.steps // 10) == 0
        ):
            self.note(f"step {step}/{self.steps}: loss {loss:.4f}, {rate:,.0f} tokens/s")
