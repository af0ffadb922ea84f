"""Whether 16-bit matrices are multiplied in 16 bits or widened to fp32: whichever is faster on this
processor.

    x W^T = round(wide(x) wide(W)^T)        wide: to fp32, exact; the sum is fp32 either way, and is
                                            rounded once
    with multiplying(widened=True): ...     overrides the choice until the `with` block ends

A processor with matrix units (AMX), or with AVX512-BF16 at full rate (AMD's), multiplies bf16 at
twice the rate of fp32 or more; Intel's without AMX reach half the rate of fp32, and others a tenth
or less. The kind of processor decides, not a measurement, so that a run is reproducible on a busy
machine too. A backward multiplies in the same dtype as its forward. Graphs made by `torch.compile`,
and devices other than the CPU, always multiply 16-bit matrices in 16 bits.

`narrowed` casts trained factors to the dtype of matmuls. On a GPU, cast where they are used, they
are two launches in each layer and micro-batch. No factor changes between two updates of the
optimizer (`core.contexts`), so the first copy that is asked for in a step has all made again that
the step before asked for, in a few launches for the whole model.

1024 x 576 times 576 x 1536 on two cores in GFLOP/s, bf16 and widened: Intel Xeon with AVX512-BF16
but without AMX 165 and 300, its gradient 165 and 280; the same restricted to AVX2 27 and 280, its
gradient 5 and 285. AMD EPYC with AVX512-BF16: bf16 400, fp32 140 to 180.
"""

from __future__ import annotations

import platform
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lorafold.core.contexts import Scope, in_backward, scope
from lorafold.ops.autocast import Exact
from lorafold.ops.kernel_requirements import HALF

CPU = torch.device("cpu")
# with fewer input vectors, reading W takes most of the time, which is half as long in 16 bits
ROWS = 64
# numbers of rows that kernels may sum in orders of their own: so many have the order of all more
FEW = 16
# whether to widen, None where the processor decides, and from how many input vectors on
_chosen: ContextVar[tuple[bool | None, int]] = ContextVar("widened", default=(None, ROWS))


@contextmanager
def multiplying(*, widened: bool, rows: int = ROWS) -> Iterator[None]:
    """Multiply 16-bit matrices widened to fp32, or in 16 bits, whatever the processor is.

    It holds in this thread or task until the `with` block ends. Of several, the innermost counts.
    """
    token = _chosen.set((widened, rows))
    try:
        yield
    finally:
        _chosen.reset(token)


