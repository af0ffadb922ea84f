"""Layers of bitsandbytes' 4-bit and 8-bit modules, whose W is dequantized for each use.

    Linear4bit      NF4 or FP4 codes with an 8-bit constant for every 64 of them: 4.13 bits per
                    weight (Dettmers et al. 2023, arXiv 2305.14314)
    Linear8bit      int8 with one scale for each output (Dettmers et al. 2022, LLM.int8, arXiv
                    2208.07339)

Adapted modules do not run bitsandbytes' forward, because int8 rounds activations, and 4-bit
converts the weights on some CPUs.
"""

from __future__ import annotations

import importlib
import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lorafold.core.attach import Adapted, adapted_class
from lorafold.core.contexts import is_fake
from lorafold.core.expert_matrices import expert_parameters
from lorafold.errors import LorafoldError, NotMergeable
from lorafold.layers.dense import Linear, Matrix
from lorafold.ops.nf4 import BLOCK_OF_CONSTANTS, levels

OPERATION = "bitsandbytes::quantize_4bit"
CHUNK = 1 << 18  # weights: 1 MB in fp32


def quantize_nf4(w: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Returns NF4 codes (n / 2, 1) in uint8, two per byte, the first in the high nibble, and
    constants c (n / block,) in fp32. They equal bitsandbytes', but are computed faster on a CPU:
    code = 15 - #{k : w / c <= m_k}, with m_k in the middle of levels k and k + 1.
    """
    flat, level = w.detach().reshape(-1), levels()
    middles = ((level[:-1] + level[1:]) / 2).tolist()
    packed = torch.empty(len(flat) // 2, dtype=torch.uint8)
    constants = torch.empty(len(flat) // block)
    part = CHUNK // block * block
    below = torch.empty(min(part, len(flat)), dtype=torch.bool)
    count = torch.empty_like(below, dtype=torch.uint8)
    parts = (flat.split(part), packed.split(part // 2), constants.split(part // block))
    for of, bytes_of, c in zip(*parts, strict=True):
        x = of.float().view(-1, block)
        torch.amax(x.abs(), 1, out=c)
        x = (x * (1 / c.clamp(min=1e-38))[:, None]).view(-1)
        hit, n = below[: len(x)], count[: len(x)].zero_()
        for middle in middles:
            n += torch.le(x, middle, out=hit).view(torch.uint8)
        pairs = n.view(-1, 2)
        # 16 (15 - first) + (15 - second)
        torch.sub(255, pairs[:, 0] * 16 + pairs[:, 1], out=bytes_of)
    return packed[:, None], constants


def _cpu_kernel(w: Tensor, block: int, kind: str, stored_as: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns codes and constants of w, of any shape, as bitsandbytes' quantization operation does.
    """
    if kind == "nf4" and stored_as == torch.uint8 and w.numel() % block == 0:
        return quantize_nf4(w, block)
    return torch.ops.bitsandbytes.quantize_4bit.default.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd),
        w, block, kind, stored_as,
    )  # fmt: skip


def import_bitsandbytes() -> ModuleType:
    """Imports bitsandbytes quietly, and registers `quantize_nf4` as its CPU kernel unless there is
    one. Raises ImportError if it is not installed.
    """
    if (module := sys.modules.get("bitsandbytes")) is None:
        with quiet_import():
            module = importlib.import_module("bitsandbytes")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATION, "CPU"):
        torch.library.register_kernel(OPERATION, "cpu", _cpu_kernel)
    return module


@contextmanager
def quiet_import() -> Iterator[None]:
    """Context manager for imports of bitsandbytes: without warnings that recommend kernels, without
    a kernel that it would download, and without torch's compiler, which takes 1.5 s to import.
    """
    importlib.import_module("transformers.integrations.hub_kernels")  # keeps its own `get_kernel`
    kernels: Any = sys.modules.get("kernels", ModuleType("kernels"))
    logger = logging.getLogger("bitsandbytes")
    level, compiler, download = logger.level, torch.compile, getattr(kernels, "get_kernel", None)
    logger.setLevel(logging.ERROR)
    torch.compile = partial(_compile_when_called, compiler)
    kernels.get_kernel = None  # bitsandbytes catches that its call fails
    try:
        yield
    finally:
        logger.setLevel(level)
        torch.compile = compiler
        kernels.get_kernel = download


def _compile_when_called(compiler: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    """Delays torch.compile until the function is first called."""
    if function is None:
        return partial(_compile_when_called, compiler, **options)
    compiled = cache(partial(compiler, function, **options))
    return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))


