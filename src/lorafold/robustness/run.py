"""The sweep: every run is trained over its stack, and every point is measured. Figures are stored
in `<out>/figures`, tunings in `<out>/tuned`, so the same call continues a stopped one, and several
calls share the work. No two models are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path

from rich.console import Console

from lorafold.data.examples import encode
from lorafold.errors import Interrupted, LorafoldError
from lorafold.files.claims import digest_of, measured, report_other_claims, shared, silent
from lorafold.robustness.measure import After, Before, Bench, Opening
from lorafold.robustness.result import Fragility, Point, Way
from lorafold.robustness.task import AdapterStack, FragilityTask, Run, check
from lorafold.training.request import RunRequest, rendering_of
from lorafold.training.run import train

Tell = Callable[[str, int, int], None]  # what is done, how many of them, of how many


def sweep(
    task: FragilityTask,
    out: Path,
    opening: Opening,
    tell: Tell,
    say: Callable[[str], object] = silent,
) -> Fragility:
    """Train every run of the task and measure every point."""
    check(task)
    for name in ("figures", "tuned"):
        (out / name).mkdir(parents=True, exist_ok=True)
    cells = Cells(task, out, opening, say)
    measures = {cells.before_file(stack): partial(cells.before_of, stack) for stack in task.stacks}
    runs = [run for stack in task.stacks for run in task.runs(stack)]
    after = [file for run in runs for file in cells.files(run).values()]
    report_other_claims([*measures, *map(cells.tuned, runs), *after], say)
    before = measured(Before, measures, say=say).values()
    cells.tune_all(runs, counted(tell, len(runs)))
    told = counted(tell, len(after))
    both = [*zip(task.stacks, before, strict=True)]
    points = [point for pair in both for point in cells.points_of(*pair, told)]
    stacks = {stack.name: found for stack, found in both}
    return Fragility(task.base.name, task.source, stacks, tuple(points))


def counted(tell: Tell, total: int) -> Callable[[str], None]:
    """A function that tells what is done and counts it."""
    done = count(1)
    return lambda what: tell(what, next(done), total)


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep: its task, its directory, and the loader of models."""

    task: FragilityTask
    out: Path
    opening: Opening
    say: Callable[[str], object]

    def before_file(self, stack: AdapterStack) -> Path:
        """The file of the figures of a stack itself."""
        task = self.task
        digest = digest_of([stack.identity, task.probe_identity, task.rows.identity, task.defences])
        return self.out / "figures" / f"before-{digest}.json"

    def before_of(self, stack: AdapterStack) -> Before:
        """The figures of a stack; all that a run would stumble over later is checked with them."""
        task, bench = self.task, Bench(self.task, stack, self.opening)
        bench.check()
        for rows in filter(None, (task.rows, task.mix)):
            encode(rows, bench.tokenizer, task.recipe.max_length, None, rendering_of(task.recipe))
        return bench.before()

    def files(self, run: Run) -> dict[str, Path]:
        """The file of each point of a run, by its defence."""
        probe = digest_of(run.task.probe_identity)
        names = run.task.of_kind(run.mixed)
        return {name: self.out / "figures" / f"{name}-{run.name}-{probe}.json" for name in names}

    def tuned(self, run: Run) -> Path:
        """The directory of a run's adapter."""
        return self.out / "tuned" / run.name

    def tune_all(self, runs: Sequence[Run], tell: Callable[[str], None]) -> None:
        """Tune every run whose figures are not all there, here or in another process."""
        needed = {}
        for run in runs:
            if all(file.is_file() for file in self.files(run).values()):
                tell(f"tuned {run}")
            else:
                needed[self.tuned(run)] = run
        work = {path: partial(tune, run, path) for path, run in needed.items()}
        shared(work, lambda path: tell(f"tuned {needed[path]}"), self.say)

    def points_of(
        self, stack: AdapterStack, before: Before, tell: Callable[[str], None]
    ) -> list[Point]:
        """The points of a stack, in the order of its runs; tell after each."""
        bench = cache(partial(Bench, self.task, stack, self.opening))
        cells = {
            file: (run, defence)
            for run in self.task.runs(stack)
            for defence, file in self.files(run).items()
        }

        def after(run: Run, defence: str) -> After:
            return bench().after(self.tuned(run), defence)

        def there(file: Path, after: After) -> None:
            run, defence = cells[file]
            tell(f"{run}, {defence}: log-odds {after.measured.log_odds:+.2f}")

        measures = {file: partial(after, *cell) for file, cell in cells.items()}
        results = measured(After, measures, there, self.say)
        return [
            Point.of(
                Way(stack.name, defence, run.rank, run.lr), run.seed, run.examples, before, found
            )
            for (run, defence), found in zip(cells.values(), results.values(), strict=True)
        ]


def gate(task: FragilityTask, adapter: Path, instead: bool, opening: Opening) -> Fragility:
    """Measure one stack before, and with a finished adapter over it."""
    check(task)
    [stack] = task.stacks
    bench = Bench(task, stack, opening)
    before, way = bench.before(), Way(stack.name, "none", None, None)
    point = Point.of(way, None, None, before, bench.alone(adapter, instead))
    return Fragility(task.base.name, str(adapter), {stack.name: before}, (point,))


def tune(run: Run, path: Path) -> None:
    """Train a run; one that was stopped goes on."""
    task = run.task
    request = RunRequest(
        task.base,
        path,
        run.recipe,
        run.rows,
        task.source,
        resume=True,
        over=tuple(one.path for one in run.stack.adapters),
        day=task.day,
    )
    try:
        train(request, Console(quiet=True))
    except Interrupted as stop:
        raise Interrupted("stopped; the same command continues", stop.code) from None
    except LorafoldError as error:
        raise LorafoldError(f"{run}: {error}") from error
