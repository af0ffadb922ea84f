"""Documents packed end to end, and the tiles in which their attention is computed.

    document i: keys key_at(i) + [0, lens[i]), queries at(i) + [0, lens[i] - starts[i])

The j-th query of a document attends to its keys (j - window, j]. Without shared prefixes, starts is
0 and every token is one query and one key. Tokens of a shared prefix are queries of the first
document only, and keys of all documents with the prefix. `with_prefix_keys` adds keys without
queries in front of documents (the virtual tokens of prompt and prefix tuning).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.ops.host_tensors import on_host, send

TILE = 128


class Tile(NamedTuple):
    """The queries lo:hi and the keys first:hi of each of n consecutive documents of one length.

    The queries of each document begin at its position `start`. In the batch, the queries of the
    first document begin at token `at`, and its keys at key `key_at`.
    """

    at: int
    key_at: int
    n: int
    start: int
    length: int
    lo: int
    hi: int
    first: int

    def own(self, x_THD: Tensor) -> Tensor:
        """Returns the view (n, hi - lo, H, D) of the tile's queries in a tensor of all queries."""
        each = self.length - self.start
        by_document = x_THD[self.at : self.at + self.n * each].unflatten(0, (self.n, each))
        return by_document[:, self.lo - self.start : self.hi - self.start]

    @property
    def seen(self) -> slice:
        """The slice of a document's keys that the tile's queries attend to."""
        return slice(self.first, self.hi)

    def _every(self, x_SHD: Tensor) -> Tensor:
        """Returns the view (n, Hk, length, D) of the documents' keys in a tensor of all keys."""
        end = self.key_at + self.n * self.length
        return x_SHD[self.key_at : end].unflatten(0, (self.n, self.length)).transpose(1, 2)

    def queries(self, x_THD: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """Returns a copy (n * Hk, G * t, D) of the tile's t queries; the G heads that share a key
        head are adjacent.
        """
        by_group = self.own(x_THD).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        copy = by_group.to(dtype, memory_format=torch.contiguous_format)
        return copy.reshape(self.n * kv_heads, -1, x_THD.shape[-1])

    def keys(self, x_SHD: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns a copy (n * Hk, length, D), in `dtype`, of all keys or values of the tile's
        documents.
        """
        return self._every(x_SHD).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)

    def put_queries(self, x_THD: Tensor, part: Tensor) -> None:
        """Writes part (n * Hk, G * t, D), in the layout of `queries`, to its place in x_THD."""
        t, (heads, width) = self.hi - self.lo, x_THD.shape[1:]
        by_group = part.view(self.n, -1, heads * self.n // len(part), t, width)
        self.own(x_THD).copy_(by_group.permute(0, 3, 1, 2, 4).reshape(self.n, t, heads, width))

    def put_keys(self, x_SHD: Tensor, every: Tensor) -> None:
        """Writes every (n * Hk, length, D), in the layout of `keys`, to its place in x_SHD."""
        self._every(x_SHD).copy_(every.unflatten(0, (self.n, -1)))


@dataclass(frozen=True)
class Documents:
    """The documents in a batch: `lens` holds their lengths in tokens, sequence after sequence;
    without shared prefixes, their sum is B * T.

    With shared prefixes, document i adds only its tokens starts[i]:lens[i] to one packed sequence
    of T tokens, and `keys` (S,), S = sum(lens), maps each key of each document to one of these
    tokens.
    """

    lens: tuple[int, ...]
    window: int | None = None
    starts: tuple[int, ...] = ()  # default: zeros
    keys: Tensor | None = field(default=None, repr=False, compare=False)
    # the documents without their prefix keys, and the total number of prefix keys
    without_prefix: tuple[Documents, int] | None = field(default=None, repr=False, compare=False)
    _ends: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _masks: dict[tuple[Any, ...], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", self.starts or (0,) * len(self.lens))

    @classmethod
    def with_shared_prefixes(
        cls, lens: Sequence[int], starts: Sequence[int], device: torch.device
    ) -> Documents:
        """Returns the documents of packed rows, each of which shares its first starts[i] tokens
        with the row before it.
        """
        if not any(starts):
            return cls(tuple(lens))
        keys, at, path = list[Tensor](), 0, torch.arange(0)
        for row, (length, start) in enumerate(zip(lens, starts, strict=True)):
            if not 0 <= start < length or start > max(0, len(path) - 1):
                raise LorafoldError(
                    f"packed row {row}: found {start} shared tokens, expected fewer than the"
                    f" {length} of this row and the {len(path)} of the previous row"
                )
            path = torch.cat([path[:start], torch.arange(at, at := at + length - start)])
            keys.append(path)
        return cls(tuple(lens), None, tuple(starts), send(torch.cat(keys), device))

    def positions(self) -> Tensor:
        """Returns the position of each token in its document, (1, T), on the CPU."""
        ranges = [torch.arange(*ends) for ends in zip(self.starts, self.lens, strict=True)]
        return torch.cat(ranges)[None]

    @property
    def own(self) -> tuple[int, ...]:
        """The number of tokens that each document adds to the packed sequence; they sum to the
        number of queries.
        """
        return tuple(n - start for n, start in zip(self.lens, self.starts, strict=True))

    @cached_property
    def table(self) -> Tensor:
        """The number of queries and of keys before each document, the length of its shared prefix
        and its whole length: int64 (documents, 4), on the CPU.
        """
        lens, own = torch.tensor(self.lens), torch.tensor(self.own)
        return torch.stack([own.cumsum(0) - own, lens.cumsum(0) - lens, lens - own, lens], 1)

    def gather(self, x_THD: Tensor) -> Tensor:
        """Returns the keys or values (S, Hk, D), document after document; x_THD itself without
        shared prefixes.
        """
        return x_THD if self.keys is None else x_THD.index_select(0, self.keys)

    def scatter(self, x_SHD: Tensor, tokens: int) -> Tensor:
        """Returns the sum (tokens, Hk, D) over the keys of each token, the transpose of `gather`.
        """
        if self.keys is None:
            return x_SHD
        return x_SHD.new_zeros(tokens, *x_SHD.shape[1:]).index_add_(0, self.keys, x_SHD)

    def flash_attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Returns attention (T, H, D) by FlashAttention, in fp16 or bf16 on CUDA, for q (T, H, D)
        and k, v (S, Hk, D).
        """
        # the import takes over a second, and only GPUs need it
        from torch.nn.attention.varlen import varlen_attn

        of_keys, of_queries = self._borders(q.device)
        back = -1 if self.window is None else self.window - 1
        return varlen_attn(  # type: ignore[return-value]
            q, k, v, of_queries, of_keys, max(self.own), max(self.lens), scale=scale,
            window_size=(back, 0), enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def _borders(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the offsets of each document's keys and of its queries: int32 (documents + 1,)
        each.
        """
        if device not in self._ends:
            borders = {
                lens: send(torch.tensor([0, *accumulate(lens)], dtype=torch.int32), device)
                for lens in {self.lens, self.own}
            }
            self._ends[device] = borders[self.lens], borders[self.own]
        return self._ends[device]

    def tiles(self) -> Iterator[Tile]:
        """Yields tiles that contain every query once. Consecutive documents with the same length
        and start share their tiles, so that a batch of equal documents is one batched matmul.
        """
        at = key_at = 0
        for (length, start), equal in groupby(zip(self.lens, self.starts, strict=True)):
            n = len(list(equal))
            for lo in range(start, length, TILE):
                first = 0 if self.window is None else max(0, lo + 1 - self.window)
                yield Tile(at, key_at, n, start, length, lo, min(length, lo + TILE), first)
            at, key_at = at + n * (length - start), key_at + n * length

    def groups(self) -> Iterator[list[Tile]]:
        """Yields lists of the tiles that belong to the same documents."""
        return (list(tiles) for _, tiles in groupby(self.tiles(), lambda tile: tile.key_at))

    def mask(self, tile: Tile, groups: int, like: Tensor) -> Tensor:
        """Returns the mask (G * t, s), 0 or -inf, added to the scores of a tile's t queries and s
        keys. Only the widest mask is cached, because the others are its last columns: they are
        aligned at the last key.
        """
        t, columns = tile.hi - tile.lo, tile.hi - tile.first
        key = t, groups, like.dtype, like.device
        if key not in self._masks or self._masks[key].shape[1] < columns:
            widest = tile.length if self.window is None else min(tile.length, t + self.window - 1)
            i = torch.arange(widest - t, widest, device=like.device)[:, None]
            j = torch.arange(widest, device=like.device)
            hidden = (j > i) if self.window is None else (j > i) | (j <= i - self.window)
            mask = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask.repeat(groups, 1)
        return self._masks[key][:, -columns:]

    def dense(self, batch: int, device: torch.device) -> Tensor:
        """Returns the whole mask, boolean (B, 1, T, T), True if a query attends to a token; (B, 1,
        T, n + T) with n prefix keys in front.
        """
        if self.without_prefix is not None:
            documents, front = self.without_prefix
            return F.pad(documents.dense(batch, device), (front // batch, 0), value=True)
        lens = torch.tensor(self.lens, device=device)
        document = torch.arange(len(lens), device=device).repeat_interleave(
            lens, output_size=sum(self.lens)
        )
        if self.keys is not None:
            return self._dense_shared(document, lens.cumsum(0) - lens, self.keys)
        document = document.view(batch, 1, -1)
        i = torch.arange(document.shape[-1], device=device)
        seen = (document[..., :, None] == document[..., None, :]) & (i[:, None] >= i)
        return seen if self.window is None else seen & (i[:, None] - self.window < i)

    def _dense_shared(self, document: Tensor, begins: Tensor, keys: Tensor) -> Tensor:
        j = torch.arange(len(document), device=document.device)
        # (T,), each token's key in its own document
        i = j[j >= (begins + torch.tensor(self.starts, device=document.device))[document]]
        seen = (document[i, None] == document) & (i[:, None] >= j)
        if self.window is not None:
            seen &= i[:, None] - self.window < j
        # a token is a key of several documents, but a query attends to only one of them
        mask = seen.new_zeros(len(i), len(i), dtype=torch.uint8)
        return mask.index_add_(1, keys, seen.byte()).bool()[None, None]


def with_prefix_keys(docs: Documents, n: int, batch: int, device: torch.device) -> Documents:
    """Returns the documents with n more keys in front of each: the first n tokens of its sequence.
    """
    length, lens = sum(docs.own) // batch, torch.tensor(docs.lens)
    keys = torch.arange(sum(docs.lens)) if docs.keys is None else on_host(docs.keys)
    sequence = keys // length
    front = sequence[lens.cumsum(0) - lens, None] * (n + length)
    front = front + torch.arange(n)  # (documents, n)
    parts = zip(front, (keys + n * (sequence + 1)).split(docs.lens), strict=True)
    return Documents(
        tuple(n + each for each in docs.lens),
        None,
        tuple(n + start for start in docs.starts),
        send(torch.cat([part for pair in parts for part in pair]), device),
        (docs, n * batch),
    )
