"""The folded weight and bias, for models that read them without calling the module's forward
(`nn.MultiheadAttention`, Mamba's `dt_proj`).

While a delta is active, `module.weight` and `module.bias` are stand-ins, which have only a shape,
dtype and device; gradients reach the deltas through them. Torch functions that read values receive
the folded tensor instead, summed in fp32 or wider and dithered to the stored dtype; each use folds
again. Writes change the stored parameter. Dropout is not applied.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map_only

from lorafold.core.delta import Delta, on_meta
from lorafold.core.layer import BaseLayer, WeightAndBias
from lorafold.core.rounding import rounded
from lorafold.errors import NotMergeable

if TYPE_CHECKING:
    from lorafold.core.attach import Adapted

# functions that need no values, so they run on the stand-in itself
METADATA_FUNCTIONS = frozenset(
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
# functions that receive the stored parameter instead of the stand-in
STORED = frozenset(getattr(Tensor, name).__get__ for name in ("data", "grad", "grad_fn", "is_leaf"))
# functions that write in place, besides those whose name ends in an underscore
IN_PLACE = frozenset(
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
)


class StandIn(Tensor):
    """A tensor without values that stands for a folded weight or bias."""

    read: FoldedRead
    parameter_name: str
    _is_param = True  # isinstance(module.weight, nn.Parameter)

    @staticmethod
    def of(read: FoldedRead, name: str) -> StandIn:
        like = read.like(name)
        served = Tensor._make_wrapper_subclass(
            StandIn, read.shape(name), dtype=like.dtype, device=like.device
        )
        served.__dict__.update(read=read, parameter_name=name)
        _register_ties()
        return served

    @property
    def stored(self) -> Any:
        own = self.read.stored(self.parameter_name)
        return self.read.folded()(self.parameter_name) if own is None else own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)  # a quantized parameter has additional attributes

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.stored, name, value)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA_FUNCTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in STORED or name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            args, kwargs = _to_stored(args, kwargs)
        plain_args, plain_kwargs = tree_map_only(StandIn, _Folded(), (args, kwargs))
        if func is Tensor.data_ptr:
            # the address is used after this returns, so the tensor must live on
            args[0].__dict__["held"] = plain_args[0]
        return func(*plain_args, **plain_kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            args, kwargs = _to_stored(args, kwargs or {})
        args, kwargs = tree_map_only(StandIn, _Folded(), (args, kwargs or {}))
        return func(*args, **kwargs)


class _Folded:
    """The folded tensors for one call of a torch function; weight and bias are folded together."""

    def __init__(self) -> None:
        self.found: dict[tuple[Any, ...], Callable[[str], Tensor | None]] = {}

    def __call__(self, served: StandIn) -> Tensor | None:
        key = (id(served.read.base.module), *served.read.deltas)
        if key not in self.found:
            self.found[key] = served.read.folded()
        return self.found[key](served.parameter_name)


def _to_stored(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments of an in-place function, with the stored parameter as the first one."""

    def stored(first: Any) -> Any:
        return tree_map_only(StandIn, lambda served: served.stored, first)

    if args:
        return (stored(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "tensor": stored(kwargs.get("tensor"))}


class _Deferred(Function):
    """Makes the stand-in a differentiable function of the deltas' parameters, for computations that
    bypass `__torch_function__`.
    """

    @staticmethod
    def forward(ctx: Any, read: FoldedRead, name: str, *leaves: Tensor) -> Tensor:
        ctx.read, ctx.name = read, name
        ctx.save_for_backward(*leaves)
        return StandIn.of(read, name)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        leaves = ctx.saved_tensors
        with torch.enable_grad():
            folded = ctx.read.folded()(ctx.name)
        if not folded.requires_grad:
            return None, None, *(None for _ in leaves)
        return None, None, *torch.autograd.grad(
            folded, leaves, g, create_graph=torch.is_grad_enabled(), allow_unused=True
        )


class WeightDescriptor:
    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Adapted | None, owner: Any = None) -> Any:
        if module is None:
            return self
        if self.name not in module._parameters:
            raise AttributeError(self.name)  # then Python calls nn.Module's __getattr__
        try:
            return self._of(module)
        except AttributeError as e:
            # on an AttributeError Python would get the stored tensor from nn.Module, and the
            # adapter would be left out silently
            raise RuntimeError(f"{module.site}.{self.name} can't be merged: {e}") from e

    def _of(self, module: Adapted) -> Tensor | None:
        own = module._parameters[self.name]
        deltas: Any = module.deltas
        names = module.selection.names_for_call(module.training)
        carried = {name: deltas[name] for name in names if name in deltas}
        active = {name: delta for name, delta in carried.items() if not delta.in_place}
        if not active:
            return own
        read = FoldedRead(module.layer_class(module), active, module.site)
        # compilers, tracers and functional transforms can't use a stand-in
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if traced or torch._C._are_functorch_transforms_active():
            return read.folded()(self.name)
        if own is None and read.added_bias() is None:
            return None
        leaves = read.leaves() if torch.is_grad_enabled() else []
        if leaves and read.like(self.name).is_floating_point():
            return _Deferred.apply(read, self.name, *leaves)
        return StandIn.of(read, self.name)


