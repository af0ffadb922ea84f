"""MXFP4: 4-bit floating-point values with a shared power of two for every 32 of them, 4.25 bits a
weight.

    w[32 g + 2 i]     = 2^(e[g] - 127) E2M1[b[g, i] & 15]         b (..., G, 16) bytes
    w[32 g + 2 i + 1] = 2^(e[g] - 127) E2M1[b[g, i] >> 4]         e (..., G) bytes, E8M0
    E2M1              sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and
                      their negatives

The specification is OCP Microscaling Formats (MX) v1.0, 2023: its elements E2M1 and its scales
E8M0, of which 255 stands for not-a-number. gpt-oss stores its experts in this format. A value has
one bit of mantissa, and its exponent the range of bf16's, so bf16 is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

BIAS = 127  # of the exponent of a scale
NAN = 255  # the scale of values that are not numbers
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The values (..., 32 G), in the order of their codes.

    Args:
        blocks: two codes a byte, the first in the low bits: uint8 (..., G, 16).
        scales: the biased exponents: uint8 (..., G).
        dtype: of the values; what lies beyond its range becomes infinite.
    """
    values = (*MAGNITUDES, *(-v for v in MAGNITUDES))
    pairs = torch.tensor([(values[b & 15], values[b >> 4]) for b in range(256)], dtype=dtype)
    w = pairs.to(blocks.device)[blocks.int()].flatten(-2)  # (..., G, 32)
    w = torch.ldexp(w, (scales.int() - BIAS)[..., None])
    return w.masked_fill_((scales == NAN)[..., None], torch.nan).flatten(-2)
