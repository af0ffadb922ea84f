"""Rows in groups, as tokens meet experts: rows of one group lie together.

A product of a size that was not seen lately costs 0.6 ms before it begins, which is the time of
256 x 512 by 512 x 1024 (oneDNN makes a kernel for every shape; AMD EPYC, Zen 5). The number of
tokens that an expert gets is new at every step, so groups are filled up to a few sizes. These are
multiples of a step, and the low-rank factors meet tiles of so many rows, all in one product.

Where one kernel multiplies all groups (`demands.groups_at_once`), their sizes stay on the device,
which nobody waits for, and there is room for the most rows that there can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorafold.core.contexts import is_fake
from lorafold.ops.host_tensors import sent
from lorafold.ops.kernel_requirements import groups_at_once


@dataclass(frozen=True)
class Groups:
    """The groups of S rows that lie sorted, each a multiple of `step` rows: `of_row` (S,), the
    group of each row; the numbers of rows of each, or None where only the device knows them; and
    `ends` (E,), int32, where each group ends, or None where the sizes are known.
    """

    of_row: Tensor
    step: int
    known: tuple[int, ...] | None
    ends: Tensor | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each group, for which the device is waited for if it must be."""
        if self.known is not None:
            return self.known
        assert self.ends is not None
        return tuple(self.ends.diff(prepend=self.ends.new_zeros(1)).tolist())

    @property
    def tiles(self) -> Tensor:
        """The group of each tile of `step` rows (n,); no tile has rows of two groups."""
        return self.of_row[:: self.step]

    def spans(self, times: int = 1) -> Iterator[tuple[int, slice]]:
        """Yield the number of each group that has rows, and where its rows are, if each of the S
        rows is `times` rows.
        """
        start = 0
        for number, size in enumerate(self.sizes):
            if size:
                yield number, slice(start, start + size * times)
                start += size * times


def step_of(rows: int, number: int) -> int:
    """What the sizes of groups are rounded up to: a quarter of their mean, as a power of two."""
    return 1 << max(0, (rows // (4 * number)).bit_length() - 1)


def grouped(of_row: Tensor, number: int) -> tuple[Groups, Tensor, Tensor]:
    """The groups that S rows form once they are sorted, their sizes rounded up by copies of the
    first row; the row that each of the P places in the groups gets (P,); and the place of each row
    (S,).

    Of rows without values (fake tensors) each group has an equal share.

    Args:
        of_row: the group of each row (S,).
    """
    step = step_of(len(of_row), number)
    if len(of_row) and groups_at_once(of_row):
        return _on_device(of_row, number, step)
    # so many tiles that their number is rarely another: half a tile a group, and a quarter of these
    whole = step * max(1, number // 4)
    if is_fake(of_row):
        share = -(-len(of_row) // (number * step)) * step
        full = (*(share,) * (number - 1), share + (step * number // 2 + whole - 1) // step * step)
        rows = of_row.new_zeros(sum(full))
        return Groups(rows, step, full), rows, torch.zeros_like(of_row)
    order = of_row.sort(stable=True).indices
    counted = torch.zeros(number, dtype=torch.long, device=of_row.device)
    # the one value that is waited for: all else follows from it on the host
    sizes = counted.index_add_(0, of_row, torch.ones_like(of_row, dtype=torch.long)).cpu()
    padded = (sizes + step - 1).div_(step, rounding_mode="floor").mul_(step)
    padded[-1] += -padded.sum() % whole
    shift = (padded - sizes).cumsum(0) - (padded - sizes)  # the places filled before each group
    at = sent(torch.arange(len(of_row)).add_(shift.repeat_interleave(sizes)), of_row.device)
    groups = sent(torch.arange(number).repeat_interleave(padded), of_row.device)
    rows = torch.zeros_like(groups).index_copy_(0, at, order)
    places = torch.empty_like(order).index_copy_(0, order, at)
    return Groups(groups, step, tuple(padded.tolist())), rows, places


def _on_device(of_row: Tensor, number: int, step: int) -> tuple[Groups, Tensor, Tensor]:
    """`grouped` where nothing is asked of the device: room for the most rows that there can be,
    those that are left over in the last group.
    """
    n, device = len(of_row), of_row.device
    room = (-(-n // step) + number) * step
    order = of_row.sort(stable=True).indices
    counted = torch.zeros(number, dtype=torch.long, device=device)
    sizes = counted.index_add_(0, of_row, torch.ones_like(of_row, dtype=torch.long))
    padded = (sizes + step - 1).div_(step, rounding_mode="floor").mul_(step)
    ends = padded.cumsum(0)
    shift = (ends - padded).sub_(sizes.cumsum(0)).add_(sizes)  # filled up before each group
    at = torch.arange(n, device=device).add_(shift.index_select(0, of_row.index_select(0, order)))
    ends[-1].fill_(room)
    groups = torch.searchsorted(ends, torch.arange(room, device=device), right=True)
    rows = torch.zeros_like(groups).index_copy_(0, at, order)
    places = torch.empty_like(order).index_copy_(0, order, at)
    return Groups(groups, step, None, ends.to(torch.int32)), rows, places
