"""Operations with a reference implementation in torch, and faster implementations per kind of
device (`lorafold.kernels.registry`).

    NORM = operator("rms_norm(...) -> Tensor", plain, fake)     with tensor arguments
    FORWARD = Operation("document_attention", plain)            with any arguments
    with plain_implementations(): ...       runs the reference implementations, to test the others

`operator` registers torch.ops.lorafold.NAME, with a fake implementation so that estimates count its
memory. torch.library.custom_op would add 20 us to each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_use_plain: ContextVar[bool] = ContextVar("use_plain", default=False)
_LIBRARY = torch.library.Library("lorafold", "FRAGMENT")


@contextmanager
def plain_implementations() -> Iterator[None]:
    """Context manager: every operation runs its reference implementation, in this thread."""
    token = _use_plain.set(True)
    try:
        yield
    finally:
        _use_plain.reset(token)


class Operation:
    """Final: calls the implementation for the device of its first input, a tensor."""

    def __init__(
        self, name: str, plain: Callable[..., Any], dispatched: Callable[..., Any] | None = None
    ) -> None:
        self.name, self.plain, self._dispatched = name, plain, dispatched
        self._forms: dict[str, Callable[..., Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        if self._dispatched is not None:
            return self._dispatched(*inputs)
        return self._forms.get(inputs[0].device.type, self.plain)(*inputs)

    def on(self, device: str) -> Callable[..., Any]:
        """Returns the implementation for a kind of device, which then runs without torch's
        dispatcher.
        """
        return self._forms.get(device, self.plain)

    def implement(self, device: str, fast: Callable[..., Any]) -> None:
        """Registers an implementation for a kind of device, unless there is one. If it returns
        NotImplemented, the reference implementation runs.
        """
        if device in self._forms:
            return
        plain = self.plain

        def form(*inputs: Any) -> Any:
            result = NotImplemented if _use_plain.get() else fast(*inputs)
            return plain(*inputs) if result is NotImplemented else result

        self._forms[device] = form
        if self._dispatched is not None:
            _LIBRARY.impl(self.name, form, device.upper())


def operator(schema: str, plain: Callable[..., Any], fake: Callable[..., Any]) -> Operation:
    """Defines an operator in torch's dispatcher and returns the operation."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafold::{name}", fake, lib=_LIBRARY)
    return Operation(name, plain, getattr(torch.ops.lorafold, name).default)
