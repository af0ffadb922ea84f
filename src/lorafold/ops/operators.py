"""The operators of lorafold in torch's dispatcher, `torch.ops.lorafold.NAME`.

An operator has a plain form, in torch, on every device. Its fake form says what it returns to a
step on fake tensors, so that an estimate counts as much memory as a real step takes. A faster form
for one kind of device, registered by `implement`, goes before the plain one; `lorafold.kernels`
has these for the CPU. torch.library.custom_op would be shorter, and takes 23 us a call where this
takes 3.

    with plainly(): ...             computes the plain forms, as the oracle of the faster ones
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_plainly: ContextVar[bool] = ContextVar("plainly", default=False)
_PLAIN: dict[Any, Callable[..., Any]] = {}
_LIBRARY = torch.library.Library("lorafold", "FRAGMENT")


@contextmanager
def plainly() -> Iterator[None]:
    """Compute every operator by its plain form until the `with` block ends, in this thread."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)


class Whole:
    """An operation that plain code computes step by step, and a faster form as a whole."""

    def __init__(self) -> None:
        self.fast: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        """The output of the faster form, which takes fake tensors as well; NotImplemented if there
        is none for these inputs, or within `plainly`.
        """
        return NotImplemented if self.fast is None or _plainly.get() else self.fast(*inputs)


def operator(schema: str, plain: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator and return it.

    Args:
        schema: its name, parameters and outputs, as torch writes them.
        plain: computes it on any device.
        fake: makes its outputs without their values.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lorafold::{name}", fake, lib=_LIBRARY)
    found = getattr(torch.ops.lorafold, name).default
    _PLAIN[found] = plain
    return found


def implement(of: Any, fast: Callable[..., Any], device: str) -> None:
    """Register the form of an operator that is computed on one kind of device from now on.

    Args:
        of: the operator, as `operator` returned it.
        fast: computes it, or returns NotImplemented for inputs that the plain form has to take.
        device: torch's name of the kind of device, such as CPU.
    """
    plain = _PLAIN[of]

    def form(*inputs: Any) -> Any:
        found = NotImplemented if _plainly.get() else fast(*inputs)
        return plain(*inputs) if found is NotImplemented else found

    _LIBRARY.impl(of.name().partition("::")[2], form, device)