def block_constants(state: Any, blocks: slice = slice(None)) -> Tensor:
    """Returns the constant of each block (blocks,) of 4-bit codes."""
    if not state.nested:
        return state.absmax[blocks]
    nested, skipped = state.state2, (blocks.start or 0) % BLOCK_OF_CONSTANTS
    start, end = (blocks.start or 0) - skipped, blocks.stop or len(state.absmax)
    scales = nested.absmax[start // BLOCK_OF_CONSTANTS : -(-end // BLOCK_OF_CONSTANTS)]
    values = torch.ops.bitsandbytes.dequantize_blockwise.default(
        state.absmax[start:end], scales, nested.code, nested.blocksize, nested.dtype
    )
    return values[skipped:].add_(state.offset)


def dequantized_4bit(
    codes: Tensor, constants: Tensor, state: Any, shape: tuple[int, ...]
) -> Tensor:
    """Returns the matrix of the given shape from 4-bit codes (..., 1), which may be stored in any
    dtype.
    """
    # flattened if the input size is not a multiple of the block size, because the CPU's AVX512
    # kernel would use the wrong constants
    flat = shape if shape[-1] % state.blocksize == 0 else (prod(shape),)
    return torch.ops.bitsandbytes.dequantize_4bit.default(
        codes.view(torch.uint8), constants, state.blocksize, state.quant_type, flat, state.dtype
    ).view(shape)


def make_linear(module: nn.Module) -> None:
    """Turns a module whose weight is no longer quantized into a plain linear layer."""
    adapted = isinstance(module, Adapted)
    module.__class__ = adapted_class(nn.Linear, Linear) if adapted else nn.Linear


class Quantized(Matrix):
    """Abstract: a frozen matrix that is dequantized for each use."""

    frozen = True
    quantized = True
    _read: list[Tensor] | None = None  # the dequantized matrix in a `reading_once` block

    @contextmanager
    def reading_once(self) -> Iterator[None]:
        self._read = []
        try:
            yield
        finally:
            self._read = None

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantized matrix."""

    @abstractmethod
    def dequantized(self) -> Tensor:  # (out, in)
        """Returns W (out, in) in `dtype`."""

    def read(self, dtype: torch.dtype) -> Tensor:
        known = self._read
        w = known[0] if known else self.dequantized()
        if known == []:
            known.append(w)
        return w.to(dtype)

    def weight(self) -> Tensor:
        return self.read(getattr(self.module, "compute_dtype", None) or self.dtype)

    def original(self) -> Tensor:
        if self.stored is None:
            raise LorafoldError(
                "the weight is quantized, but the weight before quantization is needed; pass the"
                " base's original weights as `base`"
            )
        w = self.stored()
        return w.t() if getattr(self.module, "source_cls", nn.Linear).__name__ == "Conv1D" else w

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features  # type: ignore[return-value]

    def as_is(self, x: Tensor) -> bool:
        return False

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        raise NotMergeable(
            f"{type(self.module).__name__} stores a quantized weight, in which a change would be"
            " lost to rounding; dequantize the weight first"
        )

    def dense_like(self) -> tuple[Tensor, Tensor | None]:
        dtype = getattr(self.module, "compute_dtype", None) or self.dtype
        w = torch.empty(self.shape, dtype=dtype, device="meta")
        return w, None if self.bias is None else self.bias.to("meta")

    def plain(self) -> Linear:
        return Linear(self.module)

    def dequantize(self) -> None:
        module, weight = self.module, self.weight()
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        for attribute in ("quant_state", "state"):
            module.__dict__.pop(attribute, None)
        make_linear(module)


class Linear4bit(Quantized):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            _ = self._state
        return super().run(*args, **kwargs)

    @property
    def _state(self) -> Any:
        """The quantization state, with the codes in their original order. For inference on a CPU,
        the module reorders them, and then computes no gradients.
        """
        weight = self.bare.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            back = import_bitsandbytes().functional._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = back(weight.data, weight.quant_state)
            self.module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return weight.quant_state

    @property
    def dtype(self) -> torch.dtype:
        return self._state.dtype

    def dequantized(self) -> Tensor:
        state = self._state
        return dequantized_4bit(self.bare.weight.data, block_constants(state), state, self.shape)


class Linear8bit(Quantized):
    mixes_rows = True
    dtype = torch.bfloat16  # bitsandbytes does not record it

    def dequantized(self) -> Tensor:
        module = self.bare
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return (module.weight.data * (scale / 127)[:, None]).to(self.dtype)


def nf4(w: Tensor) -> nn.Module:  # (out, in)
    """Returns a linear layer without bias that stores w (out, in), rounded to bf16, as NF4 with
    quantized constants.
    """
    module: Any = _empty_linear("LinearNF4", w)
    # with the code order of this CPU kernel there are no gradients, and it is not faster
    module.support_avx512bf16_for_cpu = False
    if not is_fake(w):
        return _quantize_module(module, w)
    functional = import_bitsandbytes().functional
    with unset_fake_temporarily():
        functional.quantize_blockwise(torch.zeros(1))  # creates its table, which needs real values
    codes, state = functional.quantize_nf4(w.bfloat16(), compress_statistics=True)
    return _with_fake_codes(module, codes, quant_state=state)


def int8(w: Tensor) -> nn.Module:  # (out, in)
    """Returns a linear layer without bias that stores w (out, in), rounded to bf16, as int8."""
    module = _empty_linear("Linear8bitLt", w, has_fp16_weights=False)
    if not is_fake(w):
        return _quantize_module(module, w)
    codes, scales, _ = import_bitsandbytes().functional.int8_vectorwise_quant(w.half())
    return _with_fake_codes(module, codes, CB=codes, SCB=scales)


def _empty_linear(cls: str, w: Tensor, **options: Any) -> nn.Module:
    with unset_fake_temporarily():
        return getattr(import_bitsandbytes().nn, cls)(
            w.shape[1], w.shape[0], bias=False, device="meta", **options
        )


def _quantize_module(module: nn.Module, w: Tensor) -> nn.Module:
    old: Any = module.weight
    module.weight = type(old)(w.detach().bfloat16().cpu(), requires_grad=False, **old.__dict__)
    return module.to(w.device)


def _with_fake_codes(module: nn.Module, codes: Tensor, **attributes: Any) -> nn.Module:
    """Gives the module a weight of fake codes, which bitsandbytes' parameter class can't hold."""
    weight = nn.Parameter(codes, requires_grad=False)
    vars(weight).update(attributes)
    module._parameters["weight"] = weight
    return module


def set_compute_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Sets the compute dtype of a quantized module; has no effect on other modules. bitsandbytes'
    modules keep the order of their codes.
    """
    settings: Any = module
    if "fmt" in vars(module) or expert_parameters(module):
        settings.compute_dtype = dtype
    elif isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes."):
        settings.compute_dtype, settings.compute_type_is_set = dtype, True
        settings.support_avx512bf16_for_cpu = False
