"""What merging did to the model's answers, measured on probe text, both sides computed in fp32.

    p = softmax(adapted(text)), q = softmax(merged(text)),     at every position of every text
    kl                  mean of sum_v p log(p / q)      (nats)
    max_logit_gap       max |adapted - merged|
    relative_logit_gap  |adapted - merged| / |adapted|  (Frobenius)
    argmax_agreement    share of positions at which both would say the same token

One model at a time is in memory; the first one's logits wait on the disk.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafold.data.examples import encode
from lorafold.data.render import ensure_chat_template
from lorafold.data.rows import read_rows
from lorafold.errors import LorafoldError

# prose, questions, code, tables, letters, a few languages
PROBES = Path(__file__).with_name("probes.jsonl")
PROBE_LENGTH = 512  # tokens of a probe text that are looked at

Progress = Callable[[int, int], None]  # texts done, texts in all


@dataclass(frozen=True)
class Gap:
    """How far the merged model's logits lie from the adapted one's, over `positions` positions."""

    kl: float
    max_logit_gap: float
    relative_logit_gap: float
    argmax_agreement: float
    positions: int


def probe_ids(
    tokenizer: PreTrainedTokenizerBase, probe: str | Path | None
) -> list[tuple[int, ...]]:
    """Token ids of the probe texts: the built-in ones, or the rows of a data file in any shape that
    training takes.
    """
    ensure_chat_template(tokenizer)
    return [
        example.ids
        for example in encode(read_rows(str(probe or PROBES)), tokenizer, PROBE_LENGTH).examples
    ]


def compare(
    adapted: Callable[[], PreTrainedModel],
    merged: Callable[[], PreTrainedModel],
    texts: Sequence[tuple[int, ...]],
    scratch: Path,
    progress: Progress | None = None,
) -> Gap:
    """The gap between two models that are loaded in turn.

    `scratch`, a directory, takes 4 bytes a position and vocabulary entry.

    LorafoldError if a model's logits are not finite.
    """
    with tempfile.TemporaryFile(dir=scratch) as kept:
        done = 0
        for logits in _logits(adapted, texts):
            kept.write(logits.numpy().data)
            done += 1
            if progress is not None:
                progress(done, 2 * len(texts))
        kept.seek(0)
        kl = gap = squares = total = 0.0
        agreed = positions = 0
        for logits in _logits(merged, texts):
            before = _next(kept, logits.shape)
            p, q = before.double().log_softmax(-1), logits.double().log_softmax(-1)
            kl += (p.exp() * (p - q)).sum().item()
            difference = before - logits
            gap = max(gap, difference.abs().max().item())
            squares, total = (
                squares + difference.double().square().sum().item(),
                total + before.double().square().sum().item(),
            )
            agreed += int((before.argmax(-1) == logits.argmax(-1)).sum())
            positions += len(logits)
            done += 1
            if progress is not None:
                progress(done, 2 * len(texts))
    return Gap(
        max(kl / positions, 0.0), gap, (squares / total) ** 0.5, agreed / positions, positions
    )


# each (T, vocabulary), fp32
def _logits(
    build: Callable[[], PreTrainedModel], texts: Sequence[tuple[int, ...]]
) -> Iterator[Tensor]:
    model = build()
    for ids in texts:
        with torch.inference_mode():
            logits = (
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                .logits[0]
                .float()
                .cpu()
            )
        if not logits.isfinite().all():
            raise LorafoldError(
                "the model's logits on probe text are not finite, so there is nothing to compare"
            )
        yield logits
    del model
    gc.collect()


def _next(file: BinaryIO, shape: torch.Size) -> Tensor:
    data = bytearray(4 * shape.numel())
    file.readinto(data)  # type: ignore[attr-defined]
    return torch.frombuffer(data, dtype=torch.float32).view(shape)
