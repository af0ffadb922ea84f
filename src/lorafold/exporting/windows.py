"""Layers that attend to the last positions alone, and engines that have no such layers, or have
them in other places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FULL = "full_attention"


def window_of(config: Any) -> int | None:
    """How many positions some layers attend to alone, or None where all attend to all."""
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return window


def told(engine: str, config: Any) -> tuple[str, ...]:
    """What an engine that has no windows computes otherwise than the model, if it does."""
    window = window_of(config)
    if window is None:
        return ()
    return (
        f"{engine} attends to all positions, where the model attends to the last {window:,} alone:"
        " longer texts than that are read in another way",
    )


def period_of(kinds: Sequence[str]) -> int | None:
    """Every how many layers one attends to all positions, and the others to a window; None where
    they do not lie so.

    Args:
        kinds: of the layers, as `layer_types` has them.
    """
    if FULL not in kinds:
        return None
    period = kinds.index(FULL) + 1
    regular = [(n + 1) % period == 0 for n in range(len(kinds))]
    return period if regular == [kind == FULL for kind in kinds] else None
