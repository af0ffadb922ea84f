"""Measures one cell of a comparison: a method with its settings is trained, evaluated and timed.

    quality      held-out loss and exact match; for a policy the reward
    forgetting   KL(base || tuned) and the increase of the loss on text outside the task, both in
                 nats per token
    latency      of prefill and decode at batch 1, relative to the base: medians over rounds, each
                 of which times base, attached and merged model
    mergeable    whether the logits in fp32 are the same after merging

`variants(recipe, ["lora", "ia3"], {"rank": [8, 16], "lr": [1e-4, 2e-4]})` returns four variants of
lora, and two of ia3, which has no rank.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from lorafold.adapter import Adapter, load
from lorafold.data.chat_template import with_date
from lorafold.data.examples import probe_ids
from lorafold.data.json_input import Row
from lorafold.errors import LorafoldError, NotMergeable, listed
from lorafold.evaluation import Evaluation, RewardEvaluation
from lorafold.evaluation.intervals import Interval
from lorafold.layers import parameter_count
from lorafold.methods import known_options
from lorafold.peft.adapter_directory import SavedAdapter
from lorafold.peft.config import CONFIG
from lorafold.recipe.fields import METHOD_FIELDS, TRAINING_FIELDS
from lorafold.recipe.parsing import load_recipe
from lorafold.recipe.recipe import Recipe
from lorafold.recipe.resolve_settings import resolve_storage, spec_of, with_method
from lorafold.resolve import Base
from lorafold.training.inputs import RunRequest, objective_of, prepare_tokenizer
from lorafold.training.run import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Vary = Mapping[str, Sequence[Any]]  # values by field, or by entry, as in options.init


@dataclass(frozen=True)
class Variant:
    """A method with the settings that differ from the common recipe."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        named = (
            f"{name.removeprefix('options.')}={short_value(v)}" for name, v in self.settings.items()
        )
        return " ".join((self.method, *named))

    def of(self, recipe: Recipe) -> Recipe:
        try:
            pairs = [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in self.settings.items()]
            return load_recipe(None, pairs, recipe)
        except TypeError as error:
            raise LorafoldError(f"vary: {error}, expected numbers, texts or lists") from None
        except LorafoldError as error:
            message = str(error).removeprefix("recipe: ").replace(" (from --set)", "")
            raise LorafoldError(f"vary: {message.removeprefix('--set ')}") from None


def variants(recipe: Recipe, methods: Sequence[str], vary: Vary) -> list[Variant]:
    """The methods in order, each with all combinations of the settings that it supports."""
    vary = checked(vary)
    if "epochs" in vary and ("steps" in vary or recipe.steps is not None):
        raise LorafoldError(
            "vary: found epochs and steps, which both set the length of a run; use only one of them"
        )
    result = []
    for method in methods:
        fitted = []
        for values in product(*vary.values()):
            settings = dict(zip(vary, values, strict=True))
            changed = Variant(method, settings).of(recipe)
            fitted_recipe = with_method(changed, method)
            absent = {*METHOD_FIELDS}.difference(known_options(method, changed.options.get("over")))
            applicable = {
                name: value
                for name, value in settings.items()
                if name.partition(".")[0] not in absent
                and field_value(fitted_recipe, name) == field_value(changed, name)
            }
            variant = Variant(method, applicable)
            if (dumped := with_method(variant.of(recipe), method).model_dump()) not in fitted:
                fitted.append(dumped)
                result.append(variant)
    if unknown := [name for name in vary if not any(name in one.settings for one in result)]:
        raise LorafoldError(
            f"vary: found {listed(unknown)}, expected settings of the methods {', '.join(methods)}"
        )
    names = [str(fitted_recipe) for fitted_recipe in result]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise LorafoldError(
            f"methods, vary: found {listed(twice)} more than once; remove duplicate methods and"
            " values"
        )
    return result


