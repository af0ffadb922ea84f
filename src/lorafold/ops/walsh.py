"""The Walsh-Hadamard transform, as two products with small Hadamard matrices.

    y = H x / sqrt(n),  H[i, j] = (-1)^(number of ones that i and j share in binary)        n a power of 2;  y y = x y's transform: x

H of n = a b is the Kronecker product of those of a and b, so with x as a matrix (a, b) it is H_a X H_b: n (a + b) multiplications where the
fast transform has n log n additions, which a processor's matrix product does sooner than passes over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(n: int, like: Tensor) -> Tensor:
    """H / sqrt(n), (n, n), n a power of 2 (Sylvester's construction)."""
    h = like.new_ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


def walsh(x: Tensor) -> Tensor:
    """x (..., n) -> (..., n), n a power of 2. Orthonormal and its own inverse."""
    n = x.shape[-1]
    a = 1 << (n.bit_length() - 1) // 2
    left, right = hadamard_matrix(a, x), hadamard_matrix(n // a, x)
    return (left @ (x.unflatten(-1, (a, n // a)) @ right)).flatten(-2)
