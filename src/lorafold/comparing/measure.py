"""One line of the comparison: a method is trained, evaluated and timed.

    quality      held-out loss and exact match
    forgetting   KL(base || tuned) and the increase of the loss on text outside the task, both in
                 nats a token
    latency      of prefill and decode at batch 1, as a ratio to the base's: medians over rounds in
                 which base, attached and merged model are timed in turn
    mergeable    proved: folded in fp32, the model has the logits of the attached one

A classifier has neither decode nor forgetting. The caller runs each measurement in a process of its
own (`comparing.run`), so that peak memory is that of one method.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from lorafold.adapter import Adapter, load
from lorafold.bases import parameter_count
from lorafold.data.probes import probe_ids
from lorafold.data.sources import Row
from lorafold.data.template_forms import on_day
from lorafold.errors import NotMergeable
from lorafold.evaluation import Interval, evaluate
from lorafold.opening import Base
from lorafold.peft.config import CONFIG
from lorafold.peft.saved import Saved
from lorafold.recipe.fitting import fitting, settled_base, spec_of
from lorafold.recipe.recipe import Recipe
from lorafold.training.grounds import day_written
from lorafold.training.request import Request, objective_of
from lorafold.training.run import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# tokens prefilled, tokens decoded, rounds: many short timings in turn are robust to a noisy machine
PROMPT, NEW, ROUNDS = 128, 8, 11
# the relative error of logits at which two models count as equal: in fp32 far above the rounding of
# some dozen layers, and far below the effect of an adapter
EXACT = 1e-4


@dataclass(frozen=True)
class Measurement:
    """The figures of one method and seed. `trainable_share` is relative to the base's parameters,
    latencies are ratios to the base's, losses are in nats; None where there is nothing to measure.
    """

    method: str
    seed: int
    trainable_parameters: int
    trainable_share: float
    adapter_bytes: int
    tokens_per_second: float
    peak_bytes: int
    train_seconds: float
    loss: float
    exact_match: float | None
    exact_match_interval: Interval | None
    forgetting_kl: float | None
    forgetting_loss: float | None
    latency_attached: float | None
    prefill_attached: float
    latency_merged: float | None
    prefill_merged: float | None
    mergeable: bool
    modifies_architecture: bool


@dataclass(frozen=True)
class Task:
    """What all methods have in common: model, data, and a recipe but for its method."""

    base: Base
    rows: Sequence[Row]
    held_out: Sequence[Row]
    source: str
    recipe: Recipe

    @cached_property
    def day(self) -> str:
        """What a chat template that asks for the date writes in all measurements; else empty."""
        return day_written(self.base, self.recipe.chat_template)


def measure(task: Task, method: str, seed: int) -> Measurement:
    """Train one method and measure it.

    Args:
        task: Model, data and recipe.
        method: The name of the method.
        seed: The seed of the run.

    Raises LorafoldError as `train`.
    """
    recipe = fitting(task.recipe, method).model_copy(update={"seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        request = Request(task.base, out, recipe, task.rows, task.source, day=task.day)
        chosen = task.base.stored(settled_base(recipe, spec_of(recipe), task.base.source))
        trained = train(request, Console(quiet=True))
        models = Models(request, chosen)
        base, (tuned, adapter) = models.base(), models.tuned()
        found = evaluate(tuned, models.tokenizer, task.held_out, recipe.max_length)
        generates = base.get_output_embeddings() is not None  # a classifier does not
        kl, change = (
            forgetting(base, tuned, probe_ids(models.tokenizer, None))
            if generates
            else (None, None)
        )
        merged = merge_proved(models)
        attached_ratio, merged_ratio = latencies(base, tuned, merged, NEW if generates else 0)
        size = sum(f.stat().st_size for f in request.out.rglob("*.safetensors"))
    count = parameter_count(base)
    return Measurement(
        method=method,
        seed=seed,
        trainable_parameters=trained.trainable_parameters,
        trainable_share=trained.trainable_parameters / count,
        adapter_bytes=size,
        tokens_per_second=trained.tokens_per_second,
        peak_bytes=trained.peak_bytes,
        train_seconds=trained.seconds,
        loss=found.loss,
        exact_match=found.exact_match,
        exact_match_interval=found.exact_match_interval,
        forgetting_kl=kl,
        forgetting_loss=change,
        latency_attached=attached_ratio.decode,
        prefill_attached=attached_ratio.prefill,
        latency_merged=merged_ratio and merged_ratio.decode,
        prefill_merged=merged_ratio and merged_ratio.prefill,
        mergeable=merged is not None,
        modifies_architecture=adapter is not None and adapter.spec.modifies_architecture,
    )


class Models:
    """The models of one measurement: the base, and what was trained on it. Each call loads one."""

    def __init__(self, request: Request, bare: Base) -> None:
        self.objective, self.seed = objective_of(request), request.recipe.seed
        self.bare, self.whole = bare, replace(bare, model=request.out, revision=None)
        self.saved = Saved.open(request.out) if (request.out / CONFIG).is_file() else None
        tokenizer = bare.tokenizer([self.saved]) if self.saved else self.whole.tokenizer()
        self.objective.set_up(tokenizer)
        self.tokenizer = on_day(tokenizer, request.day)

    def base(self, in_fp32: bool = False) -> PreTrainedModel:
        """The base."""
        base = replace(self.bare, in_fp32=in_fp32)
        return self.objective.load(base, self.tokenizer, self.seed)

    def tuned(self, in_fp32: bool = False) -> tuple[PreTrainedModel, Adapter | None]:
        """The base with its adapter, or the whole model and None where the run trained that."""
        if self.saved is None:
            whole = replace(self.whole, in_fp32=in_fp32)
            return self.objective.load(whole, self.tokenizer), None
        tuned = self.base(in_fp32)
        return tuned, load(tuned, self.saved, base=self.bare.weights())


def merge_proved(models: Models) -> PreTrainedModel | None:
    """The merged model in the dtype of the base, or None where the adapter can't be folded or the
    merged logits differ from those of the attached model in fp32.
    """
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
    nn.Module.to(tuned, models.bare.held.dtype)
    return tuned if (after - before).norm() <= EXACT * before.norm() else None


@torch.no_grad()
def forgetting(
    base: nn.Module, tuned: nn.Module, texts: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """(KL(base || tuned), loss(tuned) - loss(base)), as means in nats over all tokens.

    Args:
        base, tuned: Causal language models.
        texts: Token ids of texts outside the task.
    """
    kl = change = tokens = 0.0
    for text in texts:
        ids = torch.tensor([text], device=next(base.parameters()).device)
        p, q = (model(ids).logits[0, :-1].float().log_softmax(-1) for model in (base, tuned))
        kl += (p.exp() * (p - q)).sum().item()
        target = ids[0, 1:, None]
        change += (p.gather(1, target) - q.gather(1, target)).sum().item()
        tokens += len(target)
    return kl / tokens, change / tokens


class Latency(NamedTuple):
    """In seconds, or as ratios to the base's; `decode` is None for a classifier."""

    prefill: float
    decode: float | None


