"""The sweep: trains every run on its stack, and measures every point. Figures are stored in
`<out>/figures`, tunings in `<out>/tuned`, so the same call continues a stopped sweep, and several
calls share the work. Only one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path

from rich.console import Console

from lorafold.data.examples import encode
from lorafold.errors import Interrupted, LorafoldError
from lorafold.files.claims import digest_of, measure_all, report_other_claims, share_work, silent
from lorafold.robustness.measure import After, Before, Bench, Opening
from lorafold.robustness.result import Fragility, Point, Way
from lorafold.robustness.task import AdapterStack, FragilityTask, Run, check
from lorafold.training.request import RunRequest, rendering_of
from lorafold.training.run import train

Tell = Callable[[str, int, int], None]  # description, done, total


def sweep(
    task: FragilityTask,
    out: Path,
    opening: Opening,
    tell: Tell,
    say: Callable[[str], object] = silent,
) -> Fragility:
    check(task)
    for name in ("figures", "tuned"):
        (out / name).mkdir(parents=True, exist_ok=True)
    cells, runs = Cells(task, out), [run for stack in task.stacks for run in task.runs(stack)]
    stacks = {cells.before(stack): partial(before, task, stack, opening) for stack in task.stacks}
    points = [file for run in runs for file in cells.files(run).values()]
    tunings = {cells.tuned(run): run for run in runs}
    report_other_claims([*stacks, *tunings, *points], say)
    befores = [*measure_all(Before, stacks, say=say).values()]
    tell_tuned, tell_point = counted(tell, len(runs)), counted(tell, len(points))
    needed = {}
    for path, run in tunings.items():
        if all(file.is_file() for file in cells.files(run).values()):
            tell_tuned(f"tuned {run}")
        else:
            needed[path] = partial(tune, run, path)
    share_work(needed, lambda path: tell_tuned(f"tuned {tunings[path]}"), say)
    found: list[Point] = []
    for stack, own in zip(task.stacks, befores, strict=True):
        found += points_of(cells, stack, own, cache(partial(Bench, task, stack, opening)),
                           tell_point, say)  # fmt: skip
    by_name = {stack.name: own for stack, own in zip(task.stacks, befores, strict=True)}
    return Fragility(task.base.name, task.source, by_name, tuple(found))


def counted(tell: Tell, total: int) -> Callable[[str], None]:
    done = count(1)
    return lambda what: tell(what, next(done), total)


@dataclass(frozen=True)
class Cells:
    """The files of a sweep; their names contain digests of everything that they depend on."""

    task: FragilityTask
    out: Path

    def before(self, stack: AdapterStack) -> Path:
        task = self.task
        digest = digest_of([stack.identity, task.probe_identity, task.rows.identity, task.defences])
        return self.out / "figures" / f"before-{digest}.json"

    def files(self, run: Run) -> dict[str, Path]:
        probe = digest_of(run.task.probe_identity)
        names = run.task.of_kind(run.mixed)
        return {name: self.out / "figures" / f"{name}-{run.name}-{probe}.json" for name in names}

    def tuned(self, run: Run) -> Path:
        return self.out / "tuned" / run.name


def before(task: FragilityTask, stack: AdapterStack, opening: Opening) -> Before:
    """The figures of a stack; also checks the inputs of all later runs."""
    bench = Bench(task, stack, opening)
    bench.check()
    for rows in filter(None, (task.rows, task.mix)):
        encode(rows, bench.tokenizer, task.recipe.max_length, None, rendering_of(task.recipe))
    return bench.before()


def points_of(
    cells: Cells,
    stack: AdapterStack,
    before: Before,
    bench: Callable[[], Bench],
    tell: Callable[[str], None],
    say: Callable[[str], object],
) -> Iterator[Point]:
    runs = {
        file: (run, defence)
        for run in cells.task.runs(stack)
        for defence, file in cells.files(run).items()
    }

    def after(run: Run, defence: str) -> After:
        return bench().after(cells.tuned(run), defence)

    def there(file: Path, after: After) -> None:
        run, defence = runs[file]
        tell(f"{run}, {defence}: log-odds {after.measured.log_odds:+.2f}")

    measures = {file: partial(after, *cell) for file, cell in runs.items()}
    for file, found in measure_all(After, measures, there, say).items():
        run, defence = runs[file]
        way = Way(stack.name, defence, run.rank, run.lr)
        yield Point.of(way, run.seed, run.examples, before, found)


def gate(task: FragilityTask, adapter: Path, instead: bool, opening: Opening) -> Fragility:
    check(task)
    [stack] = task.stacks
    bench = Bench(task, stack, opening)
    before, way = bench.before(), Way(stack.name, "none", None, None)
    point = Point.of(way, None, None, before, bench.alone(adapter, instead))
    return Fragility(task.base.name, str(adapter), {stack.name: before}, (point,))


def tune(run: Run, path: Path) -> None:
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
        raise Interrupted("stopped; to continue, run the same command again", stop.code) from None
    except LorafoldError as error:
        raise LorafoldError(f"{run}: {error}") from error
