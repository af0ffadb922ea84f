"""Modules whose matrix bitsandbytes packs into 4 or 8 bits.

    Linear4bit      NF4 or FP4 codes, a constant for every 64 of them, itself in 8 bits: 4.13 bits a
                    weight   (ops.nf4 is the specification)
    Linear8bit      int8 with one scale a row (LLM.int8)

W is the matrix that unpacking gives, in the dtype it was packed from; it is unpacked once a use and
never kept. bitsandbytes' own forwards are not used under a delta: the one for int8 rounds
activations to 8 bits too, and the one for 4 bits repacks the weights on some CPUs, with coarser
constants, as soon as it runs without gradients. Packed weights can't hold a change; `unpack` makes
the module a plain linear.
"""

from __future__ import annotations

import importlib
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lorafold.bases.dense import Linear, Matrix
from lorafold.core.attach import Adapted, adapted_class
from lorafold.core.fake import is_fake
from lorafold.errors import LorafoldError, NotMergeable


def bitsandbytes() -> ModuleType:
    """The package, without what it says on import about kernels that could be downloaded; its
    errors are heard. ImportError without it.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)


class Packed(Matrix):
    """Abstract: a frozen matrix that is unpacked for each use."""

    frozen = True

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the unpacked matrix."""

    @abstractmethod
    def unpacked(self) -> Tensor:  # (out, in), `dtype`
        ...

    def read(self, dtype: torch.dtype) -> Tensor:
        return self.unpacked().to(dtype)

    def weight(self) -> Tensor:
        compute: torch.dtype | None = getattr(self.module, "compute_dtype", None)
        return self.read(compute or self.dtype)

    def original(self) -> Tensor:
        if self.stored is None:
            raise LorafoldError(
                "its weight is packed, and the one that it was packed from is not at hand"
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
            f"{type(self.module).__name__} holds packed numbers that a change would be rounded away"
            " in; unpack it first"
        )

    def write(self, w: Tensor, b: Tensor | None) -> None:
        self.encode(w, b)

    def dense_like(self) -> tuple[Tensor, Tensor | None]:
        dtype = getattr(self.module, "compute_dtype", None) or self.dtype
        b = self.bias
        w = torch.empty(self.shape, dtype=dtype, device="meta")
        return w, None if b is None else b.to("meta")

    def plain(self) -> Linear:
        return Linear(self.module)

    def unpack(self) -> None:
        module, weight = self.module, self.weight()
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        for kept in ("quant_state", "state"):
            module.__dict__.pop(kept, None)
        module.__class__ = (
            adapted_class(nn.Linear, Linear) if isinstance(module, Adapted) else nn.Linear
        )


class Linear4bit(Packed):
    def run(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            _ = self._state
        return super().run(*args, **kwargs)

    @property
    def _state(self) -> Any:
        """Of the codes in their plain order: in the one that the module takes for answers on a CPU
        it computes no gradients.
        """
        weight: Any = self.bare.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            back = bitsandbytes().functional._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = back(weight.data, weight.quant_state)
            self.module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        return weight.quant_state

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._state.dtype
        return dtype

    def unpacked(self) -> Tensor:
        state, ops = self._state, torch.ops.bitsandbytes
        constants = state.absmax
        if state.nested:
            of = state.state2
            constants = (
                ops.dequantize_blockwise.default(
                    constants, of.absmax, of.code, of.blocksize, of.dtype
                )
                + state.offset
            )
        # as one row where rows end inside a block: the CPU's AVX512 kernel would take the wrong
        # constants there
        rows = self.shape if self.shape[1] % state.blocksize == 0 else (prod(self.shape),)
        codes = self.bare.weight.data
        unpacked: Tensor = ops.dequantize_4bit.default(
            codes, constants, state.blocksize, state.quant_type, rows, state.dtype
        )
        return unpacked.view(self.shape)


class Linear8bit(Packed):
    dtype = torch.bfloat16  # bitsandbytes does not record it

    def unpacked(self) -> Tensor:
        module = self.bare
        scale = module.state.SCB if module.weight.SCB is None else module.weight.SCB
        return (module.weight.data * (scale / 127)[:, None]).to(self.dtype)


def nf4(w: Tensor) -> nn.Module:  # (out, in)
    module: Any = _empty("LinearNF4", w)
    # codes in the order of that CPU's kernel give no gradients, and answers no sooner
    module.support_avx512bf16_for_cpu = False
    if not is_fake(w):
        return _packed(module, w)
    functional = bitsandbytes().functional
    with unset_fake_temporarily():
        functional.quantize_blockwise(torch.zeros(1))  # makes its table, for which it needs values
    codes, state = functional.quantize_4bit(
        w.bfloat16(), quant_type="nf4", compress_statistics=True
    )
    return _with(module, codes, quant_state=state)


def int8(w: Tensor) -> nn.Module:  # (out, in)
    module = _empty("Linear8bitLt", w, has_fp16_weights=False)
    if not is_fake(w):
        return _packed(module, w)
    codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(w.half())
    return _with(module, codes, CB=codes, SCB=scales)


def _empty(cls: str, w: Tensor, **options: Any) -> nn.Module:
    with unset_fake_temporarily():
        return getattr(bitsandbytes().nn, cls)(
            w.shape[1], w.shape[0], bias=False, device="meta", **options
        )


def _packed(module: nn.Module, w: Tensor) -> nn.Module:
    old: Any = module.weight
    module.weight = type(old)(w.detach().bfloat16().cpu(), requires_grad=False, **old.__dict__)
    return module.to(w.device)


def _with(module: nn.Module, codes: Tensor, **attributes: Any) -> nn.Module:
    """A weight of codes without values, which bitsandbytes' own class of parameters can't hold."""
    weight = nn.Parameter(codes, requires_grad=False)
    vars(weight).update(attributes)
    module._parameters["weight"] = weight
    return module


# a linear without bias that holds W, from bf16
PACKERS: dict[str, Callable[[Tensor], nn.Module]] = {"nf4": nf4, "int8": int8}


def record_unpacked(model: nn.Module, paths: Iterable[str]) -> None:
    """Say in a transformers model what is packed no longer: these modules, or nothing at all once
    no packed module is left.
    """
    quantizer, config = getattr(model, "hf_quantizer", None), getattr(model, "config", None)
    if quantizer is None:
        return
    if any(
        isinstance(m, nn.Linear) and m.weight.dtype in (torch.uint8, torch.int8)
        for m in model.modules()
    ):
        skipped = config.quantization_config.llm_int8_skip_modules or []  # type: ignore[union-attr]
        settings: Any = config.quantization_config  # type: ignore[union-attr]
        settings.llm_int8_skip_modules = [*skipped, *paths]
    else:
        quantizer.remove_quantization_config(model)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(flag, None)


def set_compute_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let a packed module compute in that dtype, and never repack itself.

    Nothing to do for any other.
    """
    if isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes."):
        settings: Any = module
        (
            settings.compute_dtype,
            settings.compute_type_is_set,
            settings.support_avx512bf16_for_cpu,
        ) = (dtype, True, False)
