"""How long a model takes at batch 1, as a ratio to another's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# tokens prefilled, tokens decoded, rounds: many short timings in turn are robust to a noisy machine
PROMPT, NEW, ROUNDS = 128, 8, 11


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
            model(ids[:, -1:], cache=output.cache, use_cache=True)

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
