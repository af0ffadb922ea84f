"""The training loop: one adapter, one objective, one plan of batches.

It knows no method: what a method needs comes through `penalty` and `after_step` of its deltas. Step
i's rows, learning rates and randomness follow from the recipe, i and the checkpoint, so a run that
is killed and resumed gives the bytes of one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafold.adapter import Adapter
from lorafold.data.batches import batches
from lorafold.errors import Interrupted, LorafoldError
from lorafold.step.losses import Loss
from lorafold.step.optim import optimizer_tensors, rng_state, set_learning_rates
from lorafold.step.recipe import Recipe
from lorafold.training.checkpoint import Progress, RunDirectory
from lorafold.training.display import Display
from lorafold.training.interrupt import StopRequest


@dataclass
class Job:
    """Everything the loop turns over.

    `wrapped` is the loss as accelerate wraps it; `held_out` gives the held-out loss.
    """

    adapter: Adapter
    loss: Loss
    wrapped: nn.Module
    optimizer: Optimizer
    accelerator: Accelerator
    examples: Sequence[Any]  # what `loss` takes; each has `ids`
    held_out: Callable[[], float] | None
    recipe: Recipe
    run: RunDirectory
    steps: int


def fit(job: Job, progress: Progress, display: Display) -> Progress:
    """Train from `progress` to the last step.

    Raises LorafoldError on a loss that is not finite or an adapter without gradient, Interrupted
    after SIGINT or SIGTERM.
    """
    plan = batches(len(job.examples), job.recipe.batch, job.steps, job.recipe.seed)
    save_every = job.recipe.checkpoint_interval(job.steps)
    with StopRequest() as stop:
        while progress.step < job.steps:
            start = time.perf_counter()
            rows = [job.examples[i] for i in plan[progress.step]]
            loss = train_step(job, rows, progress.step)
            progress.step += 1
            progress.losses.append(loss)
            progress.tokens += sum(len(e.ids) for e in rows)
            progress.seconds += time.perf_counter() - start
            display.step(progress.step, loss, progress.tokens / progress.seconds)
            job.accelerator.log(
                {"loss": loss, "lr": job.optimizer.param_groups[0]["lr"]}, step=progress.step
            )
            last = progress.step == job.steps
            due = progress.step % save_every == 0 or last or stop.signal is not None
            evaluate = progress.step % (job.recipe.eval_every or save_every) == 0 or last
            if job.held_out is not None and evaluate:
                progress.evals[progress.step] = job.held_out()
                job.accelerator.log(
                    {"eval_loss": progress.evals[progress.step]}, step=progress.step
                )
                display.note(
                    f"step {progress.step}: held-out loss {progress.evals[progress.step]:.4f}"
                )
            if due or (evaluate and progress.best == progress.step):
                save(job, progress)
            if stop.signal is not None and not last:
                where = job.run.checkpoints()[progress.step]
                message = (
                    f"stopped after step {progress.step}; {where} is complete; the same command"
                    " with --resume goes on from it"
                )
                raise Interrupted(message, 128 + stop.signal)
    return progress


def train_step(job: Job, rows: Sequence[Any], step: int) -> float:
    """One optimizer step over `rows`, split over processes and micro-batches; the mean loss over
    what counts in them.
    """
    accelerator, world = job.accelerator, job.accelerator.num_processes
    own = rows[accelerator.process_index :: world]
    micro = job.loss.micro_batches(own, job.recipe.accumulate, job.recipe.max_length)
    total = max(1, sum(map(job.loss.count, rows)))
    set_learning_rates(job.optimizer, job.recipe, step, job.steps)
    job.wrapped.train()
    seen = torch.zeros((), device=accelerator.device)
    for i, examples in enumerate(micro):
        is_last = i == len(micro) - 1
        with nullcontext() if is_last else accelerator.no_sync(job.wrapped):
            loss: Tensor = job.wrapped(**job.loss.collate(examples, accelerator.device))
            seen += loss.detach()
            loss = loss * (world / total)
            if is_last:
                loss = loss + penalty(job.adapter)
            accelerator.backward(loss)
    mean = accelerator.reduce(seen).item() / total
    if not math.isfinite(mean):
        good = job.run.checkpoints()
        where = (
            f"the last good checkpoint is {good[max(good)]}"
            if good
            else "no checkpoint was written yet"
        )
        raise LorafoldError(
            f"step {step + 1}: the loss is {mean}; {where}. Try a lower learning rate (lr, lr_b),"
            " clip or alpha"
        )
    if step == 0:
        check_gradients(job.adapter)
    if job.recipe.clip:
        accelerator.clip_grad_norm_(job.adapter.parameters(), job.recipe.clip)
    job.optimizer.step()
    job.adapter.spec.after_step(job.adapter.own_deltas, step + 1, job.steps)
    job.optimizer.zero_grad()
    return mean


def penalty(adapter: Adapter) -> Tensor | float:
    return sum((p for _, delta in adapter.parts() if (p := delta.penalty()) is not None), start=0.0)


def check_gradients(adapter: Adapter) -> None:
    """LorafoldError if nothing of the adapter received a gradient: a trap that otherwise looks like
    a run that does not learn.
    """
    if any(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters()):
        return
    graph = any(p.grad is not None for p in adapter.parameters())
    cause = (
        "every one is exactly zero: the rows of the first step may hold no labelled token"
        if graph
        else (
            "no adapted module lies on the way to the loss: check the targets, and that the model's"
            " own code does not detach them"
        )
    )
    raise LorafoldError(
        f"the adapter received no gradient in the first step; {cause} (adapted:"
        f" {', '.join(list(adapter.sites)[:4])}, ...)"
    )


def save(job: Job, progress: Progress) -> None:
    if job.accelerator.is_main_process:
        state = optimizer_tensors(job.optimizer) | rng_state()
        job.run.save(progress, job.adapter.state_dict(), state, job.recipe.keep)
    job.accelerator.wait_for_everyone()
