"""Writes and verifies the result of a run: the last adapter, the best adapter if an earlier step
was better, and their records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from lorafold.adapter import Adapter
from lorafold.adapter.coverage import unreached
from lorafold.core.attach import base_state
from lorafold.errors import LorafoldError, changes, differing_keys, listed
from lorafold.files.atomic import check_intact, read_object, remove
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.model_card import HELD_OUT, SAMPLES, STEPS, VOCABULARY, training_card
from lorafold.files.record import RECORD, TURNS, current_names
from lorafold.files.templates import render_text
from lorafold.files.terminal import DETAILS, print_lines
from lorafold.identity import of_adapter
from lorafold.models.architecture import auto_class_name
from lorafold.models.weights import FileWeights, InMemory, Weights, check_finite, model_files
from lorafold.peft.adapter_directory import SavedAdapter, open_all
from lorafold.peft.form import format_of
from lorafold.peft.provenance import BASE_IDENTITY, over_record, parse_over
from lorafold.peft.tensors import saved_tensors, sites_of
from lorafold.recipe.fields import METHOD_FIELDS
from lorafold.recipe.recipe import Recipe
from lorafold.runtime.memory import RETURN_FREED, malloc_policy, peak_bytes
from lorafold.training.checkpoint import Progress, RunDirectory
from lorafold.training.inputs import RunRequest, fixed_on_resume, input_identity, objective_of
from lorafold.training.loop import Plan, guessing_warning
from lorafold.training.setup import Setup
from lorafold.training_step.param_groups import UP

NUM_LAST_STEPS = 10  # steps whose mean loss is reported
SKIPPED = "skipped"  # in a record: the steps without an update
GUESSING = "guessing"  # in a record: as in `Trained`
INIT_ADAPTER = "init_adapter"  # in a record: the adapter that the run started from
DEPENDS_ON = "depends_on"  # in a record
NOT_TRAINED = {"resized", "composed", "extracted"}  # in records of adapters that were not trained
MOMENTS = ("exp_avg", "absmax1", "state1")  # optimizers' names for the first moment


@dataclass(frozen=True)
class Trained(ShownInNotebooks):
    """The result of a training run.

    Losses are means in nats over labelled tokens (for a classifier, over texts); `train_loss` is
    the mean of the last ten steps. `adapter` is the directory of the adapter, and `figures` are
    further metrics of the held-out rows, such as the accuracy of preferences. `frozen` contains the
    shares of parameters that the adapter does not reach, by kind: `blocks` are shares of the
    parameters of the transformer blocks, and `beside` (encoders and connectors of a multimodal
    model) are shares of all parameters. `files` contains the number of rows of each file of a
    directory or glob pattern. `data` contains problems in the rows, such as duplicates. `skipped`
    lists the steps without an update, because their loss or gradient was not finite. `pace`
    contains the tokens and seconds of sampling, rewards and training in reinforcement learning.
    `guessing` contains the run's `loss`, the loss of guessing or of the untrained model
    (`guessing`), and whether the first is `better`.

    If a finished run is resumed, the result comes from the adapter's record, without times (nan),
    memory, parameter counts (None), `frozen`, `data` and `pace` (empty).
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
        warning = guessing_warning(self.guessing)
        return render_text(
            "training/trained.jinja", trained=self, last=NUM_LAST_STEPS, warning=warning
        )


def finish(setup: Setup, plan: Plan, progress: Progress, base: Weights | None) -> Trained:
    """Writes the last adapter to `request.out`, and the adapter of an earlier, better step to
    `<out>.best`. With early stopping or after an early end, only the better adapter is written, to
    `request.out`. Verifies the files and removes the checkpoints. Only rank 0 writes. `base` has
    the original weights of a quantized model.
    """
    request, adapter, processes = setup.request, plan.adapter, plan.layout.processes
    if plan.layout.is_sharded:
        if adapter.spec.trains_base:
            plan.optimizer.state.clear()  # frees memory for writing
        else:
            base = base or request.base.in_files()
        if base is None:
            plan.layout.gather_to_first()
    better = progress.best if progress.best != progress.step else None  # an earlier step
    ended_early = request.recipe.stops or progress.step < plan.feed.steps
    saved_step = better if better is not None and ended_early else progress.step
    peaks = [n for n in processes.gather(peak_bytes(plan.device)) if n is not None]
    result = Trained(
        train_loss=mean_of_last(progress.losses),
        eval_loss=progress.evals.get(saved_step),
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        peak_bytes=max(peaks, default=None),
        trainable_parameters=sum(p.numel() for p in adapter.parameters()),
        steps=progress.step,
        seconds=progress.seconds,
        adapter=str(request.out),
        losses=progress.losses,
        figures=progress.measured.get(saved_step, {}),
        frozen=unreached(adapter.model, adapter.sites).as_json(),
        files=request.data.record.get("files", {}),
        data=setup.findings.as_json(),
        skipped=progress.skipped,
        pace=progress.pace,
        guessing=progress.guessing,
    )
    if not processes.first:
        processes.gather(None)
        return result
    check_learned(adapter, plan.optimizer)
    plan.optimizer.state.clear()  # frees memory for writing and verifying
    record, run = record_of(setup, plan, progress), plan.run
    write = partial(write_adapter, setup, plan, progress, result, base)
    with malloc_policy(RETURN_FREED):
        if saved_step == progress.step:
            write(request.out, record)
        if better is not None:
            _, tensors, _ = run.load(run.checkpoints()[better])
            adapter.load_state_dict(tensors)
            write(request.out if saved_step == better else run.best, record | {"step": better})
    if better is None or saved_step == better:
        remove(run.best)  # from an earlier run
    remove(run.path)
    processes.gather(None)
    return result


