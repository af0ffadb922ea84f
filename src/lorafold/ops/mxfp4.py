"""MXFP4: 4-bit floating-point values with a shared power of two per 32 values, 4.25 bits per
weight.

    w[32 g + 2 i]     = 2^(e[g] - 127) E2M1[b[g, i] & 15]         b (..., G, 16) bytes
    w[32 g + 2 i + 1] = 2^(e[g] - 127) E2M1[b[g, i] >> 4]         e (..., G) bytes, E8M0
    E2M1              sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and
                      their negatives

OCP Microscaling Formats (MX) specification v1.0, 2023: elements E2M1, scales E8M0, of which 255 is
NaN. gpt-oss stores its experts in this format. Every value is exact in bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAN = 255
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# bytes per value -> the dtype with which two values are looked up at once
PAIR_DTYPES = {2: torch.int32, 4: torch.int64, 8: torch.complex128}


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns the values (..., 32 G), in the order of their codes, for blocks (..., G, 16) and
    scales (..., G).
    """
    device = blocks.device
    exact = torch.bfloat16 if dtype is torch.float16 else dtype  # fp16 lacks most of the scales
    # both codes of a byte are looked up at once
    of_code = torch.tensor((*MAGNITUDES, *(-v for v in MAGNITUDES)), dtype=exact, device=device)
    pairs = torch.stack([of_code.repeat(16), of_code.repeat_interleave(16)], 1)
    pairs = pairs.view(PAIR_DTYPES[exact.itemsize]).squeeze(1)
    w = pairs.index_select(0, blocks.reshape(-1).int()).view(exact).view(*scales.shape, -1)
    # 2^(e - 127): E8M0 codes are fp32's exponent bits, except for the first and the last
    powers = (torch.arange(256, dtype=torch.int32, device=device) << 23).view(torch.float32).clone()
    powers[0], powers[NAN] = 2.0**-127, torch.nan
    factors = powers.to(exact).index_select(0, scales.reshape(-1).int()).view(*scales.shape, 1)
    return w.mul_(factors).flatten(-2).to(dtype)
