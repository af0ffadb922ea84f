"""The training loop, for any method and objective.

The examples, learning rates and random numbers of step i depend only on the recipe, i and the
checkpoint, so a resumed run produces a byte-identical adapter.
"""

from __future__ import annotations

import logging
import math
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafold.adapter import Adapter
from lorafold.core.active_adapters import RandomSource, seeded_dropout
from lorafold.core.attach import selection_of
from lorafold.core.contexts import evaluating, unchanged
from lorafold.data.batches import BatchFeed
from lorafold.errors import Interrupted, LorafoldError, RewardFailed, listed
from lorafold.evaluation.observations import observations_of
from lorafold.objectives.objective import Data, Objective, OnPolicy
from lorafold.ops.dropout import key_of
from lorafold.recipe.recipe import Recipe
from lorafold.runtime.processor import sleep_if_busy
from lorafold.training.checkpoint import GRADIENT, RATE, RNG, Progress, RunDirectory
from lorafold.training.progress_display import Display
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.losses import Loss
from lorafold.training_step.param_groups import optimizer_tensors, set_learning_rates, warm_steps
from lorafold.training_step.policy_loss import StepRollouts

# most and fewest steps after warmup for the comparison with guessing
NUM_RECENT_STEPS, MIN_RECENT = 50, 10

log = logging.getLogger(__name__)
MAX_SKIPPED_STEPS = 5  # steps in a row that may be skipped before the run ends
LOWER_LR_HINT = "Try a lower learning rate (lr, lr_b), clip or alpha"
# steps without a signal before a warning, and steps and examples before the run ends
NO_SIGNAL_WARNING_STEPS, NO_SIGNAL_STEPS, NO_SIGNAL_EXAMPLES = 3, 10, 32


@dataclass(frozen=True)
class Plan:
    """The inputs of the training loop. `feed` yields the rows of each step, `guessing` is
    `Objective.guessing`, and `layout` places tensors on processes.
    """

    recipe: Recipe
    objective: Objective
    adapter: Adapter
    loss: Loss
    device: torch.device
    optimizer: Optimizer
    feed: BatchFeed
    held_out: Data | None
    guessing: float | None
    run: RunDirectory
    layout: Replicated