def record_of(setup: Setup, plan: Plan, progress: Progress) -> dict[str, Any]:
    """The adapter's record. It contains no times, so that a resumed run writes the same record."""
    request, files, vocabulary_size = setup.request, setup.files, plan.adapter.vocabulary
    steps = sorted(progress.evals)
    names = dict.fromkeys(name for of_step in progress.measured.values() for name in of_step)
    held_out = {
        name: [_rounded(progress.measured.get(step, {}).get(name)) for step in steps]
        for name in names
    }
    details = kept.lines if (kept := DETAILS.get()) else ()
    figures = {
        STEPS: {name: [*map(_rounded, values)] for name, values in progress.shown.items()},
        HELD_OUT: {"step": steps, **held_out} if held_out else {},
        SAMPLES: progress.samples,
        # the reason for the optimizer is another one after a resume
        DETAILS.name: [line for line in details if not line.startswith("optimizer: ")],
    }
    return {
        "recipe": request.recipe.model_dump(mode="json"),
        "losses": [loss if math.isfinite(loss) else None for loss in progress.losses],
        **({SKIPPED: progress.skipped} if progress.skipped else {}),
        "evals": progress.evals,
        **{name: values for name, values in figures.items() if values},
        "data": {"source": request.source, **request.data.record},
        **({TURNS: setup.findings.turns} if setup.findings.turns else {}),
        GUESSING: progress.guessing,
        **setup.objective.record(),
        **({"new_tokens": setup.added_tokens.ids} if setup.added_tokens.ids else {}),
        **({INIT_ADAPTER: files[INIT_ADAPTER]} if INIT_ADAPTER in files else {}),
        DEPENDS_ON: input_identity(request, setup.objective),
        **(over_record(over) if (over := plan.adapter.over) else {}),
        **({} if vocabulary_size is None else {VOCABULARY: vocabulary_size}),
    }


def write_adapter(
    setup: Setup, plan: Plan, progress: Progress, result: Trained, base: Weights | None,
    path: Path, record: dict[str, Any],
) -> None:  # fmt: skip
    request, adapter, spec = setup.request, plan.adapter, plan.adapter.spec
    step = record.get("step", progress.step)
    if figures := progress.measured.get(step):
        record = record | {"figures": figures}
    targets = adapter.matches.paths
    # in the card, fields that are None show the value that the run used
    used = {name: getattr(spec, name, None) for name in (*METHOD_FIELDS, "targets")}
    names = {"": "lr", UP: "lr_b"}
    groups = plan.optimizer.param_groups
    used |= {names[group["of"]]: group["peak"] for group in groups if group["of"] in names}
    recipe = {k: used.get(k) if v in (None, {}) else v for k, v in record["recipe"].items()}
    card = training_card(
        request.base.name,
        record | {"recipe": recipe},
        asdict(result) | result.pace | {"eval_loss": progress.evals.get(step)},
        whole=spec.trains_base,
        opened_by=auto_class_name(adapter.model),
        in_peft=not spec.trains_base and format_of(adapter.model, spec, targets).in_peft,
    )
    adapter.save(
        path,
        overwrite=request.overwrite or request.resume,
        card=card,
        record=record,
        tokenizer=setup.tokenizer if setup.own_tokenizer or spec.trains_base else None,
        base=base,
    )
    compare_with_files(adapter, path, base)


def mean_of_last(losses: Sequence[float]) -> float:
    """The mean of the finite losses of the last ten steps, in nats."""
    tail = [loss for loss in losses[-NUM_LAST_STEPS:] if math.isfinite(loss)] or [math.nan]
    return sum(tail) / len(tail)


def _rounded(value: Any) -> Any:
    """A number, or an interval, with six digits; None for anything else."""
    if isinstance(value, list | tuple):
        return [*map(_rounded, value)] if len(value) == 2 else None
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if isinstance(value, int) else None


def check_learned(adapter: Adapter, optimizer: Optimizer) -> None:
    """Raises if a tensor is not finite, or if an up factor that had gradients is zero, so that the
    adapter has no effect.
    """
    for name, t in adapter.state_dict().items():
        check_finite(name, t)
    zero_paths = [
        path
        for path, part in adapter.parts()
        for name in part.up_names
        if not (up := part.get_parameter(name)).any() and _had_gradients(optimizer, up)
    ]
    if zero_paths:
        raise LorafoldError(
            f"nothing was written: {len(zero_paths)} modules have an up factor (LoRA's B) that is"
            f" zero after training, although it had gradients: {listed(zero_paths, max_chars=80)};"
            " try a higher learning rate (lr, lr_b)"
        )


