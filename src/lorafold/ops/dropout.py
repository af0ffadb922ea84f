"""Counter-based dropout: the same elements are dropped on every device and in every layout.

    dropout(x)[i] = 0 at every element i that is dropped, x[i] / (1 - p) elsewhere
    element (t, j) of x (T, in) is dropped if h < round(65536 p), h 16 bits of
    philox(counter = (call of j, position of t, row of t, site), key of the step)

One call of Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") covers
8 neighbouring elements: the low and the high half of each of its four words. Tokens are identified
by names (`core.active_adapters`), so a resumed run or a recomputed checkpoint drops the same
elements; without names, each call takes a key from torch's default CPU generator. For the backward
pass, a CPU keeps the indices of the dropped elements; other devices keep a mask, because its size
does not depend on random numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor
from torch.autograd import Function

from lorafold.core.active_adapters import DropoutSite
from lorafold.ops.checkpoint_segments import running_segment
from lorafold.ops.operators import operator
from lorafold.runtime.assumed_device import device_type

MAX_CALLS = 1 << 16  # Philox calls whose words are in memory at a time


def keep_scale(p: float) -> float:
    """Returns 1 / (1 - p). Raises ValueError for p outside [0, 1)."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability: found {p!r}, expected 0 or more and below 1")
    return 1 / (1 - p)


def threshold(p: float) -> int:
    """Returns the number of 16-bit values for which an element is dropped."""
    return min(round(p * (1 << 16)), (1 << 16) - 1)


def drop_elements(x: Tensor, p: float, site: DropoutSite | None = None) -> tuple[Tensor, Tensor]:
    """Returns x (..., in) with zeros at the dropped elements, and their places: ascending int32
    indices (m,) into the flattened x, or a boolean mask. Not differentiable.
    """
    keep_scale(p)
    x = x.detach()
    if not p or not x.numel():
        return x, torch.empty(0, dtype=torch.int32, device=x.device)
    key, names, number = (0, None, 0) if site is None else site
    if device_type(x) == "cpu":
        where = PLACES(x, p, names, key, number)
        return zero_dropped(x, where), where
    return MASKED(x, p, names, key, number)


