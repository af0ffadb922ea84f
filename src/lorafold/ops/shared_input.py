"""A value that several layers compute from one input, computed once.

    once(x, (A,), make)         make() for the first layer that reads x with A, its result for all

The layers know nothing of each other, so the value is kept on x itself: q, k and v read one tensor,
and so do gate and up. It is computed again once x or A was written to, in another checkpointed
segment (which must be able to replay its part alone), and where gradients are recorded and were
not. Use it where the value depends on x and on frozen tensors only; a graph of it must not keep x,
which would keep itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorafold.ops.dropout import running_segment


def once(x: Tensor, frozen: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
    """The tensor, of any shape, that `make` computes from x and the frozen tensors."""
    # inference tensors have no version counter
    if torch.compiler.is_compiling() or any(t.is_inference() for t in (x, *frozen)):
        return make()
    versions = [t._version for t in (x, *frozen)]
    state = versions, running_segment(), torch.is_grad_enabled()
    known = vars(x).setdefault("_lorafold_once", {})
    found = known.get(frozen)
    if found is None or found[0] != state:
        known[frozen] = found = state, make()
    return found[1]
