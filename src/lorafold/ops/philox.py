"""Random bits that follow from a counter and a key alone: Philox4x32-10 (Salmon et al. 2011,
"Parallel Random Numbers: As Easy as 1, 2, 3").

    four words = philox(four words of counter, two words of key)

Words have 32 bits. No state is kept, so that any bits can be drawn at any time, in any order and on
any device. The functions take Python's ints or int64 tensors that broadcast.
"""

from __future__ import annotations

from typing import Any

WORD = (1 << 32) - 1
FACTORS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, ...]:
    """The four words for a counter under a key."""
    a, b, c, d = counter
    k, m = key
    for _ in range(ROUNDS):
        # products of int64 tensors wrap around, which leaves their 64 bits right; b and d have more
        # than 32 bits on the way
        x, y = FACTORS[0] * a, FACTORS[1] * c
        a, b, c, d = ((y >> 32) ^ b ^ k) & WORD, y, ((x >> 32) ^ d ^ m) & WORD, x
        k, m = (k + STEPS[0]) & WORD, (m + STEPS[1]) & WORD
    return a, b & WORD, c, d & WORD


def halves(number: int) -> tuple[int, int]:
    """The low and the high word of a number of 64 bits."""
    return number & WORD, number >> 32 & WORD


def key_of(seed: int, step: int) -> int:
    """The key of a step of a run: 63 bits that look like any other's."""
    low, high, *_ = philox((*halves(step), 0, 0), halves(seed))
    return (high << 32 | low) >> 1
