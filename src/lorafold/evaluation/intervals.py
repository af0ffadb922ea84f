"""95% confidence intervals of losses, shares and means over rows.

    loss = sum_i s_i / sum_i n_i          s_i is the summed loss of row i, over its n_i tokens
    var(loss) = m / (m - 1) sum_i (s_i - loss n_i)^2 / (sum_i n_i)^2

The tokens of a row are not independent, so losses are ratio estimates with rows as units (Cochran,
Sampling Techniques, 1977, ch. 6). Shares have Wilson's interval (1927), means have Student's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

import numpy as np

from lorafold.errors import LorafoldError

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def wilson(hits: int, n: int) -> Interval:
    share, shrink = hits / n, 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def two_sided(t: float, df: float) -> float:
    """The probability of values beyond ±t under Student's distribution. With t = sqrt(df) tan(a),
    the density is proportional to cos(a)^(df - 1), which is integrated by Gauss-Legendre
    quadrature.
    """
    df = min(df, 1e4)

    def area(low: float) -> float:
        half = (math.pi / 2 - low) / 2
        return half * float(WEIGHTS @ np.cos(low + half * (NODES + 1)) ** (df - 1))

    return area(math.atan(t / math.sqrt(df))) / area(0.0)


@lru_cache(1024)
def student(n: float) -> float:
    """The 97.5% quantile of Student's distribution for n - 1 degrees of freedom, n >= 2."""
    low, high = Z, 13.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, n - 1) > 0.05 else (low, middle)
    return high


def loss_interval(sums: Sequence[tuple[float, int]]) -> Interval | None:
    """The 95% interval of the mean loss, from (summed loss, tokens) by row; None for one row."""
    interval = ratio_interval(sums)
    return None if interval is None else (max(0.0, interval[0]), interval[1])


def ratio_interval(sums: Sequence[tuple[float, int]]) -> Interval | None:
    """Like `loss_interval`, for values that may be negative, such as differences of losses."""
    m, tokens = len(sums), sum(n for _, n in sums)
    if m < 2:
        return None
    mean = mean_loss(sums)
    half = student(m) * math.sqrt(m / (m - 1) * sum((s - mean * n) ** 2 for s, n in sums)) / tokens
    return mean - half, mean + half


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The 95% interval of a mean over rows; None for a single row."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), student(len(values)) * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def mean_loss(sums: Sequence[tuple[float, int]]) -> float:
    loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
    if not math.isfinite(loss):
        raise LorafoldError(
            f"held-out loss: found {loss}, expected a finite number; check the weights of the model"
            " and its adapters"
        )
    return loss