def checked(vary: Vary) -> dict[str, list[Any]]:
    """Checks a sweep: only recipe fields that affect training can vary, each over a list."""
    values_by_field = {}
    for name, values in vary.items():
        if (field := name.partition(".")[0]) not in TRAINING_FIELDS:
            hint = {"method": "; use methods", "seed": "; use seeds"}.get(field)
            raise LorafoldError(
                f"vary: found {name}, expected a field that changes training and not the"
                f" evaluation: {', '.join(sorted(TRAINING_FIELDS))}{hint or ''}"
            )
        is_list = isinstance(values, Iterable) and not isinstance(values, str | Mapping)
        values_by_field[name] = [*values] if is_list else []
        if not values_by_field[name]:
            raise LorafoldError(f"vary: {name}: found {values!r:.80}, expected a list of values")
    return values_by_field


def field_value(recipe: Recipe, name: str) -> Any:
    """The value of a recipe field, or of an entry such as options.init."""
    field, _, entry = name.partition(".")
    value = getattr(recipe, field)
    return value.get(entry) if entry else value


def short_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(short_value, value))
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(float(value))
    return str(value)


# tokens prefilled, tokens decoded, rounds; many short alternating timings are robust to noise
PREFILLED, DECODED, NUM_ROUNDS = 128, 8, 7


class Latency(NamedTuple):
    """Seconds, or ratios to the latencies of the base; `decode` is None for a classifier."""

    prefill: float
    decode: float | None


def latencies(
    base: PreTrainedModel, tuned: PreTrainedModel, merged: PreTrainedModel | None, new: int
) -> tuple[Latency, Latency | None]:
    models = [m for m in (base, tuned, merged) if m is not None]
    for model in models:
        time_model(model, new)  # the first calls are slower
    rounds = [[time_model(model, new) for model in models] for _ in range(NUM_ROUNDS)]

    def over_base(i: int) -> Latency:
        prefill = statistics.median(times[i].prefill / times[0].prefill for times in rounds)
        decode: Any = [(times[i].decode, times[0].decode) for times in rounds]
        return Latency(prefill, statistics.median(a / b for a, b in decode) if new else None)

    return over_base(1), over_base(2) if merged is not None else None


@torch.no_grad()
def time_model(model: PreTrainedModel, new: int) -> Latency:
    """Seconds to prefill PREFILLED tokens and to decode `new` tokens, at batch 1."""
    ids = torch.arange(100, 100 + PREFILLED, device=model.device)[None]
    output, prefill = time_call(lambda: model(ids, use_cache=new > 0), model.device)

    def decode() -> None:
        for _ in range(new):
            model(ids[:, -1:], cache=output.cache, use_cache=True)

    return Latency(prefill, time_call(decode, model.device)[1] if new else None)