@cache
def _register_ties() -> None:
    """If another module is tied to a stand-in, registers the stored parameter there instead."""
    register_module_parameter_registration_hook(
        lambda module, name, parameter: parameter.stored if isinstance(parameter, StandIn) else None
    )


NAMES = ("weight", "bias")


@dataclass(frozen=True)
class FoldedRead:
    """A module, its path, and its active deltas by adapter name, lowest first."""

    base: BaseLayer
    deltas: dict[str, Delta]
    site: str

    def stored(self, name: str) -> Tensor | None:  # own shape
        return self.base.parameter(name)

    def like(self, name: str) -> Tensor:
        """Returns a tensor, of any shape, with the dtype and device of the parameter of that name.
        """
        own = self.stored(name)
        return self.base.bare.weight if own is None else own

    def folded(self) -> Callable[[str], Tensor | None]:
        """Folds the deltas, and returns a function that maps "weight" or "bias" to the folded
        tensor, in the stored layout (own shape) and dtype.
        """
        try:
            w, b = self.base.dense()
        except NotMergeable as e:
            raise self._error(str(e)) from None
        wide = torch.promote_types(w.dtype, torch.float32)
        w, b = w.to(wide), None if b is None else b.to(torch.promote_types(b.dtype, torch.float32))
        start, kind = {"weight": w, "bias": b}, w.device.type
        autocast = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            w, b = self._fold(w, b)
        end = {"weight": w, "bias": b}

        def as_stored(name: str) -> Tensor | None:
            if end[name] is start[name]:
                return self.stored(name)
            try:
                encoded = self.base.encode(w, b)[name]
            except NotMergeable as e:
                raise self._error(str(e)) from None
            return rounded(encoded, self.like(name).dtype).contiguous()

        return as_stored

    def _fold(self, w: Tensor, b: Tensor | None, meta: bool = False) -> WeightAndBias:
        for adapter, delta in self.deltas.items():
            try:
                w, b = (on_meta(delta) if meta else delta).fold(w, b)
            except NotMergeable as e:
                raise self._error(f"adapter {adapter!r} can't be merged: {e}") from None
        return w, b

    def _error(self, why: str) -> NotMergeable:
        return NotMergeable(
            f"{self.site} ({type(self.base.module).__name__}): the model reads the weight or bias"
            f" of this module without calling its forward, so adapters must be merged, but {why};"
            " leave the module out of the targets, or read the stored weight from the state dict"
        )

    def leaves(self) -> list[Tensor]:
        """Returns the trainable parameters, of any shape, that the folded tensors depend on."""
        parts = [part for delta in self.deltas.values() for part in (delta, *delta.parts())]
        parameters = [
            *(p for part in parts for p in (*part.parameters(), *part.borrowed())),
            *(p for n in NAMES if (p := self.stored(n)) is not None),
        ]
        return [p for p in {id(p): p for p in parameters}.values() if p.requires_grad]

    def added_bias(self) -> Tensor | None:
        """Returns the bias (out,), on the meta device, that the deltas add to a module without one,
        or None.
        """
        try:
            w, _ = self.base.dense()
            return self._fold(torch.empty_like(w, device="meta"), None, meta=True)[1]
        except NotMergeable:
            return None

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of the folded tensor: the stored shape plus rows that the deltas
        append.
        """
        like = self.stored(name) if self.stored(name) is not None else self.added_bias()
        assert like is not None
        parts = (part for delta in self.deltas.values() for part in delta.parts())
        rows = max((i + 1 for part in parts for i in part.values_at()), default=0)
        return torch.Size(max(n, rows) if axis == 0 else n for axis, n in enumerate(like.shape))
