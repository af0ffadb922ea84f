"""The KV cache of all running requests, in one buffer a layer: (slots, Hk, columns, D).

A request has a slot, a row of the buffers. A forward pass gets a `SlotView` in place of
transformers' cache: it writes T tokens of each of its rows from that row's own position on, and
reads the rows up to the longest. The mask (`lorafold.engine.operations`) finds the rows' positions
in `get_query_offset`. A slot is zeroed before it is used again, since 0 times a stale NaN in a
masked position would be NaN.

`CachedPrefixes` has the content of free slots, for requests with the same prefix. Found by tokens
alone, one adapter's cache would serve another (vLLM #30931), and by name that of files which were
replaced (#42125); so a prefix is found under its own `PrefixKey` only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lorafold.engine.operations import Operations
from lorafold.ops.host_tensors import on_host, sent

# what keys and values depend on, besides their tokens and the engine's base: the number of the call
# that made the adapter known (0 for the base), and the tenant
PrefixKey = tuple[int, str]
STEP = 32  # reads are as wide as a multiple of this, so that few shapes occur


class SlotCache:
    """The buffers of all layers, which are made when a layer first writes, and grow up to `length`
    tokens, and `padding` behind those; with `whole` all passes read whole slots.
    """

    def __init__(
        self, slots: int, length: int, padding: int, operations: Operations, whole: bool = False
    ) -> None:
        self.operations, self.slots, self.whole = operations, slots, whole
        self.filled, self.length = columns(length), columns(length + padding)
        self.keys: dict[int, Tensor] = {}  # by layer: (slots, Hk, columns, D)
        self.values: dict[int, Tensor] = {}

    def buffers(self, layer: int, key: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (slots, Hk, columns, D), at least `width` columns wide."""
        for buffers, like in ((self.keys, key), (self.values, value)):
            old = buffers.get(layer)
            if old is None or old.shape[2] < width:
                buffers[layer] = self._grown(old, like, width)
        return self.keys[layer], self.values[layer]

    def _grown(self, old: Tensor | None, like: Tensor, width: int) -> Tensor:
        before = 0 if old is None else old.shape[2]
        # padding is written behind long prompts alone
        most = self.filled if width <= self.filled else self.length
        shape = (self.slots, like.shape[1], min(most, max(width, 2 * before)), like.shape[3])
        with torch.inference_mode(False):
            buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if old is not None:
                buffer[:, :, :before] = old
        return buffer

    def zero(self, slot: int, after: int = 0) -> None:
        """Forget the tokens of a slot after the first ones."""
        for buffer in self.all_buffers():
            buffer[slot, :, after:].zero_()

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        """Copy the first tokens of a slot to other ones."""
        for buffer in self.all_buffers():
            for target in targets:
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def swap(self, a: int, b: int, tokens: int) -> None:
        """Exchange the first tokens of two slots."""
        for buffer in self.all_buffers():
            buffer[[a, b], :, :tokens] = buffer[[b, a], :, :tokens]

    def all_buffers(self) -> Iterator[Tensor]:
        """All keys and values, each (slots, Hk, columns, D)."""
        return chain(self.keys.values(), self.values.values())

    def width(self, longest: int) -> int:
        """The columns that a pass reads whose longest row has that many tokens."""
        return self.length if self.whole else min(self.length, columns(longest))

    def emptied(self) -> SlotCache:
        """A cache of the same sizes without buffers."""
        fresh = copy(self)
        fresh.keys, fresh.values = {}, {}
        return fresh


def columns(tokens: int) -> int:
    """The columns for so many tokens."""
    return -(-tokens // STEP) * STEP


class SlotView(Cache):
    """Rows of a `SlotCache` as the cache of forward passes; `aim` chooses them."""

    def __init__(self, of: SlotCache) -> None:
        super().__init__(layers=[])
        self.of = of

    def aim(self, rows: slice | Tensor, start_B: Tensor, tokens: int) -> SlotView:
        """Point the view at the slots of a pass that writes `tokens` to each after its start_B."""
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
        """Write keys and values (B, Hk, T, D) and return the rows' whole (B, Hk, width, D)."""
        keys, values = self.of.buffers(layer_idx, key_states, value_states, self.width)
        for buffer, new in ((keys, key_states), (values, value_states)):
            self.of.operations.write(buffer, new, self.row_B, self.start_B)
        return keys[self.rows, :, : self.width], values[self.rows, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.start_B.max())

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override] # (B,)
        """How many tokens each row holds (B,), where transformers' own caches have one number."""
        return self.start_B

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.of.length


class CachedSlot(NamedTuple):
    """The content of a free slot; later ones have a larger `age`."""

    prefix: PrefixKey
    tokens: tuple[int, ...]
    age: int


class CachedPrefixes:
    """The free slots with content, by their number."""

    def __init__(self) -> None:
        self.slots: dict[int, CachedSlot] = {}
        self._clock = count(1)

    def add(self, slot: int, prefix: PrefixKey, tokens: Sequence[int]) -> None:
        """Remember the content of a slot that became free."""
        self.slots[slot] = CachedSlot(prefix, tuple(tokens), next(self._clock))

    def find(self, prefix: PrefixKey, prompt: Sequence[int]) -> tuple[int, int]:
        """The slot with the longest prefix of the prompt, and its length, or (-1, 0)."""
        best, most = -1, 0
        for slot, cached in self.slots.items():
            if cached.prefix == prefix and (n := common(cached.tokens, prompt[:-1])) > most:
                best, most = slot, n
        return best, most

    def age(self, slot: int) -> int:
        """The age of a free slot, 0 if it is empty."""
        return self.slots[slot].age if slot in self.slots else 0

    def length(self, slot: int) -> int:
        """The number of tokens in a free slot."""
        return len(self.slots[slot].tokens) if slot in self.slots else 0

    def moved(self, source: int, target: int) -> None:
        """The content of a free slot, if any, is in another one now."""
        if source in self.slots:
            self.slots[target] = self.slots.pop(source)


def common(a: Sequence[object], b: Sequence[object]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
