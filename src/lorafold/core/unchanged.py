"""A scope in which no parameter changes, so that what follows from parameters alone is computed
once for all micro-batches of an optimizer step.

    with unchanged():
        for batch in micro_batches:
            loss(batch).backward()
    optimizer.step()

A parameter's version does not say as much: fused optimizers and bitsandbytes' change parameters
without changing their version. Inside a backward no parameter changes either, where a checkpointed
block runs again; it may run in another thread, which does not know of the scope.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_scope: ContextVar[object | None] = ContextVar("unchanged", default=None)


@contextmanager
def unchanged() -> Iterator[None]:
    """No parameter changes until the `with` block ends, in this thread or task."""
    token = _scope.set(object())
    try:
        yield
    finally:
        _scope.reset(token)


def scope() -> object | None:
    """The innermost scope of `unchanged`, None outside of one."""
    return _scope.get()


def in_backward() -> bool:
    """Whether this runs inside a backward, as a checkpointed block does when it is replayed."""
    return torch._C._current_graph_task_id() != -1
