"""What completions, and the steps of training, are computed with on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from lorafold.diagnosis.finding import Finding
from lorafold.kernels.table import DECODING, TRAINING, use


def operations() -> Iterator[Finding]:
    """Whether the operations of the engine and of training can be compiled."""
    for what, operations in {"the engine": DECODING, "training": TRAINING}.items():
        why = use(operations)
        text = f"in torch, since they can't be compiled: {why}" if why else "compiled"
        yield Finding(f"operations of {what}", text, {"compiled": not why, "why": why})
