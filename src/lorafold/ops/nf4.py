"""The levels of 4-bit NormalFloat (NF4), and its block sizes.

The levels are quantiles of N(0, 1), scaled so that the outermost levels are -1 and 1. Sixteen
levels that include zero can't be symmetric, so 7 are negative and 8 positive, on each side at even
steps of probability between 1/2 and 0.9677083, the mean of 1 - 1/32 and 1 - 1/30.

Dettmers et al. 2023, QLoRA, arXiv 2305.14314, lists these levels in appendix E; equation 4 in
section 3 averages neighbouring quantiles instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

OFFSET = 0.9677083  # (1 - 1/32 + 1 - 1/30) / 2, to the digits of the published code
BLOCK, BLOCK_OF_CONSTANTS = 64, 256


def levels() -> Tensor:
    """Returns the 16 levels (16,), ascending, fp32: level[0] = -1, level[7] = 0, level[15] = 1."""

    # fp32 probabilities make the levels equal the published ones exactly
    def above_zero(n: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(OFFSET, 0.5, n + 1)[:-1].double()).float()

    level = torch.cat([-above_zero(7), torch.zeros(1), above_zero(8).flip(0)])
    return level / level[-1]
