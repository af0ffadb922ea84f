"""Matrices whose singular parts are known."""

import torch

from lorafold.inspecting.updates import Svd


def orthonormal(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(
        torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )[0]


def planted(out: int, inn: int, s: list[float], seed: int = 0) -> Svd:
    return Svd(
        orthonormal(out, len(s), seed).float(),
        torch.tensor(s),
        orthonormal(inn, len(s), seed + 1).float(),
    )
