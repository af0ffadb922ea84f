"""One row of the comparison: a method trained, evaluated and timed, in a process of its own so that its peak memory is its own.

    quality      held-out loss and exact match
    forgetting   KL(base || tuned) and the change of loss on text outside the task, both in nats a token
    latency      seconds over the base's, prefill and decode at batch 1, base, attached and merged timed in turn; medians of ratios
    mergeable    proved: folded in fp32, the model gives the attached one's logits
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor, nn

from lorafold.adapter import Adapter, load
from lorafold.errors import NotMergeable
from lorafold.evaluate import Interval, evaluate
from lorafold.io.models import choose_device, choose_dtype, load_model, load_tokenizer
from lorafold.merge.certificate import probe_ids
from lorafold.train.recipe import Recipe
from lorafold.train.rows import Row as DataRow
from lorafold.train.run import Request, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT, NEW, ROUNDS = 128, 16, 5  # tokens prefilled, tokens decoded, timings of each
EXACT = 1e-4  # of the logits' norm, in fp32: far above rounding over some dozen layers, far below what an adapter changes


@dataclass(frozen=True)
class Row:
    """Shares are of the base's parameters; latencies are ratios to the base's; None where there is nothing to measure."""

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
    forgetting_kl: float
    forgetting_loss: float
    latency_attached: float
    prefill_attached: float
    latency_merged: float | None
    prefill_merged: float | None
    mergeable: bool
    modifies_architecture: bool


@dataclass(frozen=True)
class Task:
    """What every row has in common: model, data, and a recipe whose method is each row's own."""

    model: str
    rows: Sequence[DataRow]
    held_out: Sequence[DataRow]
    source: str
    recipe: Recipe
    device: str | None


def measure(task: Task, method: str, seed: int) -> Row:
    """Train one method and measure it. LorafoldError as `train`."""
    console = Console(quiet=True)
    recipe = task.recipe.model_copy(update={"method": method, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        trained = train(Request(task.model, out, recipe, task.rows, task.source, device=task.device), console)
        device = choose_device(task.device)
        dtype = choose_dtype(recipe.base, device)[0]
        base, tokenizer = load_model(task.model, dtype, device), load_tokenizer(task.model)
        tuned, adapter = load_tuned(task.model, out, dtype, device)
        found = evaluate(tuned, tokenizer, task.held_out, recipe.max_length)
        kl, change = forgetting(base, tuned, probe_ids(tokenizer, None))
        merged = merge_proved(task.model, out, dtype, device)
        attached_ratio, merged_ratio = latencies(base, tuned, merged)
        size = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    count = sum(p.numel() for p in base.parameters())
    return Row(
        method=method, seed=seed, trainable_parameters=trained.trainable_parameters, trainable_share=trained.trainable_parameters / count,
        adapter_bytes=size, tokens_per_second=trained.tokens_per_second, peak_bytes=trained.peak_bytes, train_seconds=trained.seconds,
        loss=found.loss, exact_match=found.exact_match, exact_match_interval=found.exact_match_interval,
        forgetting_kl=kl, forgetting_loss=change,
        latency_attached=attached_ratio[0], prefill_attached=attached_ratio[1],
        latency_merged=merged_ratio and merged_ratio[0], prefill_merged=merged_ratio and merged_ratio[1],
        mergeable=merged is not None, modifies_architecture=adapter is not None and adapter.spec.modifies_architecture,
    )  # fmt: skip


def load_tuned(model: str, out: Path, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, Adapter | None]:
    """The model with its adapter, or the model that was trained whole and saved in its place."""
    if not (out / "adapter_config.json").is_file():
        return load_model(out, dtype, device), None
    tuned = load_model(model, dtype, device)
    return tuned, load(tuned, out)


def merge_proved(model: str, out: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel | None:
    """The merged model in `dtype`, or None: where folding is refused, or its logits in fp32 are not those of the attached model."""
    tuned, adapter = load_tuned(model, out, torch.float32, device)
    ids = torch.arange(100, 164, device=device)[None]
    with torch.no_grad():
        before = tuned(ids).logits
        try:
            if adapter is not None:
                adapter.merge(untie_weights=True)
        except NotMergeable:
            return None
        after = tuned(ids).logits
    nn.Module.to(tuned, dtype)
    return tuned if (after - before).norm() <= EXACT * before.norm() else None


@torch.no_grad()
def forgetting(base: nn.Module, tuned: nn.Module, texts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(KL(base || tuned), loss(tuned) - loss(base)), means over the tokens of texts outside the task."""
    kl = change = tokens = 0.0
    for text in texts:
        ids = torch.tensor([text], device=next(base.parameters()).device)
        p, q = (model(ids).logits[0, :-1].float().log_softmax(-1) for model in (base, tuned))
        kl += (p.exp() * (p - q)).sum().item()
        target = ids[0, 1:, None]
        change += (p.gather(1, target) - q.gather(1, target)).sum().item()
        tokens += len(target)
    return kl / tokens, change / tokens


Ratio = tuple[float, float]  # decode, prefill


def latencies(base: PreTrainedModel, tuned: PreTrainedModel, merged: PreTrainedModel | None) -> tuple[Ratio, Ratio | None]:
    """Times over the base's of the attached and the merged model; all are timed in turn, so that noise falls on all alike."""
    models = [m for m in (base, tuned, merged) if m is not None]
    times: list[list[Ratio]] = [[] for _ in models]
    for i in range(ROUNDS + 1):
        for model, seen in zip(models, times, strict=True):
            if i:  # the first round warms up
                seen.append(timed(model))
            else:
                timed(model)
    ratios = [
        (statistics.median(a[0] / b[0] for a, b in zip(seen, times[0], strict=True)),
         statistics.median(a[1] / b[1] for a, b in zip(seen, times[0], strict=True)))
        for seen in times
    ]  # fmt: skip
    return ratios[1], ratios[2] if merged is not None else None


@torch.no_grad()
def timed(model: PreTrainedModel) -> Ratio:
    """Seconds of NEW decoded tokens and of a prefill of PROMPT tokens, at batch 1."""
    ids = torch.arange(100, 100 + PROMPT, device=model.device)[None]
    cache, prefill = clock(lambda: model(ids, use_cache=True).past_key_values, model.device)
    token: Tensor = ids[:, -1:]

    def decode() -> None:
        for _ in range(NEW):
            model(token, past_key_values=cache, use_cache=True)

    return clock(decode, model.device)[1], prefill


def clock(do: Callable, device: torch.device) -> tuple:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


