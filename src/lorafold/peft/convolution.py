"""PEFT's tensor shapes for convolutions. Deltas treat W as a matrix (out, in / groups *
prod(window)).

    lora_A       (r, in / groups, *window)      lora_B               (out, r, 1, ...)
    ia3_l        (1, out, 1, ...)               lora_magnitude_vector (1, out, 1, ...)
    lokr_w2      (o2, i2, *window); for a Conv1d (o2, i2 * window), see `w2_problem`
    all other tensors of LoHa, LoKr and AdaLoRA have the shapes of the delta

With `use_effective_conv2d`, LoHa and LoKr have a Tucker core for a window larger than 1. When a
file is read, the core is multiplied into one of the factors, which leaves the update unchanged:

    t (r, r, *window), a (r, out), b (r, in):   dW[o, c, k] = sum_ij a[i, o] t[i, j, k] b[j, c]
    a' = a^T (out, r),   b' (r, in * prod(window)) = sum_j t[i, j, k] b[j, c]
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafold.models.weights import InMemory
from lorafold.peft.table_types import TargetModule, Tensors

TUCKER_CORES = (".hada_t1", ".hada_t2", ".lokr_t2")


def to_kernel(m: Tensor, site: TargetModule) -> Tensor:
    """A matrix (k, c * prod(window)) as a kernel (k, c, *window)."""
    return m.unflatten(1, (-1, *site.window))


def to_channels(v: Tensor, site: TargetModule) -> Tensor:
    """A vector (out,) as (1, out, 1, ...), which broadcasts to outputs."""
    return v.view(1, -1, *(1,) * len(site.window))


def from_kernel(kernel: Tensor, site: TargetModule) -> Tensor:
    """A kernel (k, ...) as a matrix (k, columns)."""
    return kernel.flatten(1)


def from_channels(v: Tensor, site: TargetModule) -> Tensor:
    """A tensor (any shape) as a vector (out,)."""
    return v.flatten()


def lora_a_problem(a: Tensor, site: TargetModule, file: Tensors) -> str | None:
    """An error message for a file's lora_A (r, channels, ...), or None. If it has all input
    channels of a grouped convolution, the update mixes groups, which the weight can't represent.
    """
    expected = to_kernel(site.delta.A, site).shape  # type: ignore[arg-type]
    mixes = a.dim() == len(expected) and a.shape[1] > expected[1]
    hint = "; an update that mixes the groups of a convolution is not supported" * mixes
    return _shape_problem(a, expected, hint)


def _shape_problem(found: Tensor, expected: torch.Size, hint: str) -> str | None:
    if found.shape == expected and found.is_floating_point():
        return None
    shape = f"{found.dtype}, shape {list(found.shape)}"
    return f"{shape}, expected floating-point values of shape {list(expected)}{hint}"


def full_w2(w2: Tensor, site: TargetModule) -> Tensor:
    """LoKr's full D, a matrix (o2, i2 * prod(window)), in the shape of the file: (o2, i2, *window),
    or unchanged for a Conv1d.
    """
    return w2 if len(site.window) == 1 else to_kernel(w2, site)


def w2_problem(w2: Tensor, site: TargetModule, file: Tensors) -> str | None:
    """An error message for a file's lokr_w2 (any shape), or None.

    For a Conv1d, PEFT 0.21 computes kron(w2, w1) from a full w2 (o2, i2, k), but kron(w1, w2) from
    factors of w2, as LyCORIS does. Files with such a w2 are therefore rejected, and lorafold writes
    a matrix, which PEFT rejects.
    """
    other = len(site.window) == 1 and w2.dim() == 3
    hint = (
        "; a full lokr_w2 of a Conv1d is not supported: PEFT's order differs from LyCORIS's; train"
        " with a rank below half the larger side of w2, which splits it into two factors" * other
    )
    return _shape_problem(w2, full_w2(site.delta.w2, site).shape, hint)  # type: ignore[arg-type]


def multiply_tucker_cores(file: InMemory) -> InMemory:
    """The tensors of a file, with Tucker cores multiplied into their factors."""
    hidden, factors = set[str](), dict[str, Tensor]()
    for core in [name for name in file.names if name.endswith(TUCKER_CORES)]:
        stem = f"{core[:-2]}w{core[-1]}"
        names = core, f"{stem}_a", f"{stem}_b"
        if not set(names) <= set(file.names):
            continue
        t, a, b = (file.get(name).double() for name in names)
        if t.dim() < 3 or t.shape[:2] != (len(a), len(b)):
            continue
        hidden.update(names)
        factors[names[1]] = a.t().float().contiguous()
        factors[names[2]] = torch.einsum("ij...,jc->ic...", t, b).flatten(1).float().contiguous()
    return file.with_others(hidden, factors)
