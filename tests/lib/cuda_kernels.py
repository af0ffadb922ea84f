"""Kernels that only CUDA has, in plain torch, for `shadow`: what a CPU build would take apart is
one launch here too, and what the kernel refuses is refused.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.ops.arithmetic import HALF
from lorafold.ops.attention import FLASH_CAPABILITY, FLASH_HEAD_UNIT, FLASH_MAX_HEAD_SIZE
from shadow import STANDINS, WHERE, Shadow

aten = torch.ops.aten


def one_norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (x.float() * rstd * gain.float()).to(x.dtype), rstd


def one_norm_backward(g: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    wide, gw = x.float(), g.float() * gain.float()
    inner = (gw * wide).mean(-1, keepdim=True)
    gx = (rstd * gw - wide * rstd**3 * inner).to(x.dtype)
    return gx, (g.float() * wide * rstd).flatten(0, -2).sum(0).to(gain.dtype)


OWN = torch.library.Library("shadow", "DEF")
OWN.define("rms_norm(Tensor x, Tensor gain, float eps) -> (Tensor, Tensor)")
OWN.define("rms_norm_backward(Tensor g, Tensor x, Tensor gain, Tensor rstd) -> (Tensor, Tensor)")
OWN.impl("rms_norm", one_norm, "CompositeExplicitAutograd")
OWN.impl("rms_norm_backward", one_norm_backward, "CompositeExplicitAutograd")


class OneNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.shadow.rms_norm(x, gain, eps)
        ctx.save_for_backward(x, gain, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return *torch.ops.shadow.rms_norm_backward(g, *ctx.saved_tensors), None


torch_norm = F.rms_norm


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: Any = None) -> Tensor:
    """`F.rms_norm`, one kernel on CUDA in either direction."""
    if x.device.type == "cpu" or weight is None:
        return torch_norm(x, shape, weight, eps)
    if torch.is_grad_enabled():
        return OneNorm.apply(x, weight, eps)
    y: Tensor = torch.ops.shadow.rms_norm(x, weight, eps)[0]
    return y


def documents(
    q: Tensor, k: Tensor, v: Tensor, q_lens: list[int], k_lens: list[int], window: int,
    scale: float | None, g: Tensor | None = None,
) -> Any:  # fmt: skip
    """Attention by document in fp32, aligned at the last key, or its gradients given `g`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups, at, key_at = q.shape[1] // k.shape[1], 0, 0
    out: list[Tensor] = []
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for n, m in zip(q_lens, k_lens, strict=True):
        rows, keys = slice(at, at + n), slice(key_at, key_at + m)
        at, key_at = at + n, key_at + m
        pairs = ((q, rows), (k, keys), (v, keys))
        qi, ki, vi = (x[part].transpose(0, 1).float() for x, part in pairs)
        ki, vi = (x.repeat_interleave(groups, 0) for x in (ki, vi))
        back = torch.arange(m - n, m)[:, None] - torch.arange(m)
        seen = back >= 0 if window < 0 else (back >= 0) & (back <= window)
        p = torch.softmax((qi @ ki.mT * scale).masked_fill(~seen, float("-inf")), -1)
        if g is None:
            out.append((p @ vi).transpose(0, 1))
            continue
        gi = g[rows].transpose(0, 1).float()
        gp = gi @ vi.mT
        gs = (gp - (gp * p).sum(-1, keepdim=True)) * p * scale
        for part, x in zip(grads, (gs @ ki, gs.mT @ qi, p.mT @ gi), strict=True):
            part.append(x.transpose(0, 1))
    if g is None:
        return torch.cat(out).to(q.dtype)
    gq, gk, gv = (torch.cat(x) for x in grads)
    gk, gv = (x.unflatten(1, (k.shape[1], groups)).sum(2) for x in (gk, gv))
    return gq.to(q.dtype), gk.to(k.dtype), gv.to(v.dtype)


def flash(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, causal: bool = False,
    scale: Any = None, window: Any = (-1, 0), *_: Any, **__: Any,
) -> Any:  # fmt: skip
    """The forward of `varlen_attn`, which refuses what the kernel refuses."""
    capability = torch.cuda.get_device_capability()
    told = (q.shape, v.shape, q.dtype, capability)
    assert q.dtype in HALF, told
    assert capability >= FLASH_CAPABILITY, told
    assert q.shape[-1] == v.shape[-1] <= FLASH_MAX_HEAD_SIZE, told
    assert q.shape[-1] % FLASH_HEAD_UNIT == 0, told
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "last dimension not contiguous"
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q[-1]) == len(q)
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    y = documents(q, k, v, cu_q.diff().tolist(), cu_k.diff().tolist(), window[0], scale)
    return y, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def flash_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_q: Any, cu_k: Any, max_q: int,
    max_k: int, causal: bool, rng: Any, scale: Any = None, window: Any = (-1, 0),
) -> Any:  # fmt: skip
    return documents(q, k, v, cu_q.diff().tolist(), cu_k.diff().tolist(), window[0], scale, g)


def in_full(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention`, of which a build without Apple's has no form for it."""
    assert not dropout_p
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ v


def install() -> None:
    """Have shadows computed by these kernels from now on, and torch's helpers know shadows."""
    from torch.nn.attention import varlen  # noqa: F401  (its import defines the operators)
    from torch.optim import optimizer
    from torch.utils import _foreach_utils

    F.rms_norm = rms_norm  # type: ignore[assignment]
    STANDINS[torch.ops.torch_attn._varlen_attn.default] = flash
    STANDINS[torch.ops.torch_attn._varlen_attn_backward.default] = flash_backward
    STANDINS[aten.mm.dtype] = lambda a, b, dtype: a.to(dtype) @ b.to(dtype)
    STANDINS[aten.bmm.dtype] = lambda a, b, dtype: a.to(dtype) @ b.to(dtype)
    STANDINS[aten.addmm.dtype] = lambda c, a, b, dtype, beta=1, alpha=1: torch.addmm(
        c.to(dtype), a.to(dtype), b.to(dtype), beta=beta, alpha=alpha
    )
    # CUDA's takes integers
    STANDINS[aten.histc.default] = lambda x, *more, **options: torch.histc(
        x.float(), *more, **options
    ).to(x.dtype)
    if WHERE.type == "mps":
        F.scaled_dot_product_attention = in_full
    elif not torch.backends.cuda.is_built():
        # a CPU build knows no kernel for CUDA here and would take the operation apart
        library = torch.library.Library("aten", "IMPL")
        library.impl("silu_backward", lambda g, x: NotImplemented, "CUDA")
        STANDINS[library] = library.impl  # kept
    for known in (_foreach_utils._foreach_supported_types, optimizer._foreach_supported_types):
        if Shadow not in known:
            known.append(Shadow)  # else clipping would be a loop over parameters