def time_call(do: Callable, device: torch.device) -> tuple:
    """(result of `do`, seconds), synchronized with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


# relative error of logits up to which two models count as equal: far above fp32 rounding of some
# dozen layers, and far below the effect of an adapter
MAX_RELATIVE_ERROR = 1e-4
BASE = "base"  # the row of the base model


@dataclass(frozen=True)
class Measurement:
    """The metrics of one method and seed; metrics that do not apply are None.

    `trainable_share` and latencies are relative to the base model, losses are in nats per token,
    times in seconds, sizes in bytes. On text outside the task, `forgetting_kl` is KL(base ||
    tuned), and `forgetting_loss` the increase of the loss. `row_losses` has (summed loss, tokens)
    of each held-out row. For a policy, `reward` is the mean total reward, `rewards` has the mean of
    each reward by name, and `prompt_rewards` the mean reward of each prompt. In a sweep,
    `validation` is the loss or reward on the rows that select the best setting.
    """

    method: str
    seed: int
    trainable_parameters: int | None = None
    trainable_share: float | None = None
    adapter_bytes: int | None = None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    train_seconds: float | None = None
    loss: float | None = None
    loss_interval: Interval | None = None
    row_losses: tuple[tuple[float, int], ...] = ()
    exact_match: float | None = None
    exact_match_interval: Interval | None = None
    reward: float | None = None
    reward_interval: Interval | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    prompt_rewards: tuple[float, ...] = ()
    tokens_a_completion: float | None = None
    cut_off: float | None = None
    entropy: float | None = None
    forgetting_kl: float | None = None
    forgetting_loss: float | None = None
    latency_attached: float | None = None
    prefill_attached: float | None = None
    latency_merged: float | None = None
    prefill_merged: float | None = None
    mergeable: bool | None = None
    modifies_architecture: bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    validation: float | None = None
    validation_rows: int = 0

    @property
    def name(self) -> str:
        """The method with its settings, as in `lora rank=8 lr=0.0001`."""
        return str(Variant(self.method, self.settings))

    @property
    def adapter_megabytes(self) -> float | None:
        """The size of the adapter's files in MB."""
        return self.adapter_bytes and self.adapter_bytes / 1e6

    @property
    def peak_gigabytes(self) -> float | None:
        """The peak memory of training in GB."""
        return self.peak_bytes and self.peak_bytes / 1e9

    def __str__(self) -> str:
        figure, value = ("reward", self.reward) if self.loss is None else ("loss", self.loss)
        trained = self.train_seconds
        seconds = "" if trained is None else f", {trained:.0f} s of training"
        return f"{self.name}: {figure} {value:.4f}{seconds}"


Measurements = Sequence[Measurement]


def eval_figures(evaluation: Evaluation | RewardEvaluation) -> dict[str, Any]:
    names = Measurement.__dataclass_fields__
    figures = {name: value for name, value in vars(evaluation).items() if name in names}
    if isinstance(evaluation, Evaluation):
        return figures | {"row_losses": evaluation.losses}
    return figures | {"rewards": {name: one.mean for name, one in evaluation.rewards.items()}}


@dataclass(frozen=True)
class ComparisonTask:
    """The inputs that all methods share: model, data, and the recipe without its method."""

    base: Base
    rows: Sequence[Row]
    held_out: Sequence[Row]
    source: str
    recipe: Recipe

    @cached_property
    def day(self) -> str:
        """The date for chat templates that print it, fixed for all measurements; otherwise ""."""
        return self.base.date(self.recipe.chat_template)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Inputs of the objective besides recipe, rows and model, such as files of rewards."""
        return dict(objective_of(self.request(Path(), self.recipe)).identity)

    def request(self, out: Path, recipe: Recipe) -> RunRequest:
        return RunRequest(self.base, out, recipe, self.rows, self.source, day=self.day)


def measure(task: ComparisonTask, method: str, seed: int) -> Measurement:
    recipe = recipe_of(task.recipe, method).model_copy(update={"seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        request = task.request(Path(folder) / "adapter", recipe)
        storage = resolve_storage(recipe, spec_of(recipe), task.base)
        if method == BASE:
            models = ComparedModels(request, task.base.stored(storage))
            return Measurement(BASE, seed, **eval_figures(models.evaluation(models.base(), task)))
        trained = train(request, Console(quiet=True))
        models = ComparedModels(request, task.base.stored(storage))
        base, (tuned, adapter) = models.base(), models.tuned()
        figures = eval_figures(models.evaluation(tuned, task))
        generates = base.get_output_embeddings() is not None  # not a classifier
        kl = change = None
        if generates:
            kl, change = forgetting(base, tuned, probe_ids(models.tokenizer, None))
        merged = verified_merge(models)
        attached_ratio, merged_ratio = latencies(base, tuned, merged, DECODED if generates else 0)
        size = sum(f.stat().st_size for f in request.out.rglob("*.safetensors"))
    count = trained.trainable_parameters
    return Measurement(
        method=method,
        seed=seed,
        trainable_parameters=count,
        trainable_share=count / parameter_count(base) if count is not None else None,
        adapter_bytes=size,
        tokens_per_second=trained.tokens_per_second,
        peak_bytes=trained.peak_bytes,
        train_seconds=trained.seconds,
        **figures,
        forgetting_kl=kl,
        forgetting_loss=change,
        latency_attached=attached_ratio.decode,
        prefill_attached=attached_ratio.prefill,
        latency_merged=merged_ratio and merged_ratio.decode,
        prefill_merged=merged_ratio and merged_ratio.prefill,
        mergeable=merged is not None,
        modifies_architecture=adapter is not None and adapter.spec.modifies_architecture,
    )


def recipe_of(recipe: Recipe, method: str) -> Recipe:
    """The recipe of a method; for the untrained base, the default method's recipe."""
    return with_method(recipe, Recipe().method if method == BASE else method)


