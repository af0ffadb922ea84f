"""The certificate of a merge: how far the merged model's output is from that of base plus adapters,
measured on probe texts, both computed in fp32. Base plus adapters is the base as it was stored in
training.

    p = softmax(adapted(text)), q = softmax(merged(text)),     at every position of every text
    kl                  mean of sum_v p log(p / q)      (nats)
    max_logit_gap       max |adapted - merged|
    relative_logit_gap  |adapted - merged| / |adapted|  (Frobenius)
    argmax_agreement    share of positions at which both choose the same token

One model at a time is in memory; the logits of the first one are kept in a file.
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
from transformers import PreTrainedModel

from lorafold.errors import LorafoldError
from lorafold.merging.into import Distance

Progress = Callable[[int, int], None]  # texts done, texts in all


@dataclass(frozen=True)
class Gap:
    """How far the merged model's logits are from the adapted one's: the figures above, over so many
    positions.
    """

    kl: float
    max_logit_gap: float
    relative_logit_gap: float
    argmax_agreement: float
    positions: int

    @property
    def distance(self) -> Distance:
        """The two figures of it that people read."""
        return Distance(self.kl, self.argmax_agreement)


def compare(
    adapted: Callable[[], PreTrainedModel],
    others: Sequence[Callable[[], PreTrainedModel]],
    texts: Sequence[tuple[int, ...]],
    scratch: Path,
    progress: Progress | None = None,
) -> list[Gap]:
    """The gaps between a model and others, which are loaded one after the other.

    Args:
        adapted, others: Each loads its model.
        texts: Token ids of the probe texts.
        scratch: A directory for the first model's logits: 4 bytes for each position and entry of
            the vocabulary.
        progress: Called as progress(done, total) after each text of each model.

    Raises LorafoldError if a model's logits are not finite.
    """
    done, total = 0, (1 + len(others)) * len(texts)

    def told(logits: Iterator[Tensor]) -> Iterator[Tensor]:
        nonlocal done
        for one in logits:
            yield one
            done += 1
            if progress is not None:
                progress(done, total)

    with tempfile.TemporaryFile(dir=scratch) as kept:
        for logits in told(_logits(adapted, texts)):
            kept.write(logits.numpy().data)
        gaps = []
        for other in others:
            kept.seek(0)
            gaps.append(_gap(kept, told(_logits(other, texts))))
        return gaps


def _gap(kept: BinaryIO, others: Iterator[Tensor]) -> Gap:
    """The gap between the logits in a file and others, (T, vocabulary) for each text."""
    kl = gap = squares = total = 0.0
    agreed = positions = 0
    for logits in others:
        before = _next(kept, logits.shape)
        p, q = before.double().log_softmax(-1), logits.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        difference = before - logits
        gap = max(gap, difference.abs().max().item())
        squares += difference.double().square().sum().item()
        total += before.double().square().sum().item()
        agreed += int((before.argmax(-1) == logits.argmax(-1)).sum())
        positions += len(logits)
    return Gap(
        max(kl / positions, 0.0), gap, (squares / total) ** 0.5, agreed / positions, positions
    )


def _logits(
    build: Callable[[], PreTrainedModel], texts: Sequence[tuple[int, ...]]
) -> Iterator[Tensor]:
    """The logits of each text, (T, vocabulary) in fp32, on the CPU."""
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
                "certificate: the model's logits on a probe text are not finite, so they can't be"
                " compared; check the weights of the model and its adapters"
            )
        yield logits
    del model
    gc.collect()


def _next(file: BinaryIO, shape: torch.Size) -> Tensor:
    """The next fp32 tensor of this shape in the file."""
    data = bytearray(4 * shape.numel())
    file.readinto(data)  # type: ignore[attr-defined]
    return torch.frombuffer(data, dtype=torch.float32).view(shape)
