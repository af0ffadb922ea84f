"""Adapters, deltas and models away from where they start."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

T = TypeVar("T", bound=Any)


def moved(of: T, size: float = 0.1, seed: int = 0) -> T:
    """The same, with normal noise of this size on each of its parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in of.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))
    return of
