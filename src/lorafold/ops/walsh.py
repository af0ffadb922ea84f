"""The Walsh-Hadamard transform, as two matmuls with small Hadamard matrices.

    y = H x / sqrt(n),  H[i, j] = (-1)^(number of ones that i and j share in binary),  n a power of
                        2; the transform of y is x

For n = a b, H is the Kronecker product of H_a and H_b, so for x reshaped to a matrix X (a, b) the
transform is H_a X H_b, which is faster than the n log n additions of the fast transform.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(n: int) -> Tensor:
    """Returns H / sqrt(n), (n, n) in fp32, for n a power of 2 (Sylvester's construction)."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


def hadamard_factors(n: int) -> tuple[Tensor, Tensor]:
    """Returns H_a (a, a) and H_b (b, b) for `walsh` of n = a b values, with a and b as close as
    possible.
    """
    a = 1 << (n.bit_length() - 1) // 2
    return hadamard_matrix(a), hadamard_matrix(n // a)


def walsh(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns the transform of x (..., a b), which is orthonormal and its own inverse, for left (a,
    a) and right (b, b).
    """
    return (left @ (x.unflatten(-1, (len(left), len(right))) @ right)).flatten(-2)