def compare_with_files(adapter: Adapter, path: Path, base: Weights | None) -> None:
    """Raises if the files that were just written differ from the adapter in memory."""
    model = adapter.model
    if adapter.spec.trains_base:  # a full model, in whose files some tensors have other names
        written, state = FileWeights(model_files(path)), base_state(model)
        shared = state.keys() & {*written.names}
        different = [key for key in shared if not written.get(key).equal(state[key].cpu())]
    else:
        base = base or InMemory.of_model(model)
        saved = SavedAdapter.open(path).for_model(model)
        if saved.selection.tokens:
            _, saved = saved.token_rows(model, base)
        parts = {site: [*delta.parts()] for site, delta in adapter.deltas.items()}
        targets, names = adapter.matches.paths, set(saved.weights.names)
        different = [*set(targets).symmetric_difference(saved.targets(model).paths)]
        for key, piece in saved_tensors(sites_of(model, parts, targets, base)).items():
            if key not in names or not saved.weights.get(key).equal(piece.encoded().cpu()):
                different.append(key)
    if different:
        raise LorafoldError(
            f"{path}: the written files differ from the trained values in"
            f" {listed(different, max_chars=120)}; the checkpoints of the run are kept"
        )


def _had_gradients(optimizer: Optimizer, p: Tensor) -> bool:
    state = optimizer.state.get(p, {})
    moment = next((state[name] for name in MOMENTS if name in state), None)
    return moment is not None and bool(moment.any())


def finished_result(request: RunRequest, console: Console) -> Trained | None:
    """The recorded result if the run to resume is already finished, for example because a cluster
    restarted its job; otherwise None. Raises if another run wrote the adapter.
    """
    out, starts_anew = request.out, request.overwrite or not request.resume
    if starts_anew or RunDirectory(out).path.exists() or not (out / RECORD).is_file():
        return None
    check_intact(out, [RECORD])
    record = read_object(out / RECORD)
    trained = isinstance(record.get("recipe"), dict) and record.get("losses")
    if NOT_TRAINED & record.keys() or not trained:
        raise LorafoldError(
            f"{out}: --resume: found an adapter that was not written by a training run, expected a"
            " stopped run; choose another --out, or replace the adapter with --overwrite"
        )
    if differences := list(_differences(request, record)):
        raise LorafoldError(
            f"nothing to resume: {out} is finished, and this run differs:"
            f" {listed(differences, '; ')}; choose another --out, or replace the adapter with"
            " --overwrite"
        )
    print_lines(console, f"nothing to resume: {out} is finished")
    return _recorded_result(record, out)


def _differences(request: RunRequest, record: Mapping[str, Any]) -> Iterator[str]:
    old_fields = Recipe().model_dump(mode="json") | current_names(record["recipe"])
    recipe = request.recipe
    # the run chooses these if they are not set
    ignored = {"storage", "max_length", "packing"} - recipe.model_fields_set
    ignored |= {"storage"} if recipe.storage == "auto" else set()
    old, new = (
        {k: v for k, v in fixed_on_resume(recipe, fields).items() if k not in ignored}
        for fields in (old_fields, recipe.model_dump(mode="json"))
    )
    yield from changes({k: old[k] for k in new}, new)
    base = record.get(BASE_IDENTITY)  # absent from earlier versions' records
    if base and base != request.base.identity:
        yield "the model has changed"
    old_data, data = record.get("data", {}), request.data.record
    if any(old_data.get(key) != data[key] for key in ("sha256", "streamed") if key in data):
        yield "the rows have changed"
    below = [origin.sha256 for origin in parse_over(record)]
    if below != [one.sha256 for one in open_all(request.over)]:
        yield "the adapters of --over have changed"
    if DEPENDS_ON in record:  # absent from earlier versions' records
        inputs = input_identity(request, objective_of(request, open_all(request.adapters)))
        yield from (f"{name} has changed" for name in differing_keys(inputs, record[DEPENDS_ON]))
    init_adapter = request.init_adapter and of_adapter(SavedAdapter.open(request.init_adapter))
    if record.get(INIT_ADAPTER, {}).get("sha256") != init_adapter:
        yield "the adapter of --init-adapter has changed"


def _recorded_result(record: Mapping[str, Any], out: Path) -> Trained:
    losses = [math.nan if loss is None else loss for loss in record["losses"]]
    return Trained(
        train_loss=mean_of_last(losses),
        eval_loss=record.get("evals", {}).get(str(record.get("step", len(losses)))),
        tokens_per_second=math.nan,
        peak_bytes=None,
        trainable_parameters=None,
        steps=len(losses),
        seconds=math.nan,
        adapter=str(out),
        losses=losses,
        figures=record.get("figures", {}),
        files=record.get("data", {}).get("files", {}),
        skipped=record.get(SKIPPED, []),
        guessing=record.get(GUESSING, {}),
    )
