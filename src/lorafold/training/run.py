"""One training run: from a model, data and a recipe to an adapter directory in PEFT's format.

    set_up          what needs no model: checks, device, storage, tokenizer, examples
    adapted_model   the model and its adapter, once the memory of a step is estimated
    prepare         the optimizer, and the state of a run that is resumed
    fit             the steps
    finish          the files
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial

from rich.console import Console

from lorafold.adapter.reach import strays, text_alone
from lorafold.files.paths import check_name
from lorafold.machine.memory import freed_blocks_kept
from lorafold.machine.processes import ALONE, Processes
from lorafold.objectives import OBJECTIVES
from lorafold.peft.provenance import BASE_IDENTITY
from lorafold.step.activations import recompute
from lorafold.step.fused import fused
from lorafold.training.agreement import check_alike
from lorafold.training.checkpoint import RunDirectory
from lorafold.training.display import Display
from lorafold.training.dividing import check_dividable, divided, layout_of
from lorafold.training.finish import INIT_ADAPTER, Trained, finish
from lorafold.training.finished import DEPENDS_ON, finished
from lorafold.training.loop import fit
from lorafold.training.request import Request
from lorafold.training.setup import Setup, adapted_model, check_places, set_up
from lorafold.training.start import depends_on, in_common, prepare
from lorafold.training.tracking import tracking


def train(request: Request, console: Console, processes: Processes = ALONE) -> Trained:
    """Train one adapter and write it to `request.out`.

    A run that is to be resumed and is finished is left as it is.

    Args:
        request: What to train, on which rows.
        console: For progress and notices, of the first process alone.
        processes: Those that compute it together, each with this request.

    Raises LorafoldError for anything wrong with the request, and Interrupted (a checkpoint is
    written) after SIGINT or SIGTERM.
    """
    console = processes.voice(console)
    check_name(request.out)
    if not request.resume:  # of a run that is finished, that is told first
        check_places(request)
    with RunDirectory(request.out).claimed() if processes.first else nullcontext():
        if (before := processes.once(partial(finished, request, console))) is not None:
            return before
        setup = set_up(request, console, processes)
        check_dividable(setup.request.recipe, setup.objective)
        check_alike(setup)
        return _trained(setup, console)


def _trained(setup: Setup, console: Console) -> Trained:
    request, processes = setup.request, setup.processes
    layout = layout_of(request.recipe, processes)
    with ExitStack() as until_written:
        reading = until_written.enter_context(ExitStack())
        reading.enter_context(layout.reading())
        model, adapter, weights, checkpointing = adapted_model(setup, console, layout)
        for line in (
            text_alone(model, adapter.sites),
            repr(adapter),
            f"  {adapter.unreached}",
            strays(model, adapter.matches),
        ):
            if line is not None:
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        if checkpointing:
            recompute(model)
        tokenizer, packing = setup.tokenizer, request.recipe.packing
        stack = until_written.enter_context(ExitStack())
        stack.enter_context(freed_blocks_kept())
        if parted := until_written.enter_context(divided(layout, model, request.recipe)):
            console.print(parted, highlight=False, soft_wrap=True)
        # what draws completions has modules of its own, which nothing is fused in yet
        loss = stack.enter_context(setup.objective.loss(model, tokenizer, packing, console))
        console.print(str(stack.enter_context(fused(model))), highlight=False)
        loss.to(request.base.where)
        feed, held_out = setup.objective.refer(
            loss, setup.feed, setup.held_out, setup.below, console, layout
        )
        if told := in_common(loss, feed, request.recipe):
            console.print(told, highlight=False)
        measure = partial(setup.objective.measure, loss, held_out) if held_out else None
        job, progress = prepare(setup, adapter, loss, feed, measure, console, layout)
        job.examples = partial(setup.objective.examples, loss=loss)
        job.updates = setup.objective.updates
        job.guessing = setup.objective.guessing(setup.findings.labels)
        if OBJECTIVES[request.recipe.objective].draws:
            job.measures_before, drawn = True, job.examples
            # whoever judges completions may judge them otherwise elsewhere
            job.examples = lambda *of: processes.once(partial(drawn, *of))
        names = request.recipe.trackers if processes.first else ()
        # the logs of trackers stay when the checkpoints are removed
        logs = request.out.with_name(request.out.name + ".logs")
        job.tracking = stack.enter_context(tracking(names, logs, request.recipe.model_dump()))
        reading.close()
        with Display(console, job.steps, progress.step) as display:
            fit(job, progress, display)
        stack.close()
        if told := str(setup.feed):
            console.print(told, highlight=False)
        if report := adapter.spec.report(adapter.own_deltas):
            console.print(report, highlight=False)
        saved = tokenizer if setup.own_tokenizer or adapter.spec.trains_base else None
        ids = setup.words.ids
        about = setup.objective.record() | ({"new_tokens": ids} if ids else {})
        if INIT_ADAPTER in setup.files:
            about[INIT_ADAPTER] = setup.files[INIT_ADAPTER]
        about[DEPENDS_ON] = depends_on(request, setup.objective)
        about[BASE_IDENTITY] = setup.files["model"]["sha256"]
        if job.layout.divides:
            if adapter.spec.trains_base:
                job.optimizer.state.clear()  # to make room for what is written
            else:
                weights = weights or request.base.in_files()
            if weights is None:
                job.layout.gather_to_first()
        return finish(setup.request, job, progress, saved, about, weights, setup.findings)
