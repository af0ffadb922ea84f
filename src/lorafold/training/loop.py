"""The training loop: one adapter, one objective, one plan of batches.

The loop names no method: a spec's `penalty` and `after_step` bring in what a method needs. The
examples, learning rates and random numbers of step i follow from the recipe, i and the
checkpoint, so a run that is killed and resumed writes the same bytes as one that is not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafold.adapter import Adapter
from lorafold.core.attach import selection_of
from lorafold.core.draws import drawing
from lorafold.core.modes import evaluating, unchanged
from lorafold.core.selection import Draws
from lorafold.data.batches import Feed
from lorafold.errors import Interrupted, LorafoldError, RewardFailed, listed
from lorafold.evaluation import Measured
from lorafold.machine.cores import considerate
from lorafold.machine.processes import Processes
from lorafold.ops.philox import key_of
from lorafold.recipe.recipe import Recipe
from lorafold.step.losses import Loss
from lorafold.step.optim import optimizer_tensors, rng_state, set_learning_rates, warm_steps
from lorafold.step.replicated import Replicated
from lorafold.training.checkpoint import GRADIENT, Progress, RunDirectory
from lorafold.training.display import Display
from lorafold.training.interrupt import StopRequest
from lorafold.training.tracking import Tracking

RECENT, FEWEST = 50, 10  # steps after the warm-up whose loss is compared with guessing

log = logging.getLogger(__name__)
SKIPPED = 5  # steps in a row that may be skipped before the run ends
LOWER = "Try a lower learning rate (lr, lr_b), clip or alpha"
SAID, QUIET = 3, 10  # steps without a signal, after which that is said, and after which a run ends
GROUPS = 32  # examples of them, at the least, where batches are small


@dataclass
class Job:
    """Everything that the loop works with.

    `examples(step, planned)` gives what `loss.collate` takes, each with `ids`, of what the feed has
    for a step; `held_out()` measures on held-out examples, also before the first step where
    `measures_before`. Each step updates the weights `updates` times. `guessing` is the loss of a
    model that only guesses, as its objective gives it. `layout` says how tensors lie among the
    processes.
    """

    adapter: Adapter
    loss: Loss
    optimizer: Optimizer
    device: torch.device
    processes: Processes
    feed: Feed  # of the rows of each step
    held_out: Callable[[], Measured] | None
    recipe: Recipe
    run: RunDirectory
    steps: int
    layout: Replicated
    examples: Callable[[int, Sequence[Any]], Sequence[Any]] = lambda step, planned: planned
    updates: int = 1
    measures_before: bool = False
    guessing: float | None = math.inf
    tracking: Tracking = field(default_factory=Tracking)


@considerate()
def fit(job: Job, progress: Progress, display: Display) -> Progress:
    """Train from `progress.step` to the last step, and write the checkpoints that are due.

    Args:
        job: What is trained, and on what.
        progress: Updated in place, and returned.
        display: Shows each step and each held-out loss.

    A step whose loss or gradient is not finite is skipped. Raises LorafoldError after SKIPPED of
    them in a row, where the loss of the last step is not finite, and for an adapter without
    gradient; Interrupted after SIGINT or SIGTERM.
    """
    first = next(job.feed.after(0)) if job.guessing is None else ()
    feed, processes = job.feed.after(progress.step), job.processes
    processes.tell_place(lambda: f"in step {progress.step + 1}; {kept(job.run)}")
    save_every = job.recipe.checkpoint_interval(job.steps)
    every = job.recipe.eval_every or save_every
    unmeasured = progress.step not in progress.evals and (progress.step or job.measures_before)
    if unmeasured and (progress.step % every == 0 or over(job, progress)):
        measure(job, progress, display)  # before the first step, or again after it failed
    with StopRequest() as stop:
        while not over(job, progress):
            start = time.perf_counter()
            with keeping(job, progress, f"step {progress.step + 1}"):
                examples = job.examples(progress.step, next(feed))
            progress.quiet = 0 if any(map(job.loss.signals, examples)) else progress.quiet + 1
            found = []
            for update in range(job.updates):
                job.loss.begin(update)
                found.append(train_step(job, examples, progress.step))
            loss, norm = map(fmean, zip(*found, strict=True))
            progress.step += 1
            progress.losses.append(loss)
            seconds = time.perf_counter() - start
            tokens = job.updates * sum(len(e.ids) for e in examples if job.loss.learns(e))
            progress.tokens, progress.seconds = progress.tokens + tokens, progress.seconds + seconds
            job.loss.gathered(processes.gather)
            figures, generated = {**job.loss.figures(), GRADIENT: norm}, job.loss.generated()
            progress.stepped(figures, generated, tokens, seconds)
            if job.held_out is None:
                progress.read(generated.samples)
            figures |= progress.rates
            display.step(progress.step, loss, progress.tokens / progress.seconds, figures)
            lr = job.optimizer.param_groups[0]["lr"]
            job.tracking.log({"loss": loss, "lr": lr, **figures}, step=progress.step)
            if not math.isfinite(loss + norm):
                skipped(job, progress, loss, display)
            tell_quiet(job, progress, display)
            evaluate = progress.step % every == 0 or over(job, progress)
            if evaluate:
                measure(job, progress, display)
            looked_at = max(warm_steps(job.recipe, job.steps) + RECENT, job.steps // 4)
            if progress.step == looked_at and (told := no_better(guessed(job, progress, first))):
                display.note(f"step {progress.step}: so far {told}")
            last, signal = over(job, progress), processes.largest(stop.signal or 0)
            # of a state that may be a bad one, older checkpoints are no worse
            due = (progress.step % save_every == 0 and not progress.skipping) or last or signal
            if due or (evaluate and progress.best == progress.step):
                save(job, progress)
            if signal and not last:
                where = job.run.at(progress.step)
                message = (
                    f"stopped after step {progress.step}; {where} is complete; the same command"
                    " with --resume continues from it"
                )
                raise Interrupted(message, 128 + signal)
    progress.guessing = guessed(job, progress, first)
    if progress.best not in (None, progress.step):
        early = job.recipe.stops or progress.step < job.steps
        kept_in = "is kept" if early else f"is in {job.run.path.with_suffix('.best')}"
        told = f"the held-out loss was lowest after step {progress.best}, whose adapter {kept_in}"
        display.note(f"step {progress.step}: {told}")
    return progress


def over(job: Job, progress: Progress) -> bool:
    """Whether no step is left, or none that would help."""
    stalled = job.recipe.stops and progress.stalled
    silent = progress.quiet >= max(QUIET, math.ceil(GROUPS / job.recipe.batch))
    return progress.step == job.steps or stalled or silent


def tell_quiet(job: Job, progress: Progress, display: Display) -> None:
    """Say that no example of the last steps had a signal, and why. Raises LorafoldError where none
    of any step had one.
    """
    n = progress.quiet
    told = f"no group of completions of the last {n} steps has a signal: {job.loss.silent}"
    if n == progress.step == QUIET:
        raise LorafoldError(f"step {n}: {told}; {kept(job.run)}")
    last = over(job, progress)
    if n == SAID or (last and n >= min(SAID, progress.step)):
        ends = "; the run ends here" * (last and progress.step < job.steps)
        display.note(f"step {progress.step}: {told}{ends}")


@contextmanager
def keeping(job: Job, progress: Progress, place: str) -> Iterator[None]:
    """Write a checkpoint of the last complete step where a reward fails in the `with` block, in
    process 0, and say of any error where it was.
    """
    try:
        yield
    except LorafoldError as error:
        goes_on = ""
        if isinstance(error, RewardFailed) and progress.step:
            goes_on = "; the same command with --resume continues from it"
            if progress.step not in job.run.checkpoints():
                write(job, progress)
        raise LorafoldError(f"{place}: {error}; {kept(job.run)}{goes_on}") from None


def measure(job: Job, progress: Progress, display: Display) -> None:
    """Measure on held-out examples, if there are any."""
    if job.held_out is None:
        return
    with keeping(job, progress, f"held-out rows after step {progress.step}"):
        found = job.held_out() if job.layout.divides else job.processes.once(job.held_out)
    if not math.isfinite(found.loss):
        raise LorafoldError(
            f"step {progress.step}: the held-out loss is {found.loss}; {kept(job.run)}. {LOWER}"
        )
    progress.evals[progress.step] = found.loss
    if found.figures:
        progress.measured[progress.step] = dict(found.figures)
    progress.read(found.samples)
    job.tracking.log({"eval_loss": found.loss, **found.numbers}, step=progress.step)
    display.note(f"step {progress.step}: {found}")


def skipped(job: Job, progress: Progress, loss: float, display: Display) -> None:
    """Count and report a skipped step. Raises LorafoldError where there is no use in going on."""
    progress.skipped.append(progress.step)
    n, step = progress.skipping, progress.step
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    if n == SKIPPED or (step == job.steps and not math.isfinite(loss)):
        steps = f"step {step}" if n == 1 else f"steps {step - n + 1} to {step}"
        raise LorafoldError(f"{steps}: {what}; {kept(job.run)}. {LOWER}")
    display.note(f"step {step}: {what}, so the step is skipped")


def guessed(job: Job, progress: Progress, first: Sequence[Any]) -> dict[str, Any]:
    """The `loss`, the one of `guessing`, and whether the first is `better`; empty if there were too
    few steps to say, or if the loss means nothing.

    The mean over the last RECENT steps has to be lower by two of its standard errors. If guessing
    is the model before the first step, both losses are of the rows of that step, and a thousandth
    counts as rounding.

    Args:
        first: The examples of the first step.
    """
    kept = progress.best if over(job, progress) and job.recipe.stops else None
    recent = progress.losses[warm_steps(job.recipe, job.steps) : kept][-RECENT:]
    recent = [loss for loss in recent if math.isfinite(loss)]
    if len(recent) < FEWEST or job.guessing == math.inf or not math.isfinite(progress.losses[0]):
        return {}
    if job.guessing is not None:
        loss, level, error = fmean(recent), job.guessing, stdev(recent) / math.sqrt(len(recent))
    elif kept in (None, progress.step):
        loss, level = loss_of(job, first), progress.losses[0]
        error = 5e-4 * level
    else:
        return {}
    return {"loss": loss, "guessing": level, "better": loss + 2 * error < level}


def loss_of(job: Job, examples: Sequence[Any]) -> float:
    """The mean loss of examples, in nats, under the weights as they are."""
    parts = job.loss.micro_batches(examples, job.recipe.accumulate, job.recipe.max_length)
    with evaluating(job.loss):
        shared = job.loss.of_step(examples)
        losses = [job.loss(**job.loss.collate(part, job.device), **shared).item() for part in parts]
    return sum(losses) / max(1, sum(map(job.loss.count, examples)))


def no_better(found: Mapping[str, Any]) -> str:
    """A line for a user whose loss is no better than guessing; empty if it is better.

    Args:
        found: As `guessed` gives it.
    """
    if found.get("better", True):
        return ""
    return (
        f"the loss is {found['loss']:.4f}, no better than guessing ({found['guessing']:.4f}). Try"
        " more steps or lower learning rates (lr, lr_b), and check that labels or answers follow"
        " from the texts"
    )


def train_step(job: Job, examples: Sequence[Any], step: int) -> tuple[float, float]:
    """One update of the weights, none where the loss or the gradient is not finite. Returns the
    mean loss, in nats over what counts, and the norm of the gradient before it is clipped.

    Args:
        job: What is trained.
        examples: Split over the processes, and those of a process over its micro-batches.
        step: How many steps were done before.

    Raises LorafoldError for an adapter without gradient.
    """
    processes, layout = job.processes, job.layout
    total = max(1, sum(map(job.loss.count, examples)))
    examples = [example for example in examples if job.loss.learns(example)]
    if not examples:  # of a step in which there is nothing to learn
        return 0.0, 0.0
    share = slice(processes.index, None, processes.count)
    own, numbers = examples[share], range(len(examples))[share]
    micro = job.loss.micro_batches(own, job.recipe.accumulate, job.recipe.max_length) if own else []
    passes = processes.largest if layout.divides else int
    more = passes(len(micro)) - len(micro)
    place_of = places(own, numbers)
    selection, key = selection_of(job.adapter.model), key_of(job.recipe.seed, step)
    set_learning_rates(job.optimizer, job.recipe, step, job.steps)
    processes.part_ways(key)
    job.loss.train()
    seen = torch.zeros((), device=job.device)
    with unchanged():
        of_step = job.loss.of_step(own, examples[:1], passes)
        processes.add([*of_step.values()])
        rows = job.loss.rows_of(examples)
        for i, part in enumerate(micro):
            inputs = job.loss.collate(part, job.device)
            names = job.loss.names(part, [rows[place_of[id(e)].pop()] for e in part], inputs)
            with drawing(selection, Draws(key, names)):
                loss: Tensor = job.loss(**inputs, **of_step)
                seen += loss.detach()
                loss = loss * (1 / total)
                if i == len(micro) - 1 and processes.first:  # of the sum over all
                    added = job.adapter.spec.penalty(job.adapter.own_deltas)
                    loss = loss if added is None else loss + added
                loss.backward()
        for _ in range(more):  # passes of others, in which this process has nothing to learn
            inputs = job.loss.collate(examples[:1], job.device)
            with drawing(selection, Draws(key, job.loss.names(examples[:1], [rows[0]], inputs))):
                (0 * job.loss(**inputs, **of_step)).backward()
    trained = [*dict.fromkeys(job.adapter.parameters())]
    layout.add_gradients(trained)
    processes.add([seen])
    first = step == 0 and not job.optimizer.state  # later updates may have all ratios clipped
    idle = check_gradients(job.adapter, layout.moves(trained)) if first else []
    if idle and processes.first:
        log.warning(
            "no gradient in the first step for %d of the %d adapted modules, on which the loss of"
            " its rows does not depend: %s", len(idle), len(job.adapter.sites), listed(idle),
        )  # fmt: skip
    norm = layout.norm(trained)
    if job.recipe.clip:
        nn.utils.clip_grads_with_norm_(trained, job.recipe.clip, norm)
    # the one time that a GPU is waited for: it updates the weights while this process goes on
    sums = torch.stack([seen, norm.to(seen)]).tolist()
    if all(map(math.isfinite, sums)):
        with layout.updating():
            job.optimizer.step()
    else:
        job.optimizer.zero_grad()  # before a method looks at them
    job.adapter.spec.after_step(job.adapter.own_deltas, step + 1, job.steps)
    job.optimizer.zero_grad()
    return sums[0] / total, sums[1]


def kept(run: RunDirectory) -> str:
    """What is kept of a run that ends before its time."""
    good = run.checkpoints()
    where = f"the last good checkpoint is {good[max(good)]}" if good else ""
    return where or "no checkpoint was written yet"


def places(examples: Sequence[Any], numbers: Sequence[int]) -> dict[int, list[int]]:
    """The numbers of examples by their `id`; one that comes several times has as many numbers."""
    found: dict[int, list[int]] = {}
    for example, number in zip(examples, numbers, strict=True):
        found.setdefault(id(example), []).append(number)
    return found


def check_gradients(adapter: Adapter, moves: Mapping[nn.Parameter, bool]) -> list[str]:
    """Return the paths of the adapted modules that the loss does not depend on: those of a
    cross-attention on text alone, of copies that the model's code does not call.

    Args:
        adapter: What trains.
        moves: Its parameters that have a gradient, and whether that is anything but zero.

    Raises LorafoldError if it depends on none, or all gradients are zero. Without this check, such
    a run would only look like one that does not learn.
    """
    held = {
        path: {name: p for name, p in delta.named_parameters() if p.numel()}
        for path, delta in adapter.deltas.items()
    }
    # a twin's are another's, and a mask may have no entry in a weight
    own = {path: found for path, found in held.items() if found}
    grads = {
        path: {name: moves[p] for name, p in found.items() if p in moves}
        for path, found in own.items()
    }
    # a scale of a vector that starts at zero, as Fastfood's, is zero at the start everywhere
    telling = {name for found in grads.values() for name, some in found.items() if some}
    if telling:
        return [
            path
            for path, found in grads.items()
            if not found or (not any(found.values()) and telling & found.keys())
        ]
    cause = (
        "all gradients are exactly zero: check that the rows of the first step have labelled tokens"
        if any(grads.values())
        else (
            "the loss does not depend on any adapted module: check the targets, and that the"
            " model's code does not detach their outputs"
        )
    )
    raise LorafoldError(
        f"the adapter received no gradient in the first step; {cause} (adapted modules:"
        f" {', '.join([*own][:4])}, ...)"
    )


def save(job: Job, progress: Progress) -> None:
    """Write a checkpoint in the first process; the others give it what they hold, and wait."""
    write(job, progress)
    job.processes.wait()


def write(job: Job, progress: Progress) -> None:
    """Write a checkpoint in the first process, where the others only give it what they hold."""
    state = optimizer_tensors(job.optimizer) | rng_state()
    adapter, optimizer = map(job.layout.pieces, (job.adapter.state_dict(), state))
    if job.processes.first:
        progress.counts = dict(job.loss.counts)
        try:
            job.run.save(progress, adapter, optimizer, job.recipe.keep)
        except LorafoldError as error:
            raise LorafoldError(f"step {progress.step}: {error}; {kept(job.run)}") from None
    else:
        for piece in (*adapter.values(), *optimizer.values()):
            piece.get()
