"""fp32 values of every kind, to be rounded to 16 bits."""

import torch

DTYPES = [torch.bfloat16, torch.float16]


def values(dtype: torch.dtype) -> torch.Tensor:
    """Normal, subnormal, under the least, on the grid, across a power of two, zeros."""
    info = torch.finfo(dtype)
    least = info.smallest_normal
    magnitudes = [
        0.0, 1.0, 1 + info.eps / 3, 2 - info.eps / 4, 0.0123, 3.3e3, least, least * 0.3,
        least * info.eps, least * info.eps * 0.4, info.max * 0.99,
    ]  # fmt: skip
    return torch.tensor(magnitudes + [-m for m in magnitudes], dtype=torch.float32)
