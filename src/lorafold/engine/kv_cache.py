"""The KV cache of running requests, with buffers (slots, Hk, columns, D) for each layer.

The model receives a `SlotView` as its cache. It writes T tokens per row at the row's position, and
reads the columns up to the longest row's end. A slot is zeroed before reuse, because a stale NaN at
a masked position would be multiplied by 0, which is NaN.

Cached prefixes are found by `PrefixKey` and tokens. Tokens alone would mix adapters (vLLM issue
30931), and the adapter's name would reuse results of older files (vLLM issue 42125).
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
from lorafold.ops.host_tensors import on_host, send

# (`KnownAdapter.generation` or 0 for the base, tenant)
PrefixKey = tuple[int, str]
WIDTH_STEP = 32  # widths are rounded up to multiples, so that few shapes occur


class SlotCache:
    """The KV buffers of all layers. A layer's first write creates them; they grow up to `length +
    padding` tokens. With `whole`, all passes read whole slots, so that their shapes are equal.
    """

    def __init__(
        self, slots: int, length: int, padding: int, operations: Operations, whole: bool = False
    ) -> None:
        self.operations, self.slots, self.whole = operations, slots, whole
        self.filled, self.length = round_up(length), round_up(length + padding)
        self.keys: dict[int, Tensor] = {}  # by layer: (slots, Hk, columns, D)
        self.values: dict[int, Tensor] = {}

    def buffers(self, layer: int, key: Tensor, value: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values (slots, Hk, columns, D) with `width` or more columns."""
        for buffers, like in ((self.keys, key), (self.values, value)):
            old = buffers.get(layer)
            if old is None or old.shape[2] < width:
                buffers[layer] = self._grow(old, like, width)
        return self.keys[layer], self.values[layer]

    def _grow(self, old: Tensor | None, like: Tensor, width: int) -> Tensor:
        before = 0 if old is None else old.shape[2]
        # only chunks at the end of a slot write padding beyond `filled`
        most = self.filled if width <= self.filled else self.length
        shape = (self.slots, like.shape[1], min(most, max(width, 2 * before)), like.shape[3])
        with torch.inference_mode(False):
            buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if old is not None:
                buffer[:, :, :before] = old
        return buffer

    def zero(self, slot: int, after: int = 0) -> None:
        for buffer in self.all_buffers():
            buffer[slot, :, after:].zero_()

    def copy(self, source: int, targets: Sequence[int], tokens: int) -> None:
        for buffer in self.all_buffers():
            for target in targets:
                buffer[target, :, :tokens] = buffer[source, :, :tokens]

    def swap(self, a: int, b: int, tokens: int) -> None:
        for buffer in self.all_buffers():
            buffer[[a, b], :, :tokens] = buffer[[b, a], :, :tokens]

    def all_buffers(self) -> Iterator[Tensor]:
        """Returns the keys and values of all layers, each (slots, Hk, columns, D)."""
        return chain(self.keys.values(), self.values.values())

    def width(self, longest: int) -> int:
        return self.length if self.whole else min(self.length, round_up(longest))

    def empty_copy(self) -> SlotCache:
        fresh = copy(self)
        fresh.keys, fresh.values = {}, {}
        return fresh


def round_up(tokens: int) -> int:
    return -(-tokens // WIDTH_STEP) * WIDTH_STEP


class SlotView(Cache):
    """A transformers cache over the slots of a `SlotCache` that `select` chooses."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__(layers=[])
        self.cache = cache

    def select(self, rows: slice | Tensor, start_B: Tensor, tokens: int) -> SlotView:
        """Selects the slots for a forward pass, which writes `tokens` tokens to each from start_B
        on.
        """
        self.rows, self.start_B = rows, start_B
        self.longest = int(on_host(start_B).max()) + tokens
        self.width = self.cache.width(self.longest)
        index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        self.row_B = send(index, start_B.device)
        self.position_BT = start_B[:, None] + torch.arange(tokens, device=start_B.device)
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, Hk, T, D), and returns all keys and values of these rows (B,
        Hk, width, D).
        """
        keys, values = self.cache.buffers(layer_idx, key_states, value_states, self.width)
        for buffer, new in ((keys, key_states), (values, value_states)):
            self.cache.operations.write(buffer, new, self.row_B, self.start_B)
        return keys[self.rows, :, : self.width], values[self.rows, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.start_B.max())

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override] # (B,)
        """Returns the number of cached tokens of each row (B,). transformers' own caches return a
        scalar.
        """
        return self.start_B

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.width, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.cache.length


class CachedSlot(NamedTuple):
    """The reusable KV cache in a free slot. A larger `age` is more recent."""

    prefix: PrefixKey
    tokens: tuple[int, ...]
    age: int


class CachedPrefixes:
    def __init__(self) -> None:
        self.slots: dict[int, CachedSlot] = {}
        self._clock = count(1)

    def add(self, slot: int, prefix: PrefixKey, tokens: Sequence[int]) -> None:
        self.slots[slot] = CachedSlot(prefix, tuple(tokens), next(self._clock))

    def find(self, prefix: PrefixKey, prompt: Sequence[int]) -> tuple[int, int]:
        """Returns the slot with the longest common prefix and the prefix's length, or (-1, 0). The
        last token never counts, because its logits must be computed.
        """
        best, most = -1, 0
        for slot, cached in self.slots.items():
            if cached.prefix == prefix and (n := common_length(cached.tokens, prompt[:-1])) > most:
                best, most = slot, n
        return best, most

    def age(self, slot: int) -> int:
        return self.slots[slot].age if slot in self.slots else 0

    def length(self, slot: int) -> int:
        return len(self.slots[slot].tokens) if slot in self.slots else 0

    def move(self, source: int, target: int) -> None:
        if source in self.slots:
            self.slots[target] = self.slots.pop(source)


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
