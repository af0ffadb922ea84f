"""The kernel of `masks`, a file of its own since Triton reads its source."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["width", "limit", "low", "high", "site"])
def dropped_mask(  # type: ignore[no-untyped-def]
    names, found, width, limit, low, high, site, FIRST: tl.constexpr, SECOND: tl.constexpr,
    STEP: tl.constexpr, OTHER: tl.constexpr, ROUNDS: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """One row of elements and CALLS calls of Philox a program (`ops.philox`)."""
    row = tl.program_id(0).to(tl.int64)
    calls = tl.program_id(1) * CALLS + tl.arange(0, CALLS)
    name = tl.load(names + row)
    a = calls.to(tl.uint32)
    zero = a & 0
    first, second = zero + FIRST, zero + SECOND
    b = zero + (name & 0xFFFFFFFF).to(tl.uint32)
    c = zero + (name >> 32).to(tl.uint32)
    d = zero + site.to(tl.uint32)
    k, m = zero + low.to(tl.uint32), zero + high.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        x, y = tl.umulhi(a, first), tl.umulhi(c, second)
        a, b, c, d = y ^ b ^ k, c * second, x ^ d ^ m, a * first
        k, m = k + STEP, m + OTHER
    own = found + row * width
    for i in tl.static_range(4):
        word = a if i == 0 else b if i == 1 else c if i == 2 else d
        at = calls * 8 + 2 * i
        tl.store(own + at, ((word & 0xFFFF) < limit).to(tl.int8), mask=at < width)
        tl.store(own + at + 1, ((word >> 16) < limit).to(tl.int8), mask=at + 1 < width)
