"""The KV cache of running requests, in blocks of BLOCK tokens (Kwon et al. 2023, Efficient Memory
Management for Large Language Model Serving with PagedAttention, SOSP).

Each layer has a pool of blocks for its keys, and one for its values. A row has a block table: its
i-th block contains the tokens from position i * BLOCK on. Several rows can have the same block,
which is then full and never written again. Free blocks are zero, because a stale NaN at a masked
position would be multiplied by 0, which is NaN. Only real tokens are written, never padding.

Cached prefixes are found by `PrefixKey` and tokens. Tokens alone would mix adapters (vLLM issue
30931), and the adapter's name would reuse results of older files (vLLM issue 42125).
"""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from heapq import heapify, heappop
from itertools import chain, compress, count, groupby
from operator import ne
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from lorafold.ops.host_tensors import send

# (`KnownAdapter.generation` or 0 for the base, tenant)
PrefixKey = tuple[int, str]
Reusable = tuple[PrefixKey, Sequence[int], Sequence[int]]  # of a request, with tokens and blocks
BLOCK = 32  # tokens; passes read whole blocks, so that few shapes occur
CACHED_SHARE = 16  # prefixes of ended requests use at most this part of the blocks: 1/16
CACHED_SECONDS = 30.0  # time after which an unused prefix is dropped


