"""Chooses whether a CPU multiplies 16-bit matrices in 16 bits or converts them to fp32.

    x W^T = round(wide(x) wide(W)^T)        wide: to fp32, exact; both ways sum in fp32

x86 processors with AMX, and AMD processors with AVX512-BF16, multiply bf16 at least twice as fast
as fp32; other x86 processors are faster in fp32, and other CPUs multiply in 16 bits. The choice
depends on the processor's features and not on a measurement, so that runs are reproducible. A
backward pass uses the dtype of its forward pass.
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
from torch.utils.weak import WeakTensorKeyDictionary

from lorafold.core.contexts import UnchangedScope, in_backward, scope
from lorafold.ops.autocast import Exact

CPU = torch.device("cpu")
HALF = (torch.float16, torch.bfloat16)
# with fewer input vectors, most of the time goes into reading W, which is half as large in 16 bits
MIN_ROWS = 64
# kernels may sum in a different order if there are fewer rows than this
FEW = 16
# whether to convert to fp32 (None: the processor decides), and from how many input vectors on
_override: ContextVar[tuple[bool | None, int]] = ContextVar("widened", default=(None, MIN_ROWS))


@contextmanager
def override_widening(*, widened: bool, rows: int = MIN_ROWS) -> Iterator[None]:
    """Context manager: overrides whether 16-bit matrices are converted to fp32, in this thread or
    task.
    """
    token = _override.set((widened, rows))
    try:
        yield
    finally:
        _override.reset(token)


def widens(dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Returns whether 16-bit matrices are converted to fp32 on this device; False on all devices
    but the CPU.
    """
    if dtype not in HALF or device.type != "cpu":
        return False
    chosen, _ = _override.get()
    return is_fp32_faster(dtype) if chosen is None else chosen


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which x (..., in) is multiplied. Converting to fp32 pays off only from a
    certain number of rows on.
    """
    if torch.compiler.is_compiling() or not widens(x.dtype, x.device):
        return x.dtype
    return torch.float32 if x.numel() >= _override.get()[1] * x.shape[-1] else x.dtype


@cache
def is_fp32_faster(dtype: torch.dtype) -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_amx_tile_supported():
        return False
    info = Path("/proc/cpuinfo")
    flags = (info.read_text() if info.exists() else platform.processor()).replace(",", " ").split()
    if dtype is torch.float16:
        return "avx512_fp16" not in flags
    return not (torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in flags)


@cache
def multiplies_bf16() -> bool:
    """Returns whether oneDNN multiplies bf16 matrices on this processor."""
    available = torch.backends.mkldnn.is_available()
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Widened(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, m)
        ctx.bias = None if b is None else b.dtype
        return F.linear(x.float(), m.float(), None if b is None else b.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, m = ctx.saved_tensors
        wide = g.float()
        need_x, need_m, need_b = ctx.needs_input_grad
        gx = (wide @ m.float()).to(x.dtype) if need_x else None
        gm = (wide.t() @ x.float()).to(m.dtype) if need_m else None
        return gx, gm, wide.sum(0).to(ctx.bias) if need_b else None


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, k: float = 1.0) -> Tensor:
    """Returns k a b (n, m) in `dtype`, for a (n, l) and b (l, m). On CUDA, fp32 results are not
    rounded to 16 bits first.
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
    """Returns the keyword argument for matmuls with fp32 results, for 16-bit matrices a (any shape)
    on CUDA.
    """
    widens_sums = a.is_cuda and a.dtype in HALF and dtype is torch.float32
    return {"out_dtype": dtype} if widens_sums else {}


def transposed_matmul(a: Tensor, b: Tensor, dtype: torch.dtype, k: float = 1.0) -> Tensor:
    """Returns k (a b)^T (m, n), contiguous, in `dtype`, for a (n, l) and b (l, m)."""
    if a.is_cuda:
        return matmul(b.t(), a.t(), dtype, k)
    # a CPU multiplies (r, T) with (T, out) faster than (out, T) with (T, r)
    y = a.new_empty((b.shape[1], len(a)), dtype=dtype).copy_((a @ b).t())
    return y if k == 1.0 else y.mul_(k)


def linear(x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
    """Returns x m^T + b (..., k) in x's dtype, for x (..., in), m (k, in), b (k,) or None."""
    if matmul_dtype(x) is x.dtype:
        return F.linear(x, m.to(x.dtype), None if b is None else b.to(x.dtype))
    return _Widened.over_rows(x, m, b)


ScaleAndDtype = tuple[float, torch.dtype]


class _Copy:
    """A cached copy k x in another dtype, with the scopes in which it was computed and last used.
    """

    def __init__(self, x: Tensor, form: ScaleAndDtype, family: _Family) -> None:
        self.factor, self.form, self.family = weakref.ref(x), form, family
        self.value = torch.empty_like(x, dtype=form[1], requires_grad=False)
        torch.mul(x.detach(), form[0], out=self.value)
        self.made = self.asked = family.during


class _Family:
    """The copies used in one training step, which are recomputed together."""

    def __init__(self, during: UnchangedScope) -> None:
        self.during = during
        self.copies: list[weakref.ref[_Copy]] = []

    def renew(self, during: UnchangedScope) -> None:
        """Recomputes the copies that the previous scope used, in a few kernels, and drops the
        others.
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


def scaled_as(x: Tensor, k: float, dtype: torch.dtype) -> Tensor:
    """Returns k x (any shape), rounded once to `dtype`, or x itself if nothing changes. Not
    differentiable.

    On CUDA, copies of parameters are cached for a training step (`core.contexts`), because each
    would cost two kernel launches per layer and micro-batch.
    """
    if k == 1.0 and x.dtype is dtype:
        return x
    cached = x.is_cuda and isinstance(x, nn.Parameter) and not torch.compiler.is_compiling()
    if cached and (copy := _cached_copy(x, (k, dtype))) is not None:
        return copy.value
    return torch.mul(x.detach(), k, out=torch.empty_like(x, dtype=dtype, requires_grad=False))


def _cached_copy(x: Tensor, form: ScaleAndDtype) -> _Copy | None:
    during = scope()
    if during is None and not in_backward():
        return None
    forms = _copies.setdefault(x, {})
    copy = forms.get(form)
    if during is None:  # in a backward pass, where the scope is not visible
        return copy if copy is not None and copy.made.open else None
    if copy is not None and copy.family.during is not during:
        copy.family.renew(during)
    if copy is None or copy.made is not during:
        family = during.cache.setdefault(_Family, _Family(during))
        forms[form] = copy = _Copy(x, form, family)
        family.copies.append(weakref.ref(copy))
    copy.asked = during
    return copy