def names_and_key(x: Tensor, names: Tensor | None, key: int) -> tuple[Tensor, int]:
    """Returns the flattened names of the rows of x (..., in), and the key; without names, row
    numbers and a random key.
    """
    if names is not None:
        return names.flatten(), key
    rows = torch.arange(x.numel() // x.shape[-1], device=x.device)
    return rows, int(torch.empty((), dtype=torch.int64).random_())


def _mask(x: Tensor, p: float, names: Tensor | None, key: int, site: int) -> Tensor:
    names, key = names_and_key(x, names, key)
    calls = torch.arange(-(-x.shape[-1] // 8), device=x.device)
    limit = threshold(p)
    parts = []
    for chunk in names[:, None].split(max(1, MAX_CALLS // len(calls))):
        words = torch.stack(philox((calls, chunk & WORD, chunk >> 32 & WORD, site), key), -1)
        halves = torch.stack([(words & 0xFFFF) < limit, (words >> 16) < limit], -1)
        parts.append(halves.flatten(1)[:, : x.shape[-1]])
    return torch.cat(parts).view(x.shape)


def _masked(x: Tensor, *draw: Any) -> tuple[Tensor, Tensor]:
    where = _mask(x, *draw)
    return x.masked_fill(where, 0), where


def _places(x: Tensor, *draw: Any) -> Tensor:
    places = _mask(x, *draw).flatten().nonzero()[:, 0]
    return places.to(torch.int32) if x.numel() < 2**31 else places


DRAW = "(Tensor x, float p, Tensor? names, int key, int site) -> Tensor"
# for fake tensors, the expected number of dropped elements
PLACES = operator(
    f"dropped_places{DRAW}",
    _places,
    lambda x, p, *_: x.new_empty(round(x.numel() * p), dtype=torch.int32),
)
MASKED = operator(
    f"masked{DRAW.replace('-> Tensor', '-> (Tensor, Tensor)')}",
    _masked,
    lambda x, p, *_: (x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)),
)


def zero_dropped(x: Tensor, where: Tensor) -> Tensor:
    """Returns a copy of x (any shape) with zeros at the places that `drop_elements` returned."""
    if where.dtype is torch.bool:
        return x.masked_fill(where, 0)
    copy = x.clone(memory_format=torch.contiguous_format)
    EMPTY(copy, where)
    return copy


def _zero_in_place(x: Tensor, where: Tensor) -> None:
    flat = x.view(-1)
    if where.dtype is torch.bool:
        flat.masked_fill_(where.flatten(), 0)
    else:
        flat.index_fill_(0, where.long(), 0)


# `zero_dropped` in place, for a contiguous x of any shape with the same number of elements
EMPTY = operator("empty_(Tensor(a!) x, Tensor where) -> ()", _zero_in_place, lambda x, where: None)


class _Kept(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, masked: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return masked.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (where,) = ctx.saved_tensors
        return _Kept.apply(g, zero_dropped(g.detach(), where), where), None, None


class Dropped(NamedTuple):
    """An input (..., in) with dropped elements, the places of these, and the scale of the other
    elements. The version, the segment and the readers determine which layers may share the sample.
    """

    x: Tensor
    where: Tensor
    scale: float
    version: int | None
    segment: ReferenceType[Any] | None
    readers: set[int]


def shared_dropout(x: Tensor, p: float, reader: int, site: DropoutSite | None = None) -> Dropped:
    """Returns x (any shape) with elements dropped once for all layers that read it, such as q, k
    and v.

    The sample is cached on x; a reader that calls again gets a new one. Checkpointed segments do
    not share samples, because each must drop the same elements when it is recomputed alone. Not
    differentiable.
    """
    # inference tensors have no version counter
    segment, version = running_segment(), None if x.is_inference() else x._version
    known = vars(x).setdefault("_lorafold_dropped", {})
    result = known.get(p)
    same = result and version is not None and result[3:5] == (version, segment)
    if result is None or not same or reader in result.readers:
        sampled = drop_elements(x, p, site)
        known[p] = result = Dropped(*sampled, keep_scale(p), version, segment, set())
    result.readers.add(reader)
    return result


def dropout(x: Tensor, p: float, site: DropoutSite | None = None) -> Tensor:
    """Returns x (any shape) after dropout. The places of the dropped elements are saved for the
    backward pass, and not x.
    """
    if torch.compiler.is_compiling():
        return x.masked_fill(torch.rand(x.shape, device=x.device) < p, 0) * keep_scale(p)
    return _Kept.apply(x, *drop_elements(x, p, site)) * keep_scale(p)


WORD = (1 << 32) - 1
FACTORS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> tuple[Any, ...]:
    """Returns the four 32-bit words of Philox4x32-10 for a counter under a 64-bit key."""
    a, b, c, d = counter
    k, m = key & WORD, key >> 32 & WORD
    for _ in range(ROUNDS):
        # int64 products wrap around, which keeps their low 64 bits correct; b and d exceed 32 bits
        # until the end
        x, y = FACTORS[0] * a, FACTORS[1] * c
        a, b, c, d = ((y >> 32) ^ b ^ k) & WORD, y, ((x >> 32) ^ d ^ m) & WORD, x
        k, m = (k + KEY_STEPS[0]) & WORD, (m + KEY_STEPS[1]) & WORD
    return a, b & WORD, c, d & WORD


def key_of(seed: int, step: int) -> int:
    """Returns the 63-bit key of a training step, for a run's seed."""
    low, high, *_ = philox((step & WORD, step >> 32 & WORD, 0, 0), seed)
    return (high << 32 | low) >> 1
