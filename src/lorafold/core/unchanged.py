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
from typing import Any

import torch


class Scope:
    """One `with` block of `unchanged`, which is open until it ends, and what is kept for it."""

    def __init__(self) -> None:
        self.open = True
        self.kept: dict[Any, Any] = {}


_scope: ContextVar[Scope | None] = ContextVar("unchanged", default=None)


@contextmanager
def unchanged() -> Iterator[None]:
    """No parameter changes until the `with` block ends, in this thread or task."""
    token = _scope.set(made := Scope())
    try:
        yield
    finally:
        made.open = False
        _scope.reset(token)


def scope() -> Scope | None:
    """The innermost scope of `unchanged`, None outside of one."""
    return _scope.get()


def in_backward() -> bool:
    """Whether this runs inside a backward, as a checkpointed block does when it is replayed."""
    return torch._C._current_graph_task_id() != -1
