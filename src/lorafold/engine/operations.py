"""The operations of a forward pass for one device type (`kernels.registry`), and batch invariance.

Masks and attention support rows at different positions: q (B, H, T, D), k (B, Hk, K, D), v (B, Hk,
K, Dv) -> (B, T, H, Dv). The additive mask is 0 if the model's mask function (causal, sliding,
chunked) lets position start + t attend to j, else -inf.

Kernels sum in another order for few rows, so the bits of a row could depend on the batch:

    m = min_invariant_rows(kernel, x)   kernel(x[:n]) has the bits of kernel(x)[:n] for n >= m
    with BlockMatmuls(16): ...          matmuls of 16 rows at a time, for processors without an m

With `as_trained`, results are bit-identical to training, because attention sums in the same order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lorafold.kernels.registry import DECODING, TRAINING, enable
from lorafold.ops.arithmetic import FEW, matmul_dtype
from lorafold.ops.attention import FORWARD, Scores
from lorafold.ops.decoding import ATTEND, LOW_RANK, STORED
from lorafold.ops.elementwise import GATED, NORM, ROTARY
from lorafold.ops.packed_documents import Documents
from lorafold.ops.scale_and_add import SCALE, plain_scale_and_add
from lorafold.training_step.packed_attention import attend

log = logging.getLogger(__name__)
# numbers of rows that `min_invariant_rows` tries; all up to FEW + 1, because a kernel with blocks
# of 4 rows may sum 8 rows like 12 rows, but not 9
NUM_ROWS = (*range(1, FEW + 2), 40, 64, 100, 256)
MAX_OUT = 4096  # rows of a matrix that `unsteady` measures; an LM head has many more


class Operations:
    def __init__(self, device: str = "", as_trained: bool = False) -> None:
        self.name = (device or "plain") + "_as_trained" * as_trained
        self.stored, self.low_rank = STORED.on(device), LOW_RANK.on(device)
        self.attend = attend_as_trained if as_trained else ATTEND.on(device)
        self.gated, self._scale = GATED.on(device), SCALE.on(device)
        self._norm, self._rotary = NORM.on(device), ROTARY.on(device)

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """Normalizes x (..., d) and multiplies it by the gain (d,) (`ops.elementwise.rms_norm`)."""
        return self._norm(x.contiguous(), gain, eps)

    def scale(self, y: Tensor, g: Tensor, c: Tensor | None) -> Tensor:
        """Returns y (B, T, k) times gains plus offsets, (k,) or (B, k) (`ops.scale_and_add`)."""
        if g.dim() > 1:
            g, c = g[:, None], None if c is None else c[:, None]
        # on CPUs, the call avoids the overhead of PyTorch's dispatcher
        fast = SCALE if y.is_cuda else self._scale
        scaled = fast if y.dtype is torch.bfloat16 else plain_scale_and_add
        return scaled(y.contiguous(), g, c, None)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE of x (..., D) with `rotate_half` (`ops.elementwise.rotary`)."""
        return self._rotary(x, cos, sin, False)


def operations_on(device: str, as_trained: bool = False) -> Operations:
    if why := enable(DECODING, device):
        log.info("the engine uses torch instead of its own kernels: %s", why)
    return Operations("" if why else device, as_trained)


