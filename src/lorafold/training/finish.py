"""The files that a run leaves: the last adapter, the best one if an earlier step was better, and in
each a record of how it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.data.findings import Findings
from lorafold.files.atomic import remove
from lorafold.files.card import HELD_OUT, SAMPLES, STEPS, VOCABULARY, training_card
from lorafold.files.page import Shown
from lorafold.machine.memory import freed_blocks_returned, peak_bytes
from lorafold.models.architecture import opened_by_name
from lorafold.models.weights import Weights
from lorafold.peft.form import form_of
from lorafold.peft.provenance import recorded
from lorafold.recipe.fields import OF_METHOD
from lorafold.step.optim import UP
from lorafold.training.checkpoint import Progress
from lorafold.training.loop import Job, no_better
from lorafold.training.read_back import check_trained, read_back
from lorafold.training.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAST = 10  # steps, whose mean loss is told
SKIPPED = "skipped"  # in a record: the steps without an update
GUESSING = "guessing"  # in a record: as the result has it
INIT_ADAPTER = "init_adapter"  # in a record: the adapter that the run started from


@dataclass(frozen=True)
class Trained(Shown):
    """The result of a run.

    Losses are means in nats over labelled tokens (over texts, for a classifier); `train_loss` is
    that of the last ten steps. `adapter` is the directory that was written, and `figures` are
    further ones of the held-out rows, such as the accuracy of preferences. `frozen` has the shares
    of parameters that the adapter does not reach, by kind: of those of the blocks, and of the
    model's the towers and connectors beside them. `files` has the rows of each file that was read
    of a directory or a pattern, and `data` what was found in the rows before the first step, such
    as duplicates. `skipped` are the steps without an update, since their loss or gradient was not
    finite. `pace` has tokens and seconds of drawing, judging and learning, where completions
    are drawn. `guessing` has the `loss` that is compared with that of a model which only guesses,
    and whether it is `better`. Of a run that was finished before, which had nothing to resume,
    there is what the adapter's record has: no times (nan), no memory and no counts of parameters
    (None).
    """

    train_loss: float
    eval_loss: float | None
    tokens_per_second: float
    peak_bytes: int | None
    trainable_parameters: int | None
    steps: int
    seconds: float
    adapter: str
    losses: list[float]
    figures: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, dict[str, float]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    pace: dict[str, float] = field(default_factory=dict)
    guessing: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        held_out = "" if self.eval_loss is None else f", held out {self.eval_loss:.4f}"
        count, rate = self.trainable_parameters, self.tokens_per_second
        parameters = "" if count is None else f"{count:,} parameters, "
        pace = "" if math.isnan(rate) else f", {rate:,.0f} tokens/s"
        over = f" of the last {LAST}" if len(self.losses) > LAST else ""
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        steps += f", {len(self.skipped)} of them skipped" * bool(self.skipped)
        told = f"\n{no_better(self.guessing)}".rstrip()
        return (
            f"adapter: {self.adapter} ({parameters}{steps}, mean loss{over}"
            f" {self.train_loss:z.4f}{held_out}{pace}){told}"
        )


def finish(
    request: Request,
    job: Job,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase | None,
    about: Mapping[str, Any],
    base: Weights | None,
    findings: Findings,
) -> Trained:
    """Write the adapter to `request.out`, and that of the best step to `<out>.best` if it was an
    earlier one, or in its place where the recipe keeps that; read them back, and remove the
    checkpoints. Only the first process writes.

    Raises LorafoldError where what was trained is zero or not finite, or is not what was written.

    Args:
        request: Names the output directory, the recipe and the data.
        job: The finished loop, with its adapter.
        progress: Losses, tokens and seconds of the run.
        tokenizer: Saved in the adapter's directory; None where it is the base's.
        about: Further fields of the adapter's record.
        base: The base's own weights, where the model has only quantized ones.
        findings: What was found in the rows.
    """
    better = progress.best if progress.best != progress.step else None
    ends = request.recipe.stops or progress.step < job.steps
    kept = better if better is not None and ends else progress.step
    result = Trained(
        train_loss=mean_of_last(progress.losses),
        eval_loss=progress.evals.get(kept),
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_bytes=most(job.processes.gather(peak_bytes(job.device))),
        trainable_parameters=sum(p.numel() for p in job.adapter.parameters()),
        steps=progress.step,
        seconds=progress.seconds,
        adapter=str(request.out),
        losses=progress.losses,
        figures=progress.measured.get(kept, {}),
        frozen=job.adapter.unreached.as_json(),
        files=request.data.record.get("files", {}),
        data=findings.as_json(),
        skipped=progress.skipped,
        pace=progress.pace | progress.rates,
        guessing=progress.guessing,
    )
    if not job.processes.first:
        job.processes.wait()
        return result
    check_trained(job.adapter, job.optimizer)
    job.optimizer.state.clear()  # to make room for what is written and read back
    record = {
        "recipe": request.recipe.model_dump(mode="json"),
        "losses": [loss if math.isfinite(loss) else None for loss in progress.losses],
        **({SKIPPED: progress.skipped} if progress.skipped else {}),
        "evals": progress.evals,
        **kept_figures(progress),
        "data": {"source": request.source, **request.data.record},
        GUESSING: result.guessing,
        **about,
        **recorded(job.adapter.over),
    }
    if (size := job.adapter.vocabulary) is not None:
        record |= {VOCABULARY: size}
    model, spec = job.adapter.model, job.adapter.spec
    in_peft = not spec.trains_base and form_of(model, spec, job.adapter.matches.paths).in_peft

    def write(path: Path, record: dict[str, Any]) -> None:
        overwrite = request.overwrite or request.resume
        step = record.get("step", progress.step)
        own = {"eval_loss": progress.evals.get(step)}
        if figures := progress.measured.get(step):
            record = record | {"figures": figures}
        card = training_card(
            request.base.name,
            record | {"recipe": settled(record["recipe"], job)},
            asdict(result) | result.pace | own,
            whole=spec.trains_base,
            opened_by=opened_by_name(model),
            in_peft=in_peft,
        )
        job.adapter.save(
            path, overwrite=overwrite, card=card, record=record, tokenizer=tokenizer, base=base
        )
        read_back(job.adapter, path, base)

    with freed_blocks_returned():
        if kept == progress.step:
            write(request.out, record)
        if better is not None:
            _, tensors, _ = job.run.load(job.run.checkpoints()[better])
            job.adapter.load_state_dict(tensors)
            own = request.out if kept == better else best_path(request.out)
            write(own, record | {"step": better})
    if better is None or kept == better:
        remove(best_path(request.out))  # of the run that this one replaces
    job.run.remove()
    job.processes.wait()
    return result


def settled(recipe: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The fields of a recipe with what the run took for those that are None: of the method's
    options, of its targets and of the peak learning rates.

    Args:
        recipe: Its fields by name.
        job: The finished loop.
    """
    spec = job.adapter.spec
    taken = {name: getattr(spec, name, None) for name in (*OF_METHOD, "targets")}
    names = {"": "lr", UP: "lr_b"}
    peaks = {names[g["of"]]: g["peak"] for g in job.optimizer.param_groups if g["of"] in names}
    return {k: (taken | peaks).get(k) if v in (None, {}) else v for k, v in recipe.items()}


