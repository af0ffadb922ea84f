"""What a model reads of an adapted module past its forward: the folded weight and bias.

    module.weight, module.bias      round(fold_n(... fold_1(W, b))), as the module stores them

Some models take a module's `weight` and compute with it themselves: `nn.MultiheadAttention` its
`out_proj`, Mamba its `dt_proj`, a head the embedding. No delta runs then, so whoever reads the
attribute while a delta is active is served a stand-in for the folded tensor, through which
gradients reach the deltas: the law holds for any model, whatever its modules are called. A delta
that has no form in weight space can't be served: NotMergeable, once something is computed.

The stand-in has shape, dtype and device, and nothing is computed to tell them. Any other torch
function is given the folded tensor in its place (`lorafold.core.reading`). That costs the fold,
with a dense dW, at every use; the module's own forward multiplies by the small factors. What takes
a tensor past those functions (a custom autograd function, an operator called from C++) finds the
folded one beneath them, and its gradient folds once more. Compilers, tracers and torch.func get the
folded tensor itself.

Writing goes to the parameter that is stored: in place, by `.data`, as the weight of another module
that is tied to it. The dropout of a delta lies on its branch in the forward, so a served weight has
none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map_only

from lorafold.core.reading import Reading

if TYPE_CHECKING:
    from lorafold.core.attach import Adapted

ASKED = frozenset(
    [
        *(
            getattr(Tensor, name).__get__
            for name in (
                "shape", "dtype", "device", "layout", "requires_grad", "ndim", "itemsize", "nbytes",
                "is_cpu", "is_cuda", "is_meta", "is_mkldnn", "is_mps", "is_nested", "is_quantized",
                "is_sparse", "is_sparse_csr", "is_xpu",
            )
        ),
        *(
            getattr(Tensor, name)
            for name in (
                "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous",
                "is_floating_point", "is_signed", "ndimension", "nelement", "numel", "size",
                "storage_offset", "stride",
            )
        ),
        torch.is_complex,
        torch.is_floating_point,
        torch.numel,
    ]
)  # fmt: skip
STORED = frozenset(getattr(Tensor, name).__get__ for name in ("data", "grad", "grad_fn", "is_leaf"))
WRITES = frozenset(
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
)


class Served(Tensor):
    """The stand-in: it holds no numbers."""

    reading: Reading
    which: str
    _is_param = True  # isinstance(module.weight, nn.Parameter)

    @staticmethod
    def of(reading: Reading, name: str) -> Served:
        like = reading.like(name)
        served = Tensor._make_wrapper_subclass(
            Served, reading.shape(name), dtype=like.dtype, device=like.device
        )
        served.__dict__.update(reading=reading, which=name)
        return served

    @property
    def stored(self) -> Any:
        """The parameter in the module's place; the folded tensor where the module has none."""
        own = self.reading.stored(self.which)
        return self.reading.folded()(self.which) if own is None else own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)  # a packed parameter knows more than a tensor does

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.stored, name, value)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in STORED or name in WRITES or (name.endswith("_") and not name.endswith("__")):
            args, kwargs = _to_stored(args, kwargs)
        folded = _Folded()
        plain_args, plain_kwargs = tree_map_only(Served, folded, (args, kwargs))
        if func is Tensor.data_ptr:
            args[0].__dict__["held"] = plain_args[0]  # the address is used after this returns
        return func(*plain_args, **plain_kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            args, kwargs = _to_stored(args, kwargs or {})
        args, kwargs = tree_map_only(Served, _Folded(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Folded:
    """The folded tensors for one call, in which weight and bias of a module share a fold."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], Callable[[str], Tensor | None]] = {}

    def __call__(self, served: Served) -> Tensor | None:
        key = (id(served.reading.base.module), *served.reading.deltas)
        if key not in self.found:
            self.found[key] = served.reading.folded()
        return self.found[key](served.which)


def _to_stored(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a function that writes to its first one (`tensor`, in `torch.nn.init`)."""

    def stored(first: Any) -> Any:
        return tree_map_only(Served, lambda served: served.stored, first)

    if args:
        return (stored(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "tensor": stored(kwargs.get("tensor"))}


class _Deferred(Function):
    """The stand-in as a function of the deltas' parameters, for what no torch function is asked."""

    @staticmethod
    def forward(ctx: Any, reading: Reading, name: str, *leaves: Tensor) -> Tensor:
        ctx.reading, ctx.name = reading, name
        ctx.save_for_backward(*leaves)
        return Served.of(reading, name)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors
        with torch.enable_grad():
            folded = ctx.reading.folded()(ctx.name)
        if not folded.requires_grad:
            return None, None, *(None for _ in leaves)
        return None, None, *torch.autograd.grad(
            folded, leaves, g, create_graph=torch.is_grad_enabled(), allow_unused=True
        )


def _traced() -> bool:
    """Is what runs seen by a compiler, a tracer or a transform, none of which takes a stand-in?"""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


class Read:
    """The attribute of that name on the class of an adapted module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Adapted | None, owner: Any = None) -> Any:
        if module is None:
            return self
        if self.name not in module._parameters:
            raise AttributeError(self.name)  # Python asks nn.Module's __getattr__ then
        try:
            return self._of(module)
        except AttributeError as e:
            # Python would ask nn.Module for the stored one, and an adapter be passed by unseen
            raise RuntimeError(f"{module.site}.{self.name} can't be read: {e}") from e

    def _of(self, module: Adapted) -> Tensor | None:
        own = module._parameters[self.name]
        deltas: Any = module.deltas
        carried = {name: deltas[name] for name in module.selection.names if name in deltas}
        live = {name: delta for name, delta in carried.items() if not delta.in_place}
        if not live:
            return own
        reading = Reading(module.layer_class(module), live, module.site)
        if _traced():
            return reading.folded()(self.name)
        if own is None and reading.gained() is None:
            return None
        leaves = reading.leaves() if torch.is_grad_enabled() else []
        if leaves and reading.like(self.name).is_floating_point():
            return _Deferred.apply(reading, self.name, *leaves)
        return Served.of(reading, self.name)


def _tied(module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """Tie to what is stored, where the weight of one module becomes another's."""
    return parameter.stored if isinstance(parameter, Served) else None


register_module_parameter_registration_hook(_tied)  # type: ignore[arg-type]
