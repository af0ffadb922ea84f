"""One training run: from a base model, rows and a recipe to an adapter directory in PEFT's format.

    set_up            what needs no model: the checks, device and dtype, tokenizer, tokenized rows
    adapted_model     the base model with its adapter, once the memory of a step is estimated
    objective.loss    the loss over the model
    objective.refer   what the objective needs of the untrained model (the reference of DPO)
    prepare           the optimizer, and the state of a run that is resumed: the plan of the steps
    fit               the steps: forward, backward, update, evaluation, checkpoints
    finish            the files: adapter, model card, record

A delta is the change that an adapter makes to one layer; a layout says how the processes share the
model (each has it whole, or FSDP divides it). KEPT and RETURNED say whether memory that tensors
leave stays with the process, for the next ones, or goes back to the system.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from rich.console import Console
from torch import nn

from lorafold.files.paths import check_name
from lorafold.runtime.memory import KEPT, RETURNED, freed_blocks
from lorafold.runtime.processes import ALONE, Processes
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.finish import Trained, finish, finished
from lorafold.training.loop import fit
from lorafold.training.progress import Display, started
from lorafold.training.request import RunRequest
from lorafold.training.setup import Setup, adapted_model, check_places, set_up
from lorafold.training.start import in_common, prepare
from lorafold.training_step.adamw import in_words
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.sharding import Sharded


def train(request: RunRequest, console: Console, processes: Processes = ALONE) -> Trained:
    """Train one adapter and write it to `request.out`.

    A run that is to be resumed and is finished is left as it is.

    Args:
        request: What to train, on which rows.
        console: For progress and notices, of the first process alone.
        processes: Those that compute it together, each with this request.

    Raises LorafoldError for anything wrong with the request, and Interrupted (a checkpoint is
    written) after SIGINT or SIGTERM.
    """
    check_name(request.out)
    if (request.over or request.init_adapter) and not request.resume:
        check_places(request)  # a resumed run that is finished already is reported first
    with RunDirectory(request.out).claimed() if processes.first else nullcontext():
        # several processes all ask, as one of them may have been started otherwise
        if request.resume or processes.count > 1:
            before = processes.once(partial(finished, request, console))
            if before is not None:
                return before
        return _train(set_up(request, console, processes), console)


def _train(setup: Setup, console: Console) -> Trained:
    request, recipe, objective = setup.request, setup.request.recipe, setup.objective
    layout, tokenizer = setup.layout, setup.tokenizer

    with layout.reading():
        model, adapter, base_weights = adapted_model(setup, console)

    if recipe.strategy == "fsdp" and not isinstance(layout, Sharded):
        told = "strategy fsdp: one process has all weights; several would divide them"
        console.print(told, highlight=False, soft_wrap=True)
    dividing = divided(layout, model, console) if isinstance(layout, Sharded) else nullcontext()
    with freed_blocks(KEPT), dividing:
        with (
            # first: a policy's sampler copies the model's modules before any of them is fused
            objective.loss(model, tokenizer, recipe.packing, console) as loss,
            fused(model) as fused_parts,
        ):
            console.print(str(fused_parts), highlight=False)
            loss.to(request.base.where)
            with layout.reading():
                # some objectives compare with the untrained model, whose losses join the rows
                feed, held_out = objective.refer(
                    loss, setup.feed, setup.held_out, setup.below, console, layout
                )
                if shared_prefixes := in_common(setup, loss, feed):
                    console.print(shared_prefixes, highlight=False)
                plan, progress = prepare(setup, adapter, loss, feed, held_out, console)

            # the logs of trackers stay when the checkpoints are removed
            logs = request.out.with_name(request.out.name + ".logs")
            reports = recipe.trackers and layout.processes.first
            trackers = started(recipe, logs) if reports else []
            with Display(console, feed.steps, progress.step, trackers) as display:
                fit(plan, progress, display)

        for line in (feed.summary, adapter.spec.report(adapter.own_deltas)):
            if line:
                console.print(line, highlight=False)
        return finish(setup, plan, progress, base_weights)


@contextmanager
def divided(layout: Sharded, model: nn.Module, console: Console) -> Iterator[None]:
    """Divide the model among the processes until the `with` block ends, and say how."""
    # what is whole for a moment must not stay in the process
    with freed_blocks(RETURNED), layout.dividing(model):
        console.print(
            f"strategy fsdp: of {in_words(layout.whole)} of weights process 0 of"
            f" {layout.processes.count} keeps {in_words(layout.kept)}, and at most"
            f" {in_words(layout.largest)} are whole at a time",
            highlight=False,
            soft_wrap=True,
        )
        yield