@sleep_if_busy()
def fit(plan: Plan, progress: Progress, display: Display) -> Progress:
    """Trains from `progress.step` to the last step, and writes checkpoints. A step with a
    non-finite loss or gradient is skipped.
    """
    recipe, objective, processes = plan.recipe, plan.objective, plan.layout.processes
    first_rows = next(plan.feed.after(0)) if plan.guessing is None else ()
    rows = plan.feed.after(progress.step)
    if processes.lifeline is not None:
        processes.lifeline.progress = lambda: f"in step {progress.step + 1}; {plan.run.resume_hint}"
    save_every = recipe.checkpoint_interval(plan.feed.steps)
    eval_every = recipe.eval_every or save_every
    evaluates_first = progress.step or isinstance(objective, OnPolicy)
    missing = plan.held_out is not None and progress.step not in progress.evals
    if missing and evaluates_first and (progress.step % eval_every == 0 or is_over(plan, progress)):
        evaluate_held_out(plan, progress, display)  # before the first step, or after a failure
    with stop_signals() as stops:
        while not is_over(plan, progress):
            start = time.perf_counter()
            with saving_on_failure(plan, progress, f"step {progress.step + 1}"):
                examples = objective.examples(progress.step, next(rows), plan.loss)
            updates, tokens = [], 0
            for batch in objective.updates(examples, plan.loss):
                tokens += sum(len(e.ids) for e in batch if plan.loss.learns(e))
                updates.append(train_step(plan, batch, progress.step))
            progress.step += 1
            seconds = time.perf_counter() - start
            record_step(plan, progress, display, examples, updates, tokens, seconds)
            evaluate = progress.step % eval_every == 0 or is_over(plan, progress)
            if evaluate and plan.held_out is not None:
                evaluate_held_out(plan, progress, display)
            warmup = warm_steps(recipe, plan.feed.steps)
            if progress.step == max(warmup + NUM_RECENT_STEPS, plan.feed.steps // 4):
                warning = guessing_warning(compare_with_chance(plan, progress, first_rows))
                if warning:
                    display.note(f"step {progress.step}: so far {warning}")
            last, stop = is_over(plan, progress), processes.largest(stops[-1] if stops else 0)
            # the state after a skipped step may be bad, so older checkpoints are kept
            is_good = progress.step not in progress.skipped
            is_due = (progress.step % save_every == 0 and is_good) or last or stop
            if is_due or (evaluate and progress.best == progress.step):
                save(plan, progress)
                processes.gather(None)
            if stop and not last:
                path = plan.run.path_of(progress.step)
                message = (
                    f"stopped after step {progress.step}; to continue from {path}, run the same"
                    " command with --resume"
                )
                raise Interrupted(message, 128 + stop)
    progress.guessing = compare_with_chance(plan, progress, first_rows)
    if progress.best not in (None, progress.step):
        ended_early = recipe.stops or progress.step < plan.feed.steps
        place = "is kept" if ended_early else f"is in {plan.run.best}"
        lowest = f"the held-out loss was lowest after step {progress.best}"
        display.note(f"step {progress.step}: {lowest}; the adapter of that step {place}")
    return progress


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields the stop signals received so far. After SIGTERM or the first Ctrl-C, the run finishes
    its step and saves a checkpoint; a second Ctrl-C ends it at once.
    """
    stops: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stops and number == signal.SIGINT:
            raise KeyboardInterrupt
        stops.append(number)

    handlers = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stops
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_over(plan: Plan, progress: Progress) -> bool:
    stalled = plan.recipe.stops and progress.stalled
    limit = max(NO_SIGNAL_STEPS, math.ceil(NO_SIGNAL_EXAMPLES / plan.recipe.batch))
    return progress.step == plan.feed.steps or stalled or progress.quiet >= limit


def record_step(
    plan: Plan,
    progress: Progress,
    display: Display,
    examples: Sequence[Any],
    updates: Sequence[tuple[float, float]],
    tokens: int,
    seconds: float,
) -> None:
    loss, norm = map(fmean, zip(*updates, strict=True))
    progress.losses.append(loss)
    progress.tokens += tokens
    progress.seconds += seconds
    rollouts = examples if isinstance(examples, StepRollouts) else None
    figures = dict(rollouts.figures) if rollouts is not None else {}
    figures |= {**plan.loss.figures(plan.layout.processes), GRADIENT: norm}
    lr = plan.optimizer.param_groups[0]["lr"]
    progress.add_figures(figures | {RATE: lr})
    if rollouts is not None:
        figures |= progress.add_rollouts(rollouts, tokens, seconds, plan.held_out is None)
    display.step(progress.step, loss, progress.tokens / progress.seconds, figures, lr)
    if not math.isfinite(loss + norm):
        skip_step(plan, progress, loss, display)
    if rollouts is None:
        return
    for warning in observations_of(progress.shown, {}, plan.recipe.objective_options):
        if (kind := re.sub(r"[-\d.,=%e+]", "", warning)) not in progress.warned:
            progress.warned.append(kind)
            display.note(f"step {progress.step}: {warning}")
    if rollouts.no_signal_reason:
        report_no_signal(plan, progress, display, rollouts.no_signal_reason)


def report_no_signal(plan: Plan, progress: Progress, display: Display, reason: str) -> None:
    n, step, last = progress.quiet, progress.step, is_over(plan, progress)
    message = f"step {step}: no group of the last {n} steps has a learning signal: {reason}"
    if n == step == NO_SIGNAL_STEPS:
        raise LorafoldError(f"{message}; {plan.run.resume_hint}")
    if n == NO_SIGNAL_WARNING_STEPS or (last and n >= min(NO_SIGNAL_WARNING_STEPS, step)):
        display.note(message + "; the run stops" * (last and step < plan.feed.steps))


@contextmanager
def saving_on_failure(plan: Plan, progress: Progress, place: str) -> Iterator[None]:
    """Context that adds `place` to error messages. If a reward fails, rank 0 saves a checkpoint of
    the last complete step.
    """
    try:
        yield
    except LorafoldError as error:
        goes_on = ""
        if isinstance(error, RewardFailed) and progress.step:
            goes_on = "; to continue from it, run the same command with --resume"
            if progress.step not in plan.run.checkpoints():
                save(plan, progress)
        raise LorafoldError(f"{place}: {error}; {plan.run.resume_hint}{goes_on}") from None


def evaluate_held_out(plan: Plan, progress: Progress, display: Display) -> None:
    measure, step = partial(plan.objective.measure, plan.loss, plan.held_out), progress.step
    with saving_on_failure(plan, progress, f"held-out rows after step {step}"):
        measured = measure() if plan.layout.is_sharded else plan.layout.processes.once(measure)
    loss = measured.loss
    if not math.isfinite(loss):
        raise LorafoldError(
            f"step {step}: the held-out loss is {loss}; {plan.run.resume_hint}. {LOWER_LR_HINT}"
        )
    progress.evals[step] = loss
    if measured.figures:
        progress.measured[step] = dict(measured.figures)
    progress.add_samples(measured.samples)
    numbers = {k: v for k, v in measured.figures.items() if isinstance(v, int | float)}
    display.log({"eval_loss": loss, **{f"eval_{k}": v for k, v in numbers.items()}}, step)
    display.note(f"step {step}: {measured}")


def skip_step(plan: Plan, progress: Progress, loss: float, display: Display) -> None:
    step, n = progress.step, 1
    progress.skipped.append(step)
    while step - n in progress.skipped:
        n += 1
    reason = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    if n == MAX_SKIPPED_STEPS or (step == plan.feed.steps and not math.isfinite(loss)):
        steps = f"step {step}" if n == 1 else f"steps {step - n + 1} to {step}"
        raise LorafoldError(f"{steps}: {reason}; {plan.run.resume_hint}. {LOWER_LR_HINT}")
    display.note(f"step {step}: {reason}, so the step is skipped")


def compare_with_chance(plan: Plan, progress: Progress, first: Sequence[Any]) -> dict[str, Any]:
    """The `loss` of the run, the loss of `guessing`, and whether the first is `better`; empty if
    they are not comparable.

    To be better, the mean of the last NUM_RECENT_STEPS losses must be lower than guessing by two
    standard errors. If guessing means the untrained model, both losses are of the rows of the first
    step, and must differ by more than a thousandth.
    """
    last = progress.best if is_over(plan, progress) and plan.recipe.stops else None
    tail = progress.losses[warm_steps(plan.recipe, plan.feed.steps) : last][-NUM_RECENT_STEPS:]
    tail = [loss for loss in tail if math.isfinite(loss)]
    if len(tail) < MIN_RECENT or plan.guessing == math.inf or not math.isfinite(progress.losses[0]):
        return {}
    if plan.guessing is not None:
        loss, chance, error = fmean(tail), plan.guessing, stdev(tail) / math.sqrt(len(tail))
    elif last in (None, progress.step):
        loss, chance = loss_of(plan, first), progress.losses[0]
        error = 5e-4 * chance
    else:
        return {}
    return {"loss": loss, "guessing": chance, "better": loss + 2 * error < chance}


def loss_of(plan: Plan, examples: Sequence[Any]) -> float:
    loss, recipe = plan.loss, plan.recipe
    parts = loss.micro_batches(examples, recipe.accumulate, recipe.max_length)
    with evaluating(loss):
        of_step = loss.of_step(examples)
        batches = (loss.collate([examples[i] for i in part], plan.device) for part in parts)
        losses = [loss(**inputs, **of_step).item() for inputs in batches]
    return sum(losses) / max(1, sum(map(loss.count, examples)))


def guessing_warning(guessing: Mapping[str, Any]) -> str:
    if guessing.get("better", True):
        return ""
    return (
        f"the loss is {guessing['loss']:.4f}, no better than guessing or the untrained model"
        f" ({guessing['guessing']:.4f}). Try more steps or lower learning rates (lr, lr_b), and"
        " check that labels or answers follow from the texts"
    )


def train_step(plan: Plan, examples: Sequence[Any], step: int) -> tuple[float, float]:
    """Runs an optimizer step; skips the update if loss or gradient are not finite. Returns the mean
    loss, in nats, and the gradient norm before clipping.
    """
    recipe, optimizer, layout = plan.recipe, plan.optimizer, plan.layout
    adapter, steps = plan.adapter, plan.feed.steps
    total = max(1, sum(map(plan.loss.count, examples)))
    examples = [example for example in examples if plan.loss.learns(example)]
    if not examples:  # a step without any signal
        return 0.0, 0.0
    set_learning_rates(optimizer, recipe, step, steps)
    summed = backward(plan, examples, total, key_of(recipe.seed, step))
    trained = [*dict.fromkeys(adapter.parameters())]
    layout.add_gradients(trained)
    layout.processes.add([summed])
    if step == 0 and not optimizer.state:  # in later updates, all importance ratios may be clipped
        idle = check_gradients(adapter, layout.nonzero_gradients(trained))
        if idle and layout.processes.first:
            log.warning(
                "%d of the %d adapted modules get no gradient in the first step, because the loss"
                " of its rows does not depend on them: %s",
                len(idle), len(adapter.sites), listed(idle),
            )  # fmt: skip
    norm = layout.norm(trained)
    if recipe.clip:
        nn.utils.clip_grads_with_norm_(trained, recipe.clip, norm)
    # the only synchronization with a GPU, which then updates the weights asynchronously
    loss, size = torch.stack([summed, norm.to(summed)]).tolist()
    if math.isfinite(loss) and math.isfinite(size):
        with layout.updating():
            optimizer.step()
    else:
        optimizer.zero_grad()  # so that `after_step` does not see the gradients
    adapter.spec.after_step(adapter.own_deltas, step + 1, steps)
    optimizer.zero_grad()
    return loss / total, size


def backward(plan: Plan, examples: Sequence[Any], total: int, key: int) -> Tensor:
    """Computes the gradients of this process's examples, in micro-batches, and of the method's
    penalty. Returns the summed loss (), in nats.
    """
    loss, recipe, processes = plan.loss, plan.recipe, plan.layout.processes
    share = range(len(examples))[processes.index :: processes.count]
    own = [examples[i] for i in share]
    parts = loss.micro_batches(own, recipe.accumulate, recipe.max_length) if own else []
    # with a sharded model, all processes must make the same number of passes
    passes = processes.largest if plan.layout.is_sharded else int
    idle = passes(len(parts)) - len(parts)
    if processes.count > 1:  # each process uses different random numbers
        torch.manual_seed((key + processes.index) % (1 << 63))
    loss.train()
    summed = torch.zeros((), device=plan.device)
    with unchanged():
        of_step = loss.of_step(own, examples[:1], passes)
        processes.add([*of_step.values()])
        rows, selection = loss.rows_of(examples), selection_of(plan.adapter.model)
        for i, part in enumerate([[share[j] for j in part] for part in parts] + [[0]] * idle):
            batch = [examples[j] for j in part]
            inputs = loss.collate(batch, plan.device)
            names = loss.names(batch, [rows[j] for j in part], inputs)
            with seeded_dropout(selection, RandomSource(key, names)):
                value = loss(**inputs, **of_step)
                if i >= len(parts):
                    value = 0 * value
                else:
                    summed += value.detach()
                    value = value * (1 / total)
                # the penalty must be added once in the sum over processes
                if i == len(parts) - 1 and processes.first:
                    penalty = plan.adapter.spec.penalty(plan.adapter.own_deltas)
                    value = value if penalty is None else value + penalty
                value.backward()
    return summed


def check_gradients(adapter: Adapter, nonzero: Mapping[nn.Parameter, bool]) -> list[str]:
    """The paths of adapted modules on which the loss does not depend, such as cross-attention if
    all rows are text. Raises if no module has a gradient.
    """
    grads = {}
    for path, delta in adapter.deltas.items():
        own = {name: p for name, p in delta.named_parameters() if p.numel()}
        if own:  # a delta may share the parameters of another, and a mask may be empty
            grads[path] = {name: nonzero[p] for name, p in own.items() if p in nonzero}
    # the scale of a vector that starts at zero, as in Fastfood, has zero gradient at first
    learning = {name for grad in grads.values() for name, is_nonzero in grad.items() if is_nonzero}
    if learning:
        return [
            path
            for path, grad in grads.items()
            if not grad or (not any(grad.values()) and learning & grad.keys())
        ]
    cause = (
        "the loss does not depend on any adapted module: check the targets, and that the model's"
        " code does not detach their outputs"
    )
    if any(grads.values()):
        cause = (
            "all gradients are exactly zero: check that the rows of the first step have labelled"
            " tokens"
        )
    raise LorafoldError(
        f"the adapter received no gradient in the first step; {cause} (adapted modules:"
        f" {listed(grads)})"
    )


def save(plan: Plan, progress: Progress) -> None:
    """Writes a checkpoint in rank 0; the other processes send it the tensors that they own."""
    state = optimizer_tensors(plan.optimizer) | {f"{RNG}cpu": torch.get_rng_state()}
    state |= {f"{RNG}cuda.{i}": t for i, t in enumerate(torch.cuda.get_rng_state_all())}
    adapter, optimizer = map(plan.layout.pieces, (plan.adapter.state_dict(), state))
    progress.counts = dict(plan.loss.counts)
    if plan.layout.processes.first:
        try:
            plan.run.save(progress, adapter, optimizer, plan.recipe.keep)
        except LorafoldError as error:
            raise LorafoldError(f"step {progress.step}: {error}; {plan.run.resume_hint}") from None
    else:
        for piece in (*adapter.values(), *optimizer.values()):
            piece.get()
