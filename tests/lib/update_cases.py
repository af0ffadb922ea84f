"""Matrices whose singular parts are known."""

import torch

from lorafold.inspecting.updates import Svd


def orthonormal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=draw, dtype=torch.float64))[0]


def planted(out: int, inn: int, s: list[float], seed: int = 0) -> Svd:
    u, v = orthonormal(out, len(s), seed), orthonormal(inn, len(s), seed + 1)
    return Svd(u.float(), torch.tensor(s), v.float())
