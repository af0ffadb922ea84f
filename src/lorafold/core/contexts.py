"""Context managers for a model: evaluation mode, no dropout, unchanged parameters."""

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

WRAPPERS = ("peft.", "torch._dynamo.", "torch.nn.parallel.")  # packages of modules


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Context manager: evaluation mode, by default without gradients. Each module's mode is
    restored at the end.
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
def without_dropout(model: nn.Module) -> Iterator[float]:
    """Context manager: dropout is 0 in the model and its adapters. Yields the largest previous
    rate.
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
    """Sets owner.name to a value until the stack unwinds."""
    before = getattr(owner, name)
    undo = (setattr, owner, name, before) if name in vars(owner) else (delattr, owner, name)
    stack.callback(*undo)
    setattr(owner, name, value)


def recomputed(run: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Returns run(*args), a tensor of any shape, and runs it again in the backward pass. `run` must
    not use random numbers, because the generator's state is not restored.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return run(*args)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


@dataclass(eq=False)
class UnchangedScope:
    open: bool = True
    cache: dict[Any, Any] = field(default_factory=dict)


_scope: ContextVar[UnchangedScope | None] = ContextVar("unchanged", default=None)


@contextmanager
def unchanged() -> Iterator[None]:
    """Context manager: parameters don't change in this thread or task, so values that depend only
    on them are computed once. Version counters could not show this, because fused optimizers don't
    increment them.
    """
    token = _scope.set(made := UnchangedScope())
    try:
        yield
    finally:
        made.open = False
        _scope.reset(token)


def scope() -> UnchangedScope | None:
    return _scope.get()


def in_backward() -> bool:
    """Returns whether this runs inside a backward pass, such as when a checkpointed block is
    recomputed.
    """
    return torch._C._current_graph_task_id() != -1


def is_fake(x: Tensor) -> bool:
    """Returns whether x (any shape) is a fake tensor, which has no values; memory estimates use
    them.
    """
    return isinstance(x, FakeTensor)


def prepare_model(model: nn.Module) -> None:
    """Refuses models with modules of other tools, and undoes and disables RWKV's in-place rescaling
    of weights for inference: a delta would not be rescaled with its matrix, so merged weights would
    be wrong by a power of two. Turns off transformers' kernels, which replace the forward of
    modules whenever the mode changes.
    """
    for module in model.modules() if isinstance(model, nn.Module) else [model]:
        rwkv: Any = module
        kind: type = type(module)
        if not issubclass(kind, nn.Module) or kind.__module__.startswith(WRAPPERS):
            raise LorafoldError(
                f"model: found {kind.__module__}.{kind.__name__}, expected a loaded model, without"
                " PEFT (use its unload() or merge_and_unload()), torch.compile or DataParallel"
            )
        if getattr(module, "use_kernels", False):
            rwkv.use_kernels = False
        if "layers_are_rescaled" not in vars(module) or not rwkv.config.rescale_every:
            continue
        if rwkv.layers_are_rescaled:
            if any(hasattr(p, "quant_state") or hasattr(p, "SCB") for p in module.parameters()):
                raise LorafoldError(
                    f"{type(module).__name__}: a forward pass for inference has rescaled the"
                    " quantized weights; load the model again"
                )
            training, rwkv.training = rwkv.training, True
            rwkv._rescale_layers()
            rwkv.training = training
        rwkv.config.rescale_every = 0
