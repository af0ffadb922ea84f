"""The Walsh-Hadamard transform, as two products with small Hadamard matrices.

    y = H x / sqrt(n),  H[i, j] = (-1)^(number of ones that i and j share in binary)        n a
    power of 2;  y y = x y's transform: x

H of n = a b is the Kronecker product of those of a and b, so with x as a matrix (a, b) it is H_a X
H_b: n (a + b) multiplications where the fast transform has n log n additions, which a processor's
matrix product does sooner than passes over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(n: int) -> Tensor:
    """H / sqrt(n), (n, n) fp32, n a power of 2 (Sylvester's construction)."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / n**0.5


def halves(n: int) -> tuple[Tensor, Tensor]:
    """H_a and H_b for `walsh` of n = a b numbers, a and b as near as can be."""
    a = 1 << (n.bit_length() - 1) // 2
    return hadamard_matrix(a), hadamard_matrix(n // a)


def walsh(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (..., a b), left (a, a), right (b, b) -> (..., a b). Orthonormal and its own inverse."""
    return (left @ (x.unflatten(-1, (len(left), len(right))) @ right)).flatten(-2)
