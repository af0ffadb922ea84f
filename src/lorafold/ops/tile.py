"""A tile of attention: some queries of documents of one length against the keys that they see.

`ops.documents` divides documents into tiles, and `ops.attention` computes each by batched products,
for which a tile copies its queries and keys into matrices and writes the results to their places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Queries lo:hi against keys first:hi of each of n consecutive documents of one length, whose
    own queries begin at `start`; those of the first begin at token `at`, its keys at key `key_at`.
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
        """The view (n, hi - lo, H, D) of the tile's queries in a tensor of all queries."""
        each = self.length - self.start
        return x_THD[self.at : self.at + self.n * each].unflatten(0, (self.n, each))[
            :, self.lo - self.start : self.hi - self.start
        ]

    @property
    def seen(self) -> slice:
        """Its keys among those of a document."""
        return slice(self.first, self.hi)

    def _every(self, x_SHD: Tensor) -> Tensor:
        """The view (n, Hk, length, D) of the documents' keys in a tensor of all keys."""
        end = self.key_at + self.n * self.length
        return x_SHD[self.key_at : end].unflatten(0, (self.n, self.length)).transpose(1, 2)

    def queries(self, x_THD: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """A copy (n * Hk, G * t, D) of the tile's t queries; the G heads that share a key head
        follow each other.

        Args:
            x_THD: the queries of all documents.
            kv_heads: the number Hk of key heads.
        """
        by_group = self.own(x_THD).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        return by_group.to(dtype, memory_format=torch.contiguous_format).reshape(
            self.n * kv_heads, -1, x_THD.shape[-1]
        )

    def keys(self, x_SHD: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy (n * Hk, length, D), in that dtype, of all keys or values of its documents."""
        every = self._every(x_SHD).to(dtype, memory_format=torch.contiguous_format)
        return every.flatten(0, 1)

    def put_queries(self, x_THD: Tensor, part: Tensor) -> None:
        """Write part (n * Hk, G * t, D), laid out as by `queries`, to its place in x_THD."""
        t, (heads, width) = self.hi - self.lo, x_THD.shape[1:]
        by_group = part.view(self.n, -1, heads * self.n // len(part), t, width)
        self.own(x_THD).copy_(by_group.permute(0, 3, 1, 2, 4).reshape(self.n, t, heads, width))

    def put_keys(self, x_SHD: Tensor, every: Tensor) -> None:
        """Write every (n * Hk, length, D), laid out as by `keys`, to its place in x_SHD."""
        self._every(x_SHD).copy_(every.unflatten(0, (self.n, -1)))
