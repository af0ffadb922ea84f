"""The arguments of the passes over rows (`rows.h`), from tensors of any strides that they take."""

from __future__ import annotations

from torch import Tensor


def rotary_parts(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> tuple[object, ...] | None:
    """The arguments of `rotary` up to the sign; None if the strides are not among those it takes.

    Args:
        x: the input (B, H, T, D), or (B, T, H, D).
        cos, sin: (B or 1, 1, T, D), or (B or 1, T, 1, D), in x's dtype.
        out: the output, of x's shape.
    """
    if x.dim() != 4 or cos.dim() != 4 or cos.shape != sin.shape or cos.stride() != sin.stride():
        return None
    if cos.shape[1] == x.shape[1] and cos.shape[2] == 1:
        x, cos, sin, out = (t.transpose(1, 2) for t in (x, cos, sin, out))
    (b, heads, tokens, d), (turns, one, *angles) = x.shape, cos.shape
    ends = [t.stride(3) for t in (x, cos, out)]
    # the stride of an axis of one means nothing
    packed = tokens == 1 or cos.stride(2) == d
    if ends != [1, 1, 1] or one != 1 or angles != [tokens, d] or turns not in (1, b) or not packed:
        return None
    turn = cos.stride(0) if turns > 1 else 0
    return x, cos, sin, out, b, heads, tokens, d, *x.stride()[:3], *out.stride()[:3], turn


def gated_parts(gate: Tensor, up: Tensor, out: Tensor) -> tuple[object, ...]:
    """The arguments of `gated` up to the threads; inputs whose rows do not lie evenly apart are
    copied.

    Args:
        gate, up: the inputs (..., k).
        out: the output, contiguous, of their shape.
    """
    n = out.shape[-1]
    flat = [t.reshape(-1, n) for t in (gate, up)]
    rows = [t if t.stride(1) == 1 else t.contiguous() for t in flat]
    return *rows, out, len(rows[0]), n, *(t.stride(0) for t in rows)
