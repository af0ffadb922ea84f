"""Packed documents of known lengths, for a step on fake tensors: fake positions have no values that
could tell where documents begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from lorafold.ops.documents import Documents, Tile
from lorafold.step.documents import attending


class LastTiles(Documents):
    """Documents of which only the last three tiles are computed. These are enough for the peak of
    memory: tiles grow from first to last, except that the last may be cut short.
    """

    def tiles(self) -> Iterator[Tile]:
        yield from [*super().tiles()][-3:]


@contextmanager
def packed_as(model: Any, lens: tuple[int, ...]) -> Iterator[None]:
    """Compute attention over packed documents of these lengths until the block ends. The longest is
    last.
    """
    with attending(model, partial(_mask, tuple(sorted(lens)))):
        yield


def _mask(
    lens: tuple[int, ...], *, q_length: int, local_size: int | None = None, **_: Any
) -> Documents:
    """Return documents of these lengths, or one where a soft prompt makes the sequence longer."""
    return LastTiles(lens if q_length == sum(lens) else (q_length,), local_size)
