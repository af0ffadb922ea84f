"""95% intervals of what is measured on rows.

    loss = sum_i s_i / sum_i n_i          s_i is the summed loss of row i, over its n_i tokens
    var(loss) = m / (m - 1) sum_i (s_i - loss n_i)^2 / (sum_i n_i)^2

The tokens of a row are not independent, so the interval of a loss is that of a ratio estimate with
rows as its units (Cochran, Sampling Techniques, 1977, ch. 6). That of a share is Wilson's (1927),
which is valid at 0% and 100% too. Those of means have Student's quantile for as many rows as there
are: of five rows the normal one would be right in 88% of cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

from lorafold.errors import LorafoldError

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)


def wilson(hits: int, n: int) -> Interval:
    """Wilson's 95% interval of the share hits / n (Wilson 1927)."""
    share, shrink = hits / n, 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def student(n: int) -> float:
    """Student's 97.5% quantile for the mean of n values, n at least 2: closed forms for two and
    three, else the expansion of Abramowitz and Stegun (1964, 26.7.5), 0.12% off for four values.
    """
    if n < 4:
        return math.tan(math.pi * 0.475) if n == 2 else 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z, v = Z, n - 1
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**k for k, term in enumerate(terms, 1))


def loss_interval(sums: Sequence[tuple[float, int]]) -> Interval | None:
    """The 95% interval of the mean loss, from (summed loss, tokens) of each row (Cochran 1977, ch.
    6); None for a single row.
    """
    found = ratio_interval(sums)
    return None if found is None else (max(0.0, found[0]), found[1])


def ratio_interval(sums: Sequence[tuple[float, int]]) -> Interval | None:
    """As `loss_interval`, for what may be below 0, as a difference of two losses is."""
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
    """The mean loss over tokens. Raises LorafoldError if it is not finite."""
    loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
    if not math.isfinite(loss):
        raise LorafoldError(
            f"held-out loss: found {loss}, expected a finite number; check the weights of the model"
            " and its adapters"
        )
    return loss
