"""Tensors that say cuda:0, or mps:0, and compute on the CPU: code for a GPU runs on them.

    with Device() as device:
        x = Shadow(torch.ones(3))        x.device is cuda:0, x.host a CPU tensor
        with device.counting():
            x.sum().item()
        device.count.synchronizations    Counter({"item at training_step/losses.py:78": 1})

An operation whose inputs lie on two devices fails as on a GPU. While it counts, each operation that
would wait for the device or launch a kernel is counted with the line of lorafold that asked for it;
an operator of lorafold that has a kernel for CUDA is one launch. Not seen are: what kernels demand
beyond `cuda_kernels`, timing, races, rounding of cuBLAS, several devices.
"""

import contextlib
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

WHERE = torch.device("mps:0" if os.environ.get("SHADOW_DEVICE") == "mps" else "cuda:0")
aten = torch.ops.aten
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
BY_VALUE = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
            "equal")  # fmt: skip
ACROSS = ("copy_", "_to_copy", "_foreach_copy_", "set_", "lift_fresh", *INDEXED)
FREE = ("detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
        "lift_fresh", "alias", "_unsafe_view", "set_", "resize_",
        "_local_scalar_dense")  # fmt: skip
# these take numbers of one element from the host
SCALARS = ("index_copy", "index_copy_", "index_add", "index_add_", "index_select", "gather",
           "scatter")  # fmt: skip
KERNELS = {"scale_backward": 2}  # launches of operations whose form for CUDA is not one
NOT_OF_MPS = (torch.float64, torch.complex128)
STANDINS: dict[Any, Callable[..., Any]] = {}  # of kernels that only CUDA has


class Generator(torch.Generator):
    """A generator that says it is CUDA's, which a CPU build can't make."""

    theirs: ClassVar[dict[int, Any]] = {}  # by address: operations get another wrapper of it

    def __new__(cls, device: Any = "cpu") -> Any:
        there = torch.device(device).type != "cpu"
        made = super().__new__(cls, device="cpu" if there else device)
        if there:
            cls.theirs[made._cdata] = made
        return made

    def __init__(self, device: Any = "cpu") -> None: ...


class Shadow(torch.Tensor):
    """A tensor on the device whose values are those of `host`, of the same shape on the CPU."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "Shadow":
        made: Shadow = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, device=WHERE,
        )  # fmt: skip
        made.host = host
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Shadow({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), Shadow(self.host.clone()))

    def tolist(self) -> Any:  # torch refuses it for subclasses
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {WHERE} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {}, None)


def pinned(x: Tensor) -> Tensor:
    """`Tensor.pin_memory`, which a CPU build has not."""
    found = x.clone()
    vars(found)["_pinned"] = True
    return found


def is_pinned(x: Tensor) -> bool:
    """Whether a copy of it to the device is one that the host need not wait for."""
    return "_pinned" in vars(x)


def host_of(x: Any) -> Any:
    """The values of a tensor, on the CPU; anything else as it is."""
    return x.host if isinstance(x, Shadow) else x


class Count:
    """What would wait for the device, be copied to it, and be launched."""

    def __init__(self) -> None:
        self.synchronizations: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()  # to the device, without waiting
        self.launches: Counter[str] = Counter()  # by operation
        self.lines: Counter[str] = Counter()  # the lines that launched

    def told(self, most: int = 30) -> str:
        """All of it, as a test that fails shows it."""
        counters = vars(self).items()
        parts = [f"{name}: {c.total()}" for name, c in counters]
        for name, counter in counters:
            parts += [f"  {n:5} {name} of {what}" for what, n in counter.most_common(most)]
        return "\n".join(parts)


def asking() -> str:
    """The innermost line of lorafold that runs, after that of a library that it called."""
    library = ""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/src/lorafold/" in name and not name.endswith("ops/operators.py"):
            own = f"{name.rpartition('/lorafold/')[2]}:{frame.f_lineno}"
            return f"{library} < {own}" if library else own
        if not library and any(f"/{n}/" in name for n in ("transformers", "bitsandbytes")):
            library = f"{name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return library or "a test"


def indices(func: Any, args: Any) -> list[Tensor]:
    """The tensors by which an operation indexes its first input."""
    if func.overloadpacket.__name__ not in INDEXED:
        return []
    return [i for i in tree_iter(args[1]) if isinstance(i, Tensor)]


def check_devices(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs on the device and those on the host; raises RuntimeError, as CUDA does, if they
    meet.
    """
    tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    name = func.overloadpacket.__name__
    there = [t for t in tensors if isinstance(t, Shadow)]
    here = [t for t in tensors if not isinstance(t, Shadow) and (t.dim() or name in SCALARS)]
    crossing = name not in ACROSS or (name in INDEXED and not isinstance(args[0], Shadow))
    if there and here and crossing:
        raise RuntimeError(
            "Expected all tensors to be on the same device:"
            f" {func} on {[(str(t.device), tuple(t.shape)) for t in tensors]}"
        )
    return there, here


