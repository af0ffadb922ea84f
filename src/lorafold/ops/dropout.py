"""Dropout whose elements follow from a counter, and are the same in every form and layout.

    dropout(x)[i] = 0 at every element i that is dropped, x[i] / (1 - p) elsewhere
    element (t, j) of x (T, in) is dropped where h < round(65536 p), h 16 bits of
    philox(counter = (call of j, position of t, row of t, site), key of the step)

Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3") gives four words
of 32 bits for a counter under a key and keeps no state. A call of it has 16 bits for each of 8
neighbours: the low and the high half of each of its four words, call 0 for the first 8 elements of
a row. Tokens have names (`core.selection`), so the elements that are dropped of a row depend on
nothing but its own name, and a resumed run or a replay draws the same. Where tokens have no names,
each draw takes a key from torch's default generator of the CPU.

On a CPU the indices of the n p dropped elements are kept for the backward instead of a mask; where
a tensor's size must not be random (accelerators, compiled code), a boolean mask is used. The factor
1 / (1 - p) is a Python float, so that it can be multiplied into an fp32 factor. Use `shared` inside
a fused operation, `dropout` anywhere else.

1024 x 576 in bf16, p = 0.05, one thread of an AMD EPYC with AVX2: 0.37 ms in C++, 6 in the plain
form, 5.2 for `torch.nn.functional.dropout`.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor
from torch.autograd import Function

from lorafold.core.selection import DrawSite
from lorafold.ops.checkpoint_segments import running_segment
from lorafold.ops.kernel_requirements import kind_of
from lorafold.ops.operators import operator

AT_ONCE = 1 << 16  # calls whose words are in memory together


def keep_scale(p: float) -> float:
    """1 / (1 - p), the factor of the kept elements that preserves the mean.

    Raises ValueError for p outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability: found {p!r}, expected 0 or more and below 1")
    return 1 / (1 - p)


def threshold(p: float) -> int:
    """The number of 16-bit values that drop an element."""
    return min(round(p * (1 << 16)), (1 << 16) - 1)


def dropped(x: Tensor, p: float, site: DrawSite | None = None) -> tuple[Tensor, Tensor]:
    """x (..., in) with zeros at the sampled elements, and their places: ascending indices (m,),
    int32, in the flattened x, or a boolean mask in x's shape. There is no gradient. Raises
    ValueError for p outside [0, 1).
    """
    keep_scale(p)
    x = x.detach()
    if not p or not x.numel():
        return x, torch.empty(0, dtype=torch.int32, device=x.device)
    key, names, number = (0, None, 0) if site is None else site
    if kind_of(x) == "cpu":
        where = PLACES(x, p, names, key, number)
        EMPTY(masked := x.clone(memory_format=torch.contiguous_format), where)
        return masked, where
    return MASKED(x, p, names, key, number)


def source(x: Tensor, names: Tensor | None, key: int) -> tuple[Tensor, int]:
    """The names of the rows of x, flattened, and the key; both made up, the key by torch's
    generator, where there are no names. x (..., in).
    """
    if names is not None:
        return names.flatten(), key
    rows = torch.arange(x.numel() // x.shape[-1], device=x.device)
    return rows, int(torch.empty((), dtype=torch.int64).random_())


def _mask(x: Tensor, p: float, names: Tensor | None, key: int, site: int) -> Tensor:
    names, key = source(x, names, key)
    calls = torch.arange(-(-x.shape[-1] // 8), device=x.device)
    limit = threshold(p)
    parts = []
    for chunk in names[:, None].split(max(1, AT_ONCE // len(calls))):
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
# the expected number of places
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


def emptied(x: Tensor, where: Tensor) -> Tensor:
    """A copy of x, of any shape, with zeros at the elements that `dropped` drew."""
    if where.dtype is torch.bool:
        return x.masked_fill(where, 0)
    copy = x.clone(memory_format=torch.contiguous_format)
    EMPTY(copy, where)
    return copy


def _empty(x: Tensor, where: Tensor) -> None:
    flat = x.view(-1)
    if where.dtype is torch.bool:
        flat.masked_fill_(where.flatten(), 0)
    else:
        flat.index_fill_(0, where.long(), 0)


# `emptied` in place, for a contiguous x of any shape with the same number of elements
EMPTY = operator("empty_(Tensor(a!) x, Tensor where) -> ()", _empty, lambda x, where: None)


class _Kept(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, masked: Tensor, where: Tensor) -> Tensor:
        ctx.save_for_backward(where)
        return masked.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (where,) = ctx.saved_tensors
        return _Kept.apply(g, emptied(g.detach(), where), where), None, None


class Dropped(NamedTuple):
    """An input (..., in) with dropped elements; which these are (see `dropped`); the factor that
    makes up for them; and the version of the input, the checkpointed segment and the readers that
    they are for.
    """

    x: Tensor
    where: Tensor
    scale: float
    version: int | None
    segment: ReferenceType[Any] | None
    readers: set[int]


def shared(x: Tensor, p: float, reader: int, site: DrawSite | None = None) -> Dropped:
    """x, of any shape, with dropped elements, sampled once for all layers that read this tensor: q,
    k and v, or gate and up, which know nothing of each other.

    The result is kept on x itself, and follows from the site of the first reader. A reader never
    gets the draw of another one twice. A checkpointed segment shares with no other one, since it
    must draw the same elements when it is replayed alone. There is no gradient. Raises ValueError
    for p outside [0, 1).
    """
    # inference tensors have no version counter
    segment, version = running_segment(), None if x.is_inference() else x._version
    known = vars(x).setdefault("_lorafold_dropped", {})
    result = known.get(p)
    same = result and version is not None and result[3:5] == (version, segment)
    if result is None or not same or reader in result.readers:
        sampled = dropped(x, p, site)
        known[p] = result = Dropped(*sampled, keep_scale(p), version, segment, set())
    result.readers.add(reader)
    return result


def dropout(x: Tensor, p: float, site: DrawSite | None = None) -> Tensor:
    """Dropout of x, of any shape, in its dtype; for the backward the indices are kept and not x.

    Raises ValueError for p outside [0, 1).
    """
    if torch.compiler.is_compiling():
        return x.masked_fill(torch.rand(x.shape, device=x.device) < p, 0) * keep_scale(p)
    masked = _Kept.apply(x, *dropped(x, p, site))
    return masked * keep_scale(p)


WORD = (1 << 32) - 1
FACTORS = 0xD2511F53, 0xCD9E8D57
STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> tuple[Any, ...]:
    """The four words for a counter under a key of 64 bits."""
    a, b, c, d = counter
    k, m = key & WORD, key >> 32 & WORD
    for _ in range(ROUNDS):
        # products of int64 tensors wrap around, which leaves their 64 bits right; b and d have more
        # than 32 bits on the way
        x, y = FACTORS[0] * a, FACTORS[1] * c
        a, b, c, d = ((y >> 32) ^ b ^ k) & WORD, y, ((x >> 32) ^ d ^ m) & WORD, x
        k, m = (k + STEPS[0]) & WORD, (m + STEPS[1]) & WORD
    return a, b & WORD, c, d & WORD


def key_of(seed: int, step: int) -> int:
    """The key of a step of a run: 63 bits that look like any other's."""
    low, high, *_ = philox((step & WORD, step >> 32 & WORD, 0, 0), seed)
    return (high << 32 | low) >> 1
