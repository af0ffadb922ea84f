"""The keys and values of every running request, in one buffer a layer: (slots, Hk, columns, D).

    cache = SlotCache(16, 1024, 256, operations)
    model(ids_BT, cache=cache.view(slice(0, 16), start_B, T), position_ids=...)

A request has a slot, that is a row of the buffers. A view is what one forward pass gets in place
of transformers' cache: it writes T tokens of each of its rows from that row's own position on, and
reads the rows up to the longest. What a row may see is for the mask (`lorafold.engine.operations`),
which finds the rows' positions in `get_query_offset`. A slot is zeroed before it is used again,
since 0 times a stale NaN in a masked position would be NaN.

`KeptPrefixes` knows what free slots still hold, so that a request whose prompt begins the same goes
on from there. Keys and values follow from the base, the adapter and the tokens before. Tokens alone
would give one adapter's cache to another (vLLM #30931), and names that of files which were replaced
(#42125); so a beginning is found under its own `PrefixKey` only. The last token of a prompt is
always computed, since its logits are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lorafold.engine.operations import Operations
from lorafold.ops.host_tensors import on_host, sent

STEP = 32  # reads are as wide as a multiple of this, so that few shapes occur


class SlotCache:
    """The buffers of all layers, which are made when a layer first writes, and grow to the length
    as rows need it: a model may have positions for far more tokens than its requests have.
    """

    def __init__(
        self, slots: int, length: int, padding: int, operations: Operations, whole: bool = False
    ) -> None:
        self.operations, self.slots, self.whole = operations, slots, whole
        self.filled, self.length = columns(length), columns(length + padding)
        self.keys: dict[int, Tensor] = {}  # by layer: (slots, Hk, columns, D)
        self.values: dict[int, Tensor] = {}

    def buffers(self, layer: int, key: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The keys and the values (slots, Hk, columns, D) of a layer."""
        for held, like in ((self.keys, key), (self.values, value)):
            old = held.get(layer)
            if old is None or old.shape[2] < width:
                held[layer] = self._grown(old, like, width)
        return self.keys[layer], self.values[layer]

    def _grown(self, old: Tensor | None, like: Tensor, width: int) -> Tensor:
        before = 0 if old is None else old.shape[2]
        # padding is written where a long prompt is read, which few have
        most = self.filled if width <= self.filled else self.length
        shape = (self.slots, like.shape[1], min(most, max(width, 2 * before)), like.shape[3])
        with torch.inference_mode(False):
            buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if old is not None:
                buffer[:, :, :before] = old
        return buffer

    def zero(self, slot: int, after: int = 0) -> None:
        """Forget what a slot holds after its first tokens."""
        for buffer in self._buffers():
            buffer[slot, :, after:].zero_()

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        """Copy the first tokens of a slot to other ones."""
        for buffer in self._buffers():
            for target in targets:
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first tokens of two slots."""
        for buffer in self._buffers():
            buffer[[a, b], :, :tokens] = buffer[[b, a], :, :tokens]

    def is_finite(self, slot: int) -> bool:
        """Whether all that a slot holds are finite numbers."""
        return all(bool(buffer[slot].isfinite().all()) for buffer in self._buffers())

    def _buffers(self) -> Iterator[Tensor]:
        return chain(self.keys.values(), self.values.values())

    def width(self, longest: int) -> int:
        """How many columns a pass reads whose longest row has that many tokens."""
        return self.length if self.whole else min(self.length, columns(longest))

    def emptied(self) -> SlotCache:
        """Another one of the same sizes, without buffers."""
        fresh = copy(self)
        fresh.keys, fresh.values = {}, {}
        return fresh


def columns(tokens: int) -> int:
    """How many columns so many tokens take."""
    return -(-tokens // STEP) * STEP


class SlotView(Cache):
    """Rows of a `SlotCache` as the cache of forward passes; `aim` says of which.

    Deltas may keep things with it, as they may with any cache.
    """

    def __init__(self, of: SlotCache) -> None:
        super().__init__(layers=[])
        self.of = of

    def aim(self, rows: slice | Tensor, start_B: Tensor, tokens: int) -> SlotView:
        """Point the view at a pass, and return it."""
        self.rows, self.start_B = rows, start_B
        self.longest = int(on_host(start_B).max()) + tokens
        self.width = self.of.width(self.longest)
        index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        self.row_B = sent(index, start_B.device)
        self.position_BT = start_B[:, None] + torch.arange(tokens, device=start_B.device)
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values (B, Hk, T, D) of a layer, and return those of the whole rows,
        (B, Hk, width, D).
        """
        found = []
        states = (key_states, value_states)
        buffers = self.of.buffers(layer_idx, *states, self.width)
        for buffer, new in zip(buffers, states, strict=True):
            self.of.operations.write(buffer, new, self.row_B, self.start_B)
            found.append(buffer[self.rows, :, : self.width])
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.start_B.max())

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override] # (B,)
        """How many tokens each row holds (B,), where transformers' own caches have one number."""
        return self.start_B

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.of.length


@dataclass(frozen=True)
class PrefixKey:
    """What keys and values were computed with, beside their tokens and the engine's one base. No
    name is part of it.
    """

    digest: str
    generation: int
    tenant: str


@dataclass(frozen=True)
class _Slot:
    prefix: PrefixKey
    tokens: tuple[int, ...]
    since: int


class KeptPrefixes:
    """The free slots that hold something, by their number."""

    def __init__(self) -> None:
        self.slots: dict[int, _Slot] = {}
        self._clock = count(1)

    def keep(self, slot: int, prefix: PrefixKey, tokens: Sequence[int]) -> None:
        """Remember what a slot holds."""
        self.slots[slot] = _Slot(prefix, tuple(tokens), next(self._clock))

    def find(self, prefix: PrefixKey, prompt: Sequence[int]) -> tuple[int, int]:
        """The slot that has most of the prompt's first tokens, and how many; (-1, 0) if none has
        any.
        """
        best, most = -1, 0
        for slot, kept in self.slots.items():
            if kept.prefix == prefix and (n := common(kept.tokens, prompt[:-1])) > most:
                best, most = slot, n
        return best, most

    def age(self, slot: int) -> int:
        """The larger, the later a free slot was kept; 0 if it holds nothing."""
        return self.slots[slot].since if slot in self.slots else 0

    def length(self, slot: int) -> int:
        """How many tokens a free slot holds."""
        return len(self.slots[slot].tokens) if slot in self.slots else 0

    def moved(self, source: int, target: int) -> None:
        """A slot's content, if it holds any, is in another free slot now."""
        if source in self.slots:
            self.slots[target] = self.slots.pop(source)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