class BlockCache:
    """The pools (num_blocks, Hk, BLOCK, D) of all layers, and the number of references to each
    block. Block 0 is never written: rows read its zeros beyond their own blocks.

    On Linux, a pool on the CPU is one anonymous mapping at a fixed address, whose pages exist from
    their first write until the block is free. On other devices, pools grow by doubling.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.keys: dict[int, Tensor] = {}  # by layer
        self.values: dict[int, Tensor] = {}
        self.references: dict[int, int] = {}  # by block, of the blocks in use
        mapped = device.type == "cpu" and sys.platform == "linux"
        self._mapped = list[tuple[mmap.mmap, int]]() if mapped else None  # with bytes of a block
        self._freed: list[int] = []  # a heap
        self._end = 1  # blocks from here on were never used
        self._size = 1 + capacity if mapped else 1  # blocks in each pool

    @property
    def num_free(self) -> int:
        return self.capacity - len(self.references)

    @property
    def block_bytes(self) -> int:
        """The bytes of one block in all layers."""
        return sum(pool[0].nbytes for pool in self._pools())

    def allocate(self, n: int) -> list[int]:
        """Returns n blocks of zeros with one reference each."""
        assert n <= self.num_free
        blocks = [heappop(self._freed) for _ in range(min(n, len(self._freed)))]
        end, self._end = self._end, self._end + n - len(blocks)
        blocks += range(end, self._end)
        self.references |= dict.fromkeys(blocks, 1)
        if self._end > self._size:
            self._size = min(1 + self.capacity, max(self._end, 2 * self._size))
            for pools in (self.keys, self.values):
                for layer, old in pools.items():
                    pools[layer] = pad(old, (*[0] * 7, self._size - len(old)))
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
        freed = sorted(block for block in blocks if not self.references[block])
        for block in freed:
            del self.references[block]
        self._freed += freed
        heapify(self._freed)
        # consecutive blocks have the same difference to their index
        runs = groupby(enumerate(freed), lambda pair: pair[1] - pair[0])
        for first, last in ((run[0][1], run[-1][1]) for _, pairs in runs if (run := [*pairs])):
            self._zero(first, last + 1)

    def clear(self) -> None:
        """Frees all blocks."""
        self._zero(1, self._end)
        self.references, self._freed, self._end = {}, [], 1
        if self._mapped is None:
            self.keys, self.values, self._size = {}, {}, 1

    def copy(self, source: int, target: int, tokens: int) -> None:
        for pool in self._pools():
            pool[target, :, :tokens] = pool[source, :, :tokens]

    def create(self, layer: int, heads: int, d: int, dv: int, dtype: torch.dtype) -> None:
        """Creates a layer's pools, for keys (Hk, D) and values (Hk, Dv) of a token."""
        with torch.inference_mode(False):
            self.keys[layer], self.values[layer] = (self._pool(heads, n, dtype) for n in (d, dv))

    def _pool(self, heads: int, d: int, dtype: torch.dtype) -> Tensor:
        shape = self._size, heads, BLOCK, d
        if self._mapped is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        nbytes = heads * BLOCK * d * dtype.itemsize
        memory = mmap.mmap(-1, self._size * nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # children would need as much memory, by the kernel's count
        memory.madvise(mmap.MADV_DONTFORK)
        with suppress(OSError):  # a huge page would keep the memory of many blocks
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        self._mapped.append((memory, nbytes))
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def _pools(self) -> chain[Tensor]:
        return chain(self.keys.values(), self.values.values())

    def _zero(self, first: int, end: int) -> None:
        if self._mapped is None:
            for pool in self._pools():
                pool[first:end] = 0
        for memory, nbytes in self._mapped or ():
            start, stop, page = first * nbytes, end * nbytes, mmap.PAGESIZE
            low = min(-(-start // page) * page, stop)  # whole pages are from low to high
            high = max(stop // page * page, low)
            memory[start:low], memory[high:stop] = bytes(low - start), bytes(stop - high)
            if low < high:
                memory.madvise(mmap.MADV_DONTNEED, low, high - low)


def num_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def round_up(tokens: int) -> int:
    return num_blocks(tokens) * BLOCK


class BlockView(Cache):
    """A transformers cache over rows' blocks, which `select` sets for a forward pass."""

    def __init__(self, cache: BlockCache) -> None:
        super().__init__(layers=[])
        self.cache = cache

    def select(
        self, rows: Sequence[tuple[Sequence[int], int, int]], tokens: int, width: int = 0
    ) -> BlockView:
        """Selects the rows of a pass over `tokens` tokens per row, each with its block table, the
        position of its first token, and its number of real tokens; the others are padding. The pass
        reads `width` columns, or as many as the longest row needs.
        """
        tables, starts, counts = zip(*rows, strict=True)
        self.width = round_up(max(width, max(starts) + tokens))
        n, device = self.width // BLOCK, self.cache.device
        table_BW = torch.tensor([[*t[:n], *[0] * (n - len(t))] for t in tables])
        position_BT = torch.tensor(starts)[:, None] + torch.arange(tokens)
        real_BT = torch.arange(tokens) < torch.tensor(counts)[:, None]
        self._real = None if real_BT.all() else send(real_BT.flatten().nonzero()[:, 0], device)
        self._block_n = send(table_BW.gather(1, position_BT // BLOCK)[real_BT], device)
        self._offset_n = send((position_BT % BLOCK)[real_BT], device)
        self._table_BW, self._index = send(table_BW, device), dict[int, Tensor]()
        self.position_BT = send(position_BT, device)
        self.start_B = self.position_BT[:, 0].contiguous()
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values (B, Hk, T, D), and returns all keys and values of these rows (B,
        Hk, width, D).
        """
        if layer_idx not in self.cache.keys:
            (_, heads, _, d), dv = key_states.shape, value_states.shape[-1]
            self.cache.create(layer_idx, heads, d, dv, key_states.dtype)
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        return self._updated(keys, key_states), self._updated(values, value_states)

    def _updated(self, pool: Tensor, x: Tensor) -> Tensor:
        new, heads = x.transpose(1, 2).flatten(0, 1), x.shape[1]  # (B * T, Hk, D)
        new = new if self._real is None else new[self._real]
        pool[self._block_n, :, self._offset_n] = new
        if heads not in self._index:  # of (block, head) pairs, so that one copy has the right order
            head = torch.arange(heads, device=x.device)[:, None]
            self._index[heads] = (self._table_BW[:, None] * heads + head).flatten()
        read = pool.view(len(pool) * heads, -1).index_select(0, self._index[heads])
        return read.view(len(x), heads, self.width, -1)

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
        return self.width


class CachedPrefix(NamedTuple):
    """The reusable KV cache of a request, and the time of its last use."""

    key: PrefixKey
    tokens: Sequence[int]
    blocks: Sequence[int]
    used: float = 0.0  # 0 for a running request


class CachedPrefixes:
    """Prefixes of ended requests, the least recently used first."""

    def __init__(self, cache: BlockCache) -> None:
        self.cache, self.limit = cache, cache.capacity // CACHED_SHARE
        self.prefixes: list[CachedPrefix] = []

    def add(self, key: PrefixKey, tokens: list[int], blocks: Sequence[int]) -> None:
        """Caches the first tokens of a request. Shorter prefixes of the same tokens are dropped."""
        tokens = tokens[: self.limit * BLOCK]
        blocks = blocks[: num_blocks(len(tokens))]
        if not tokens:
            return
        self.cache.retain(blocks)
        same = [p for p in self.prefixes if p.key == key]
        self.drop([p for p in same if p.tokens == tokens[: len(p.tokens)]])
        self.prefixes.append(CachedPrefix(key, tokens, blocks, time.monotonic()))
        while sum(len(p.blocks) for p in self.prefixes) > self.limit:
            self.drop(self.prefixes[:1])

    def find(
        self, key: PrefixKey, tokens: Sequence[int], running: Sequence[Reusable] = ()
    ) -> tuple[Sequence[int], int]:
        """Returns the blocks with the longest common prefix of an ended or running request (its
        key, tokens and blocks), and the number of tokens.
        """
        every = [*self.prefixes, *(CachedPrefix(*request) for request in running)]
        same = [(common_length(p.tokens, tokens), p) for p in every if p.key == key]
        most, found = max(same, key=lambda pair: pair[0], default=(0, None))
        if found is None or not most:
            return (), 0
        if found.used:
            self.prefixes.remove(found)
            self.prefixes.append(found._replace(used=time.monotonic()))
        return found.blocks, most

    def drop(self, prefixes: Collection[CachedPrefix]) -> None:
        for prefix in prefixes:
            self.prefixes.remove(prefix)
            self.cache.release(prefix.blocks)

    def expire(self, generations: Collection[int]) -> None:
        """Drops prefixes that were not used lately, or whose adapter is not one of these."""
        least = time.monotonic() - CACHED_SECONDS
        self.drop([p for p in self.prefixes if p.used < least or p.key[0] not in generations])


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    return next(compress(count(), map(ne, a, b)), min(len(a), len(b)))
