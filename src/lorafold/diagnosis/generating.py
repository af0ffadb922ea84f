"""What completions, and the steps of training, are computed with on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from lorafold.diagnosis.finding import Finding
from lorafold.engine.native import compiled
from lorafold.kernels.compiling import Unavailable
from lorafold.kernels.training import use


def findings() -> Iterator[Finding]:
    """Whether the operations of the engine and of training can be compiled."""
    for what, why in {"the engine": _engine(), "training": use()}.items():
        text = f"in torch, since they can't be compiled: {why}" if why else "compiled"
        yield Finding(f"operations of {what}", text, {"compiled": not why, "why": why})


def _engine() -> str:
    """Why those of the engine can't be compiled; empty if they can."""
    try:
        compiled()
    except Unavailable as error:
        return str(error)
    return ""
