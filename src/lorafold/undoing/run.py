"""The sweep: every run is trained over its stack, and every point is measured.

    check -> the stacks before -> the runs -> the points

The model is loaded once to measure a stack before anything is trained, and once more for its
points; no two models are in memory at a time. Figures are in `<out>/figures`, tunings in
`<out>/tuned`, each as soon as it is there, so the same call continues what was stopped. A tuning
whose figures are all there is not needed any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from rich.console import Console

from lorafold.data.examples import encode
from lorafold.errors import Interrupted, LorafoldError
from lorafold.files.figures import digest_of, kept
from lorafold.training.request import Request, rendering_of
from lorafold.training.run import train
from lorafold.undoing.bench import Bench, Opening
from lorafold.undoing.result import Before, Fragility, Point, Way, point
from lorafold.undoing.task import Run, Stack, Task, check

Tell = Callable[[str, int, int], None]  # what is done, how many of them, of how many


def sweep(task: Task, out: Path, opening: Opening, tell: Tell) -> Fragility:
    """Train every run of the task and measure every point.

    Args:
        task: What is asked.
        out: The directory of figures and tunings.
        opening: Loads the model with adapters over it.
        tell: Called as tell(what, done, total) after each run and each point.

    Raises LorafoldError, before anything is trained, for anything wrong with the task, its rows and
    its adapters; and Interrupted after SIGINT or SIGTERM in a run.
    """
    check(task)
    for name in ("figures", "tuned"):
        (out / name).mkdir(parents=True, exist_ok=True)
    stacks = {stack.name: before_of(task, stack, out, opening) for stack in task.stacks}
    runs = [run for stack in task.stacks for run in task.runs(stack)]
    for done, run in enumerate(runs, 1):
        if not all(file.is_file() for file in files(run, out).values()):
            tune(run, out)
        tell(f"tuned {described(run)}", done, len(runs))
    points: list[Point] = []
    total = sum(len(files(run, out)) for run in runs)
    for stack in task.stacks:
        bench = cache(partial(Bench, task, stack, opening))
        for run in task.runs(stack):
            for defence, file in files(run, out).items():
                measure = partial(_after, bench, run, out, defence)
                way, ids = Way(stack.name, defence, run.rank, run.lr), (run.seed, run.examples)
                found = point(way, *ids, stacks[stack.name], kept(file, measure))
                points.append(found)
                told = f"{described(run)}, {defence}: log-odds {found.measured.log_odds:+.2f}"
                tell(told, len(points), total)
    return Fragility(task.base.name, task.source, stacks, tuple(points))


def _after(bench: Callable[[], Bench], run: Run, out: Path, defence: str) -> dict:
    return bench().after(tuned(run, out), defence)


def gate(task: Task, adapter: Path, instead: bool, opening: Opening) -> Fragility:
    """Measure one stack before, and with a finished adapter over it.

    Args:
        task: What is asked; its runs are left out.
        adapter: The finished adapter.
        instead: It replaces the stack.
        opening: Loads the model with adapters over it.

    Raises LorafoldError for anything wrong with the task, its rows and the adapters.
    """
    check(task)
    [stack] = task.stacks
    bench = Bench(task, stack, opening)
    before = Before.of_stored(bench.before())
    way = Way(stack.name, "none", None, None)
    found = point(way, None, None, before, bench.alone(adapter, instead))
    return Fragility(task.base.name, str(adapter), {stack.name: before}, (found,))


def before_of(task: Task, stack: Stack, out: Path, opening: Opening) -> Before:
    """The figures of a stack; all that a run would stumble over later is checked with them.

    Args:
        task: What is asked.
        stack: The adapters.
        out: The directory of the figures.
        opening: Loads the model with adapters over it.
    """

    def measure() -> dict:
        bench = Bench(task, stack, opening)
        bench.check()
        for rows in filter(None, (task.rows, task.mix)):
            encode(rows, bench.tokenizer, task.recipe.max_length, None, rendering_of(task.recipe))
        return bench.before()

    digest = digest_of([stack.identity, task.probe_identity, task.rows.identity, task.defences])
    return Before.of_stored(kept(out / "figures" / f"before-{digest}.json", measure))


def files(run: Run, out: Path) -> dict[str, Path]:
    """The file of each point of a run, by its defence.

    Args:
        out: The directory of figures and tunings.
    """
    probe = digest_of(run.task.probe_identity)
    names = run.task.of_kind(run.mixed)
    return {name: out / "figures" / f"{name}-{run.name}-{probe}.json" for name in names}


def tuned(run: Run, out: Path) -> Path:
    """The directory of a run's adapter."""
    return out / "tuned" / run.name


def tune(run: Run, out: Path) -> None:
    """Train a run, unless its adapter is there; one that was stopped goes on.

    Args:
        out: The directory of figures and tunings.
    """
    task, path = run.task, tuned(run, out)
    if path.is_dir():
        return
    request = Request(
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
        raise LorafoldError(f"{described(run)}: {error}") from error


def described(run: Run) -> str:
    """A run in words."""
    mixed = " and refusals" * run.mixed
    return f"rank {run.rank}, rate {run.lr:g}, seed {run.seed}, {run.examples} examples{mixed}"
