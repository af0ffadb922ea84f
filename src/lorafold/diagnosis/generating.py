"""What completions are computed with on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from lorafold.diagnosis.finding import Finding
from lorafold.engine.native import Unavailable, compiled


def findings() -> Iterator[Finding]:
    """Whether the engine's operations can be compiled."""
    try:
        compiled()
    except Unavailable as error:
        text = f"in torch, since they can't be compiled: {error}"
        yield Finding("operations of the engine", text, {"compiled": False, "why": str(error)})
    else:
        yield Finding("operations of the engine", "compiled", {"compiled": True, "why": ""})
