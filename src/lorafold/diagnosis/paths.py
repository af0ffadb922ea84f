"""The paths that code takes on a GPU of CUDA, by its compute capability."""

from __future__ import annotations

import torch

from lorafold.kernels.table import TRAINING, use
from lorafold.machine.devices import AMPERE
from lorafold.ops.demands import FLASH, Place, as_on, groups_at_once, takes


def paths(capability: tuple[int, int]) -> str:
    """What such a card computes with, as a line.

    Args:
        capability: Its compute capability, major and minor.
    """
    native = capability >= AMPERE
    x = torch.empty(1, FLASH.head_unit, dtype=torch.bfloat16 if native else torch.float32)
    with as_on(Place("cuda", capability)):
        flash, at_once = takes(FLASH, x, x), groups_at_once(x)
    missing = use(TRAINING, "cuda")
    parts = (
        f"weights and products in {'bf16' if native else 'fp32'}",
        f"attention of packed rows {'by flash attention' if flash else 'in tiles of plain torch'}",
        f"experts {'in one product' if at_once else 'one after the other'}",
        f"dropout and gains in {f'plain torch ({missing})' if missing else 'Triton'}",
    )
    return f"compute capability {'.'.join(map(str, capability))}: {'; '.join(parts)}"
