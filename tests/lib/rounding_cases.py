"""fp32 values of every kind, to be rounded to 16 bits."""

import torch

DTYPES = [torch.bfloat16, torch.float16]


def values(dtype: torch.dtype) -> torch.Tensor:
    """fp32 values of every kind: normal, subnormal, under the least, on the grid, across a power of
    two, zeros of both signs.
    """
    info = torch.finfo(dtype)
    magnitudes = [
        0.0,
        1.0,
        1 + info.eps / 3,
        2 - info.eps / 4,
        0.0123,
        3.3e3,
        info.smallest_normal,
        info.smallest_normal * 0.3,
        info.smallest_normal * info.eps,
        info.smallest_normal * info.eps * 0.4,
        info.max * 0.99,
    ]
    return torch.tensor(magnitudes + [-m for m in magnitudes], dtype=torch.float32)
