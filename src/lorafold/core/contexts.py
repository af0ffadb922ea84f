"""Contexts of a model: evaluation mode, no dropout, no change of parameters, and recomputation.

In `unchanged`, values that follow from parameters alone are computed once for all micro-batches of
a step. A parameter's version would not do: fused optimizers change parameters without changing it.
A checkpointed block runs again inside the backward, perhaps in another thread, outside the scope;
no parameter changes there either.

Fake tensors are torch's tensors with shape, dtype and device but no values. An estimate runs a step
on them to find how much memory it takes; code that branches on values asks `is_fake`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from lorafold.errors import LorafoldError


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Put the model in evaluation mode, without gradients, until the `with` block ends. Afterwards
    each of its modules is in the mode that it was in before.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with nullcontext() if gradients else torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def undropped(model: nn.Module) -> Iterator[float]:
    """Set every dropout of the model and its adapters to 0 until the `with` block ends: its layers
    of dropout, and the probabilities that other modules keep by that name. Yields the largest.
    """

    rates = [
        (module, name, p)
        for module in model.modules()
        for name, p in vars(module).items()
        if isinstance(p, float) and p > 0
        if "dropout" in name or name.endswith("pdrop")
        or (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd))
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield max((p for _, _, p in rates), default=0.0)
    finally:
        for module, name, p in rates:
            setattr(module, name, p)


def replace_attribute(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set owner.name to a value until the stack unwinds."""
    before = getattr(owner, name)
    undo = (setattr, owner, name, before) if name in vars(owner) else (delattr, owner, name)
    stack.callback(*undo)
    setattr(owner, name, value)


def recomputed(run: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """run(*args), a tensor of any shape. `run` draws no random numbers."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return run(*args)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


@dataclass(eq=False)
class Scope:
    """One `with` block of `unchanged`, which is open until it ends, and what is kept for it."""

    open: bool = True
    kept: dict[Any, Any] = field(default_factory=dict)


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


def is_fake(x: Tensor) -> bool:
    """Whether x, a tensor of any shape, is a fake tensor."""
    return isinstance(x, FakeTensor)


def keep_scale(model: nn.Module) -> None:
    """Undo the division of weights that a model divides in place for inference and multiplies again
    for training, and let it happen no more. RWKV halves the hidden states every `rescale_every`
    blocks, and with them the two matrices of each later block that add to them, so that float16
    does not overflow. A delta would not be divided with its matrix, and what is folded would be off
    by a power of two. Both ways compute the same but for the epsilon of norms (2e-5 of the logits
    of a tiny model in fp32).
    """
    for module in model.modules():
        own: Any = module
        if "layers_are_rescaled" not in vars(module) or not own.config.rescale_every:
            continue
        if own.layers_are_rescaled:
            if any(hasattr(p, "quant_state") or hasattr(p, "SCB") for p in module.parameters()):
                raise LorafoldError(
                    f"{type(module).__name__}: its quantized weights were divided by a forward pass"
                    " for inference; expected a model that was just loaded"
                )
            training, own.training = own.training, True
            own._rescale_layers()
            own.training = training
        own.config.rescale_every = 0
