"""How fast a device multiplies matrices, measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHAPE = (1024, 576, 1536)  # rows, in, out: an MLP's product of the embedded model
GPU_SHAPE = (4096, 4096, 4096)


def gflops(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """The rate of a product x W^T, in GFLOP/s.

    It is that of the fastest product, since other processes can only slow one down.

    Args:
        dtype: The dtype of x (rows, in) and W (out, in).
        device: Where it is computed; a GPU gets larger matrices (`GPU_SHAPE`).
        seconds: How long products are timed, after one to warm up.
    """
    import torch

    rows, width, out = SHAPE if device.type == "cpu" else GPU_SHAPE
    x = torch.ones(rows, width, dtype=dtype, device=device)
    w = torch.ones(out, width, dtype=dtype, device=device)
    fastest, end = float("inf"), 0.0
    with torch.inference_mode():
        torch.nn.functional.linear(x, w)[0, 0].item()
        begin = time.perf_counter()
        while end < begin + seconds:
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)[0, 0].item()  # a GPU has finished once it answers
            end = time.perf_counter()
            fastest = min(fastest, end - start)
    return 2 * rows * width * out / fastest / 1e9