class ComparedModels:
    """Loads the base of a measurement and the model trained on it, one per call."""

    def __init__(self, request: RunRequest, bare: Base) -> None:
        self.objective, self.seed = objective_of(request), request.recipe.seed
        self.bare, self.whole = bare, replace(bare, model=request.out, revision=None)
        self.saved = SavedAdapter.open(request.out) if (request.out / CONFIG).is_file() else None
        if not request.out.exists():
            tokenizer, _ = prepare_tokenizer(request, self.objective, Console(quiet=True))
        else:
            tokenizer = bare.tokenizer([self.saved]) if self.saved else self.whole.tokenizer()
            self.objective.set_up(tokenizer)
        self.tokenizer = with_date(tokenizer, request.day)
        self.length = request.recipe.max_length

    def evaluation(
        self, model: PreTrainedModel, task: ComparisonTask
    ) -> Evaluation | RewardEvaluation:
        """Evaluates one of the two models; may be called only once."""
        return self.objective.evaluate(model, self.tokenizer, task.held_out, self.length)

    def base(self, in_fp32: bool = False) -> PreTrainedModel:
        return self.objective.load(
            replace(self.bare, dtype="fp32" if in_fp32 else None), self.tokenizer, self.seed
        )

    def tuned(self, in_fp32: bool = False) -> tuple[PreTrainedModel, Adapter | None]:
        """(base with its adapter, adapter), or (trained model, None) after full training."""
        if self.saved is None:
            full_model = replace(self.whole, dtype="fp32" if in_fp32 else None)
            return self.objective.load(full_model, self.tokenizer), None
        tuned = self.base(in_fp32)
        return tuned, load(tuned, self.saved, base=self.bare.weights())


def verified_merge(models: ComparedModels) -> PreTrainedModel | None:
    """The merged model; None if the adapter can't be merged or the fp32 logits change."""
    tuned, adapter = models.tuned(in_fp32=True)
    ids = torch.arange(100, 164, device=models.bare.where)[None]
    with torch.no_grad():
        before = tuned(ids).logits
        try:
            if adapter is not None:
                adapter.merge(untie_weights=True)
        except NotMergeable:
            return None
        after = tuned(ids).logits
    nn.Module.to(tuned, models.bare.loaded_as.dtype)
    return tuned if (after - before).norm() <= MAX_RELATIVE_ERROR * before.norm() else None


@torch.no_grad()
def forgetting(
    base: nn.Module, tuned: nn.Module, texts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """(KL(base || tuned), loss(tuned) - loss(base)), averaged over all tokens, in nats."""
    kl = change = tokens = 0.0
    for text in texts:
        ids = torch.tensor([text], device=next(base.parameters()).device)
        p, q = (model(ids).logits[0, :-1].float().log_softmax(-1) for model in (base, tuned))
        kl += (p.exp() * (p - q)).sum().item()
        target = ids[0, 1:, None]
        change += (p.gather(1, target) - q.gather(1, target)).sum().item()
        tokens += len(target)
    return kl / tokens, change / tokens