def count(found: Count, func: Any, args: Any, kwargs: Any, there: Any, here: Any) -> None:
    name, there_is = func.overloadpacket.__name__, WHERE.type
    to = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    waits = ""
    if name == "_to_copy" and to is not None:
        source = isinstance(args[0], Shadow)
        if source and to == "cpu":
            waits = f"copy to the host {tuple(args[0].shape)}"
        elif not source and to == there_is and kwargs.get("non_blocking") and is_pinned(args[0]):
            found.copies[f"{tuple(args[0].shape)} at {asking()}"] += 1
        elif not source and to == there_is:
            waits = f"copy to the device {tuple(args[0].shape)}"
    elif name in ("copy_", "_foreach_copy_") and there and here:
        if len(args) > 2 and args[2] and is_pinned(args[1]):  # non_blocking
            found.copies[f"{tuple(args[0].shape)} at {asking()}"] += 1
        else:
            waits = "copy_ between devices"
    elif there and name == "_local_scalar_dense":
        waits = "item"
    elif there and name in BY_VALUE:
        waits = name
    elif there and any(i.dtype in (torch.bool, torch.uint8) for i in indices(func, args)):
        waits = "boolean index"
    elif there and any(not isinstance(i, Shadow) for i in indices(func, args)):
        waits = "index on the host"
    elif there and name == "repeat_interleave" and kwargs.get("output_size") is None:
        waits = name
    if waits:
        found.synchronizations[f"{waits} at {asking()}"] += 1
    if (there or to == there_is) and not func.is_view and name not in FREE:
        launches = KERNELS.get(name, 1)
        found.launches[name] += launches
        found.lines[asking().rpartition(" < ")[2]] += launches


def computed(func: Any, args: Any, kwargs: Any, found: Count | None) -> Any:
    """An operation on shadows, by its values on the host."""
    there, here = check_devices(func, args, kwargs)
    if found is not None:
        count(found, func, args, kwargs, there, here)
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    shadows = {id(t.host): t for t in there if isinstance(t, Shadow)}
    own_args, own = tree_map(host_of, args), dict(tree_map(host_of, kwargs))
    if device is not None and device.type == WHERE.type:
        own["device"] = torch.device("cpu")
    own.pop("pin_memory", None)
    lies_there = bool(shadows) if device is None else device.type == WHERE.type
    generator = own.get("generator")
    if generator is not None and (generator._cdata in Generator.theirs) != lies_there:
        kind = WHERE.type if lies_there else "cpu"
        raise RuntimeError(f"Expected a {kind} device type for generator: {func}")
    with torch.no_grad():
        out = STANDINS.get(func, func)(*own_args, **own)
    if torch.Tag.inplace_view in func.tags and shadows and func is not aten.set_.source_Storage:
        with torch.utils._mode_utils.no_dispatch():  # the shadow has sizes of its own
            return func(*args, **kwargs)

    def shown(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, Shadow) or not lies_there:
            return x
        if WHERE.type == "mps" and x.dtype in NOT_OF_MPS:
            raise TypeError(f"the MPS framework doesn't support {x.dtype}: {func}")
        return shadows[id(x)] if id(x) in shadows else Shadow(x)  # in place: the same tensor

    return tree_map(shown, out)


def operations() -> dict[Any, Any]:
    """lorafold's operators, by what torch dispatches."""
    from lorafold.ops.operators import Operation

    modules = [m for name, m in sys.modules.items() if name.startswith("lorafold.")]
    own = [o for m in modules for o in vars(m).values() if isinstance(o, Operation)]
    return {o._dispatched: o for o in own if o._dispatched is not None}


class Device(TorchDispatchMode):
    """Makes shadows of what is asked for on the device, in the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self._counts = Count(), False
        self._operations: dict[Any, Any] = {}

    @contextlib.contextmanager
    def counting(self) -> Iterator[Count]:
        """Count afresh until the `with` block ends."""
        self.count, self._counts = Count(), True
        try:
            yield self.count
        finally:
            self._counts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lorafold":
            if any(isinstance(t, Shadow) for t in tree_iter((args, kwargs))):
                from lorafold.kernels.registry import IMPLEMENTATIONS

                known = self._operations
                operation = (known if func in known else known | operations())[func]
                self._operations[func] = operation
                if WHERE.type not in IMPLEMENTATIONS.get(operation, {}):
                    with self:  # launch by launch
                        return operation.plain(*args, **kwargs)
                STANDINS[func] = operation.plain  # a kernel, so one launch
        elif (torch.is_inference_mode_enabled() or func.is_view) and func._can_decompose():
            # below autograd modes see operations before they are taken apart: `contiguous` may copy
            with self:
                return func.decompose(*args, **kwargs)
        return computed(func, args, kwargs, self.count if self._counts else None)


def no_inference(mode: Any = True) -> Any:
    """`torch.inference_mode` as no_grad: torch gives subclasses no version counter in it."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else contextlib.nullcontext()


def pretend() -> None:
    """Have torch answer as a build for the device does, for CUDA on a machine with one of 80 GB.
    Call it before lorafold is imported, once in a process. A build for CUDA is left as it is.
    """
    if torch.version.cuda is not None:
        return
    torch.Tensor.pin_memory = pinned  # type: ignore[assignment,method-assign]
    torch.Generator = Generator  # type: ignore[misc]
    torch.inference_mode = no_inference  # type: ignore[assignment,misc]
    # torch.tensor(..., device="cuda") is made on the CPU and moved by an operation that is seen
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False)  # the engine's own threads know no modes
    if WHERE.type == "cuda":
        pretend_cuda()


def pretend_cuda() -> None:
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401  (which would look for CUDA's library)
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None  # factories call it before they dispatch
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda.current_device, cuda.set_device = lambda: 0, lambda *_: None
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: "a GPU that is pretended"
    cuda.synchronize = cuda.reset_peak_memory_stats = cuda.empty_cache = lambda *_: None
    cuda.mem_get_info = lambda *_: (79 << 30, 80 << 30)
    cuda.memory_reserved = cuda.memory_allocated = cuda.max_memory_allocated = lambda *_: 0
    cuda.get_rng_state_all = lambda: []
    cuda.manual_seed_all = lambda _: None
    torch._C._ensureCUDADeviceGuardSet()  # the same for a CUDA build without a GPU