def widens(dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Whether matrices of that dtype are widened on that device.

    On the CPU, 16-bit ones are if `multiplying` says so, or by default if that is faster.
    """
    if dtype not in HALF or device.type != "cpu":
        return False
    chosen, _ = _chosen.get()
    return widening_pays(dtype) if chosen is None else chosen


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype in which x (..., in) is multiplied: its own, or fp32 if that is chosen by
    `multiplying`, or clearly faster with the conversions counted.
    """
    if torch.compiler.is_compiling() or not widens(x.dtype, x.device):
        return x.dtype
    return torch.float32 if x.numel() >= _chosen.get()[1] * x.shape[-1] else x.dtype


@cache
def widening_pays(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype clearly faster in fp32."""
    if platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_amx_tile_supported():
        return False
    info = Path("/proc/cpuinfo")
    about = info.read_text() if info.exists() else platform.processor()
    flags = about.replace(",", " ").split()
    if dtype is torch.float16:
        return "avx512_fp16" not in flags
    return not (torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in flags)


@cache
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this processor."""
    available = torch.backends.mkldnn.is_available()
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Widened(Exact):
    """x m^T + b in fp32; for the backward it keeps its inputs and no wider copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, m)
        ctx.bias = None if b is None else b.dtype
        y = F.linear(x.float(), m.float(), None if b is None else b.float())
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, m = ctx.saved_tensors
        wide = g.float()
        need_x, need_m, need_b = ctx.needs_input_grad
        gx = (wide @ m.float()).to(x.dtype) if need_x else None
        gm = (wide.t() @ x.float()).to(m.dtype) if need_m else None
        return gx, gm, wide.sum(0).to(ctx.bias) if need_b else None


def product(a: Tensor, b: Tensor, dtype: torch.dtype, k: float = 1.0) -> Tensor:
    """k a b (n, m), in a dtype, of a (n, l) and b (l, m). On CUDA the sums of 16-bit matrices are
    widened to fp32 without rounding, and the matmul applies k.
    """
    if not a.is_cuda:
        y = (a @ b).to(dtype)
        return y if k == 1.0 else y.mul_(k)
    wide = out_dtype(a, dtype)
    if k == 1.0:
        return torch.mm(a, b, **wide).to(dtype)
    unread = a.new_empty((1, 1), dtype=dtype if wide else a.dtype)  # beta is 0
    return torch.addmm(unread, a, b, beta=0, alpha=k, **wide).to(dtype)


def out_dtype(a: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The argument that has CUDA widen the sums of 16-bit matrices, of any shape, to fp32."""
    widens_sums = a.is_cuda and a.dtype in HALF and dtype is torch.float32
    return {"out_dtype": dtype} if widens_sums else {}


def transposed_product(a: Tensor, b: Tensor, dtype: torch.dtype, k: float = 1.0) -> Tensor:
    """k (a b)^T (m, n), contiguous, in a dtype. a, b (n, l), (l, m)."""
    if a.is_cuda:
        return product(b.t(), a.t(), dtype, k)
    # a CPU multiplies (r, T) with (T, out) faster than (out, T) with (T, r)
    y = a.new_empty((b.shape[1], len(a)), dtype=dtype).copy_((a @ b).t())
    return y if k == 1.0 else y.mul_(k)


def linear(x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
    """x m^T + b (..., k), in x's dtype. x (..., in); m (k, in); b (k,) or None."""
    if arithmetic(x) is x.dtype:
        return F.linear(x, m.to(x.dtype), None if b is None else b.to(x.dtype))
    return _Widened.over_rows(x, m, b)


Form = tuple[float, torch.dtype]


class _Copy:
    """k x in a dtype, and the scopes for which it was made and last asked for."""

    def __init__(self, x: Tensor, form: Form, family: _Family) -> None:
        self.factor, self.form, self.family = weakref.ref(x), form, family
        self.value = torch.empty_like(x, dtype=form[1], requires_grad=False)
        torch.mul(x.detach(), form[0], out=self.value)
        self.made = self.asked = family.during


class _Family:
    """The copies that are made together, which one step asked for; each lives with its factor."""

    def __init__(self, during: Scope) -> None:
        self.during = during
        self.copies: list[weakref.ref[_Copy]] = []

    def renew(self, during: Scope) -> None:
        """Make the copies that the last scope used again, for another scope, and forget the rest.
        """
        copies = [(c, x) for ref in self.copies if (c := ref()) and (x := c.factor()) is not None]
        used = [(c, x) for c, x in copies if c.asked is self.during]
        for copy, x in copies:
            if copy.asked is not self.during:
                _copies[x].pop(copy.form)
        self.during, self.copies = during, [weakref.ref(c) for c, _ in used]
        for form in dict.fromkeys(c.form for c, _ in used):
            values, sources = zip(
                *((c.value, x.detach()) for c, x in used if c.form == form), strict=True
            )
            scaled = sources if form[0] == 1.0 else torch._foreach_mul(sources, form[0])
            torch._foreach_copy_(values, scaled)
        for copy, _ in used:
            copy.made = during


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # factor -> {form: its copy}


def narrowed(x: Tensor, k: float, dtype: torch.dtype) -> Tensor:
    """k x, of any shape, multiplied in x's dtype and rounded once to another; x itself where that
    is the same. Not differentiable.
    """
    if k == 1.0 and x.dtype is dtype:
        return x
    cached = x.is_cuda and isinstance(x, nn.Parameter) and not torch.compiler.is_compiling()
    if cached and (copy := _cached(x, (k, dtype))) is not None:
        return copy.value
    return torch.mul(x.detach(), k, out=torch.empty_like(x, dtype=dtype, requires_grad=False))


def _cached(x: Tensor, form: Form) -> _Copy | None:
    """The copy that a step keeps; None outside of one."""
    during = scope()
    if during is None and not in_backward():
        return None
    forms = _copies.setdefault(x, {})
    copy = forms.get(form)
    if during is None:  # in a backward, which does not know of the scope
        return copy if copy is not None and copy.made.open else None
    if copy is not None and copy.family.during is not during:
        copy.family.renew(during)
    if copy is None or copy.made is not during:
        family = during.kept.setdefault(_Family, _Family(during))
        forms[form] = copy = _Copy(x, form, family)
        family.copies.append(weakref.ref(copy))
    copy.asked = during
    return copy