def latencies(
    base: PreTrainedModel, tuned: PreTrainedModel, merged: PreTrainedModel | None, new: int
) -> tuple[Latency, Latency | None]:
    """The latencies of the attached and the merged model, as ratios to the base's. The models are
    timed in turn, so that noise affects all alike.

    Args:
        base, tuned, merged: The models; without a merged one its latency is None.
        new: Tokens to decode; 0 times the prefill alone.
    """
    models = [m for m in (base, tuned, merged) if m is not None]
    for model in models:
        timed(model, new)  # the first calls are slower
    rounds = [[timed(model, new) for model in models] for _ in range(ROUNDS)]

    def over_base(i: int) -> Latency:
        prefill = statistics.median(times[i].prefill / times[0].prefill for times in rounds)
        if not new:
            return Latency(prefill, None)
        decode: Any = [(times[i].decode, times[0].decode) for times in rounds]
        return Latency(prefill, statistics.median(own / base for own, base in decode))

    return over_base(1), over_base(2) if merged is not None else None


@torch.no_grad()
def timed(model: PreTrainedModel, new: int) -> Latency:
    """The seconds of a prefill of PROMPT tokens and of decoding `new` tokens, at batch 1."""
    ids = torch.arange(100, 100 + PROMPT, device=model.device)[None]
    output, prefill = clock(lambda: model(ids, use_cache=new > 0), model.device)

    def decode() -> None:
        for _ in range(new):
            model(ids[:, -1:], cache=output.past_key_values, use_cache=True)

    return Latency(prefill, clock(decode, model.device)[1] if new else None)


def clock(do: Callable, device: torch.device) -> tuple:
    """(what `do` returns, its seconds), waiting for the device's queued work before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
