"""What the random draws of a training step follow from: its key and the names of its tokens.

    selection = selection_of(model)
    with drawing(selection, Draws(key, names)):      names (B, T), of the tokens of the batch
        loss(batch).backward()

A token's name says of which row of the step it is, and where in it, so that a draw is the same for
a row that is packed, padded, or alone. The draws are kept with the model's selection, since a
checkpointed block may run again in another thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from lorafold.core.attach import Adapted
from lorafold.core.selection import Draws, Selection

BRANCH, SLOT = 32, 24  # the bits of a name: 23 row, 8 branch, 8 slot, 24 position


class DrawSite(NamedTuple):
    """What one draw follows from: the step's key, the names of the tokens (T,), and the number of
    the module that draws.
    """

    key: int
    names: Tensor
    number: int


@contextmanager
def drawing(selection: Selection, draws: Draws) -> Iterator[None]:
    """Let what is drawn in the selection's model follow from `draws` until the `with` block ends.
    """
    before, selection.draws = selection.draws, draws
    try:
        yield
    finally:
        selection.draws = before


def named(rows: Tensor, positions: Tensor, branches: Tensor | int = 0) -> Tensor:
    """The names of tokens (B, T), int64. The arguments broadcast to that shape.

    Args:
        rows: the row of each token, its place in the whole batch of the step.
        positions: where in its row the token is.
        branches: which of a row's continuations the token belongs to; 0 for those before them.
    """
    return (rows.long() << (BRANCH + 8)) + (torch.as_tensor(branches) << BRANCH) + positions


def slots(names: Tensor, at: Tensor, k: int) -> Tensor:
    """The names (S,) of rows that experts compute, each of a token and one of its k experts.

    Args:
        names: of the tokens (T,).
        at: of each row its index (S,) in the tokens' experts (T, k).
    """
    return names[at // k] + (at % k << SLOT)


def site_of(
    module: nn.Module, tokens: int, of: Callable[[Tensor], Tensor] | None = None
) -> DrawSite | None:
    """What dropout in an adapted module follows from; None outside of `drawing`, and where what the
    module computes are not the tokens of the batch, as under a head that sees some of them alone.

    Args:
        of: makes of the tokens' names (T,) those of the rows of its input (S,).
    """
    if not isinstance(module, Adapted) or (draws := module.selection.draws) is None:
        return None
    names = draws.names.flatten()
    if len(names) != tokens:
        return None
    names = names if of is None else of(names)
    return DrawSite(draws.key, names, crc32(module.site.encode()))
