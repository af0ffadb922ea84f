"""Runs a fragility study: trains every tuning run on its stack, and measures every point. Metrics
are stored in `<out>/figures`, tuned adapters in `<out>/tuned`, so the same call continues a stopped
study, and concurrent calls share the work. Only one model is in memory at a time.
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
from lorafold.fragility_study.measure import LoadModel, StackEvaluator, StackMetrics, TunedMetrics
from lorafold.fragility_study.result import Fragility, Point, TuningSetting
from lorafold.fragility_study.task import AdapterStack, FragilityTask, TuningRun, check
from lorafold.training.inputs import RunRequest, rendering_of
from lorafold.training.run import train

ReportProgress = Callable[[str, int, int], None]  # description, done, total


def sweep(
    task: FragilityTask,
    out: Path,
    load_model: LoadModel,
    report: ReportProgress,
    say: Callable[[str], object] = silent,
) -> Fragility:
    check(task)
    for name in ("figures", "tuned"):
        (out / name).mkdir(parents=True, exist_ok=True)
    files, runs = StudyFiles(task, out), [run for stack in task.stacks for run in task.runs(stack)]
    stacks = {files.of_stack(s): partial(measure_stack, task, s, load_model) for s in task.stacks}
    point_files = [file for run in runs for file in files.of_points(run).values()]
    tunings = {files.tuned_adapter(run): run for run in runs}
    report_other_claims([*stacks, *tunings, *point_files], say)
    by_stack = [*measure_all(StackMetrics, stacks, say=say).values()]
    tell_tuned, tell_point = counted(report, len(runs)), counted(report, len(point_files))
    needed = {}
    for path, run in tunings.items():
        if all(file.is_file() for file in files.of_points(run).values()):
            tell_tuned(f"tuned {run}")
        else:
            needed[path] = partial(tune, run, path)
    share_work(needed, lambda path: tell_tuned(f"tuned {tunings[path]}"), say)
    points: list[Point] = []
    for stack, metrics in zip(task.stacks, by_stack, strict=True):
        evaluator = cache(partial(StackEvaluator, task, stack, load_model))
        points += measure_points(files, stack, metrics, evaluator, tell_point, say)
    by_name = {stack.name: metrics for stack, metrics in zip(task.stacks, by_stack, strict=True)}
    return Fragility(task.base.name, task.source, by_name, tuple(points))


def counted(report: ReportProgress, total: int) -> Callable[[str], None]:
    done = count(1)
    return lambda description: report(description, next(done), total)


@dataclass(frozen=True)
class StudyFiles:
    """A study's files, whose names contain digests of all inputs of their content."""

    task: FragilityTask
    out: Path

    def of_stack(self, stack: AdapterStack) -> Path:
        task = self.task
        digest = digest_of([stack.identity, task.probe_identity, task.rows.identity, task.defences])
        return self.out / "figures" / f"before-{digest}.json"

    def of_points(self, run: TuningRun) -> dict[str, Path]:
        probe = digest_of(run.task.probe_identity)
        names = run.task.defences_with(run.mixed)
        return {name: self.out / "figures" / f"{name}-{run.name}-{probe}.json" for name in names}

    def tuned_adapter(self, run: TuningRun) -> Path:
        return self.out / "tuned" / run.name


def measure_stack(task: FragilityTask, stack: AdapterStack, load_model: LoadModel) -> StackMetrics:
    """Measures a stack before tuning; also checks the inputs of all later runs."""
    evaluator = StackEvaluator(task, stack, load_model)
    evaluator.check_defences()
    for rows in filter(None, (task.rows, task.mix)):
        encode(rows, evaluator.tokenizer, task.recipe.max_length, None, rendering_of(task.recipe))
    return evaluator.measure_stack()


def measure_points(
    files: StudyFiles,
    stack: AdapterStack,
    before: StackMetrics,
    evaluator: Callable[[], StackEvaluator],
    report: Callable[[str], None],
    say: Callable[[str], object],
) -> Iterator[Point]:
    points = {
        file: (run, defence)
        for run in files.task.runs(stack)
        for defence, file in files.of_points(run).items()
    }

    def measure(run: TuningRun, defence: str) -> TunedMetrics:
        return evaluator().measure_defended(files.tuned_adapter(run), defence)

    def tell_measured(file: Path, after: TunedMetrics) -> None:
        run, defence = points[file]
        report(f"{run}, {defence}: log-odds {after.measured.log_odds:+.2f}")

    measures = {file: partial(measure, *point) for file, point in points.items()}
    for file, after in measure_all(TunedMetrics, measures, tell_measured, say).items():
        run, defence = points[file]
        setting = TuningSetting(stack.name, defence, run.rank, run.lr)
        yield Point.of(setting, run.seed, run.examples, before, after)


def measure_tuned(task: FragilityTask, adapter: Path, instead: bool, load: LoadModel) -> Fragility:
    check(task)
    [stack] = task.stacks
    evaluator, setting = StackEvaluator(task, stack, load), TuningSetting(stack.name)
    before = evaluator.measure_stack()
    point = Point.of(setting, None, None, before, evaluator.measure_adapter(adapter, instead))
    return Fragility(task.base.name, str(adapter), {stack.name: before}, (point,))


def tune(run: TuningRun, path: Path) -> None:
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