def slot_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function, **protocol: Any,
) -> Tensor | None:  # fmt: skip
    """Implements transformers' mask function. Returns an additive mask (B, 1, T, K) if `q_offset`
    has one position per row (B,), else transformers' boolean mask.
    """
    if not isinstance(q_offset, Tensor) or q_offset.dim() == 0:
        others = protocol | {"q_offset": q_offset, "allow_is_causal_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, **others)
    if protocol.get("use_vmap") or protocol.get("attention_mask") is not None:
        raise NotImplementedError("the attention mask is not a function of positions only")
    device, kv_offset = protocol.get("device", "cpu"), protocol.get("kv_offset", 0)
    b = torch.arange(batch_size, device=device)[:, None, None, None]
    i = (q_offset[:, None] + torch.arange(q_length, device=device))[:, None, :, None]
    j = torch.arange(kv_offset, kv_offset + kv_length, device=device)[None, None, None]
    seen = mask_function(b, torch.zeros_like(b), i, j)
    masked = torch.zeros(seen.shape, dtype=protocol.get("dtype", torch.float32), device=device)
    return masked.masked_fill_(~seen, float("-inf"))


def slot_attention(operations: Operations) -> Callable[..., tuple[Tensor, None]]:
    """Implements transformers' attention function, without dropout, for additive masks (B, 1, T,
    K), boolean masks or none. Softcaps, sinks and position biases use the general attention.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **protocol: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        special = any(protocol.get(n) is not None for n in ("softcap", "s_aux", "position_bias"))
        if attention_mask is None or attention_mask.dtype == torch.bool or special:
            others = protocol | {"dropout": 0.0}
            return attend(module, query, key, value, attention_mask, scaling, **others)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = attention_mask
        if mask.shape[-1] != key.shape[2]:  # avoids slicing in every layer
            mask = mask[..., : key.shape[2]]
        return operations.attend(query, key, value, mask, scale), None

    return attention


def min_invariant_rows(kernel: Callable[..., Tensor], *inputs: Tensor) -> int:
    """Returns the least number of rows of the inputs (n, ...) from which the kernel is batch
    invariant, or the last of NUM_ROWS if there is none.
    """
    whole, min_rows = kernel(*inputs), NUM_ROWS[-1]
    for n in reversed(NUM_ROWS[:-1]):
        for s in range(0, max(FEW - n + 1, 1), n):
            if not torch.equal(kernel(*(t[s : s + n] for t in inputs)), whole[s : s + n]):
                return min_rows
        min_rows = n
    return min_rows


def random_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Returns random rows (n, width) with a fixed seed, for `min_invariant_rows`."""
    return torch.randn(NUM_ROWS[-1], width, generator=torch.Generator().manual_seed(0)).to(dtype)


def min_matmul_rows(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> int:
    """The least number of rows from which PyTorch's matmuls with weights (out, in) of these shapes
    are batch invariant, in `dtype` and in the dtype that `lorafold.ops.arithmetic` uses for it.
    """
    min_rows = 1
    for out, in_features in shapes:
        x = random_rows(in_features, dtype)
        for each in {dtype, matmul_dtype(x)}:
            m = random_rows(in_features, each).repeat(-(-out // NUM_ROWS[-1]), 1)[:out]
            wide = x.to(each)
            # adding the negative product leaves rounding errors, which 16-bit rounding would hide
            left = -F.linear(wide, m)
            kernels = (lambda x, _, m=m: F.linear(x, m)), (lambda x, y, m=m: y.addmm(x, m.t()))
            min_rows = max(min_rows, *(min_invariant_rows(k, wide, left) for k in kernels))
    return min_rows


class BlockMatmuls(TorchDispatchMode):
    """A context that computes matmuls (n, k) x (k, m) in blocks of `rows` rows. The last block is
    padded with copies of row 0.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}
    ) -> Any:
        aten, kwargs = torch.ops.aten, dict(kwargs or {})
        if func in (aten.linear.default, aten.matmul.default):
            with self:  # because inference mode doesn't decompose it
                return func.decompose(*args, **kwargs)
        if func is aten.mm.default:
            return self._blocks(torch.mm, args[:1], args[1:], kwargs)
        if func is aten.addmm.default and args[0].dim() == 2 and len(args[0]) == len(args[1]):
            return self._blocks(torch.addmm, args[:2], args[2:], kwargs)
        if func is aten.addmm.default:
            return self._blocks(partial(torch.addmm, args[0]), args[1:2], args[2:], kwargs)
        if func is aten.addmm_.default:
            return args[0].copy_(self._blocks(torch.addmm, args[:2], args[2:], kwargs))
        return func(*args, **kwargs)

    def _blocks(
        self, product: Callable[..., Tensor], of_rows: Any, rest: Any, options: Any
    ) -> Tensor:
        n = len(of_rows[0])
        more = -n % self.rows
        blocks = [
            torch.cat([t, t[:1].expand(more, -1)]).split(self.rows) if more else t.split(self.rows)
            for t in of_rows
        ]
        parts = [product(*block, *rest, **options) for block in zip(*blocks, strict=True)]
        return torch.cat(parts)[:n] if len(parts) > 1 or more else parts[0]


def lacks(device: str) -> str:
    return enable(TRAINING) if device == "cpu" else f"found a model on {device}, expected the CPU"


def unsteady(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> bool:
    """Whether matmuls with matrices (out, in) are not batch invariant even with FEW rows."""
    return min_matmul_rows({(min(out, MAX_OUT), size) for out, size in shapes}, dtype) > FEW


def attend_as_trained(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Returns attention (B, T, H, Dv) with the summation order of training. If the mask is not
    causal, for example with a sliding window, it uses `ATTEND`.
    """
    rows, heads, tokens, _ = q.shape
    at = torch.arange(k.shape[2])
    lens = (mask[:, 0] == 0).sum(-1)  # (B, T)
    causal = torch.equal(mask[:, 0] == 0, at < lens[..., None])
    if not causal or not torch.equal(lens, lens[:, :1] + torch.arange(tokens)):
        return ATTEND.on(q.device.type)(q, k, v, mask, scale)
    starts, ends = (lens[:, 0] - 1).tolist(), lens[:, -1].tolist()
    row, key = (at < lens[:, -1:]).nonzero(as_tuple=True)
    docs = Documents(tuple(ends), None, tuple(starts))
    flat = q.transpose(1, 2).reshape(rows * tokens, heads, -1)
    out = FORWARD(flat, k[row, :, key], v[row, :, key], docs, Scores(scale, None))
    return out.view(rows, tokens, heads, -1)