def most(bytes_of: Sequence[int | None]) -> int | None:
    """The largest number of bytes; None where none is known."""
    return max((n for n in bytes_of if n is not None), default=None)


def mean_of_last(losses: Sequence[float]) -> float:
    """The mean loss of the last ten steps, in nats, of those that have one."""
    tail = [loss for loss in losses[-LAST:] if math.isfinite(loss)] or [math.nan]
    return sum(tail) / len(tail)


def kept_figures(progress: Progress) -> dict[str, Any]:
    """What a record has of the figures that a run has shown: no wall times, so that a run which was
    killed and resumed has the same record.
    """
    steps = sorted(progress.evals)
    names = {name: None for found in progress.measured.values() for name in found}
    held_out = {
        name: [_rounded(progress.measured.get(step, {}).get(name)) for step in steps]
        for name in names
    }
    found = {
        STEPS: {name: [*map(_rounded, values)] for name, values in progress.shown.items()},
        HELD_OUT: {"step": steps, **held_out} if held_out else {},
        SAMPLES: progress.samples,
    }
    return {name: value for name, value in found.items() if value}


def _rounded(value: Any) -> Any:
    """A number, or the two of an interval, with six digits; None for anything else."""
    if isinstance(value, list | tuple):
        return [*map(_rounded, value)] if len(value) == 2 else None
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if isinstance(value, int) else None


def best_path(out: Path) -> Path:
    """The directory of the adapter with the lowest held-out loss, where that was not the last."""
    return out.with_name(out.name + ".best")
