"""The table of quantizations and dtypes of base weights.

To add a quantization, add its layer in `lorafold.layers`, its name to `StorageName` and a row to
`STORAGES`. `choose_storage` selects a row by name or by device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lorafold.errors import LorafoldError
from lorafold.runtime.devices import native_bf16

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

StorageName = Literal["nf4", "int8", "fp8", "int4", "mxfp4", "bf16", "fp32", "auto"]


@dataclass(frozen=True)
class StorageRow:
    """One quantization or dtype.

    Attributes:
        bits: the bits per weight, without shared constants.
        dtype: torch's name of the dtype, for unquantized weights.
        bnb_options: the arguments of `BitsAndBytesConfig` to quantize a model on load; empty if
            bitsandbytes does not support this quantization.
        packer: the function that quantizes a matrix, as `module:function`.
        codes: the type of codes in compressed-tensors files, and the possible formats of these
            files.
        method: the `quant_method` that identifies such files without further fields.
    """

    bits: int
    dtype: str = ""
    bnb_options: dict[str, Any] = field(default_factory=dict)
    packer: str = ""
    codes: tuple[str, tuple[str, ...]] = ("", ())
    method: str = ""

    @property
    def pack(self) -> Callable[[Tensor], nn.Module]:
        """The function that turns a matrix (out, in) into a quantized linear layer without bias."""
        return resolve_name(self.packer)


STORAGES = {
    # NormalFloat with 8-bit constants (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)
    "nf4": StorageRow(
        4,
        bnb_options={
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
        packer="lorafold.layers.bitsandbytes:nf4",
    ),
    # a scale for each output (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339)
    "int8": StorageRow(
        8,
        bnb_options={"load_in_8bit": True},
        packer="lorafold.layers.bitsandbytes:int8",
        codes=("int", ("int-quantized", "naive-quantized", "pack-quantized")),
    ),
    # a scale for the matrix, a row or a block
    "fp8": StorageRow(8, codes=("float", ("float-quantized", "naive-quantized")), method="fp8"),
    # packed into int32, in rows or groups
    "int4": StorageRow(4, codes=("int", ("pack-quantized",))),
    # a power-of-two scale for each 32 weights; only for matrices of experts
    "mxfp4": StorageRow(4, method="mxfp4"),
    "bf16": StorageRow(16, dtype="bfloat16"),
    "fp32": StorageRow(32, dtype="float32"),
}
UNQUANTIZED = tuple(name for name, row in STORAGES.items() if row.dtype)
NAME_OF_DTYPE = {f"torch.{STORAGES[name].dtype}": name for name in UNQUANTIZED}
# ON_LOAD: lorafold can quantize to it; IN_FILES: only for models whose files already use it;
# COMPRESSED_NAMES: in files of compressed-tensors
ON_LOAD = tuple(name for name, row in STORAGES.items() if row.bnb_options)
IN_FILES = tuple(name for name in STORAGES if name not in (*UNQUANTIZED, *ON_LOAD))
COMPRESSED_NAMES = tuple(name for name, row in STORAGES.items() if row.codes[0])
QUANTIZED = (*ON_LOAD, *IN_FILES)
DEFAULT: StorageName = "nf4"  # used by QLoRA, and the smallest of ON_LOAD
_IF_STORED = f"if the model's files already use it, {', '.join(IN_FILES)}"
STORAGE_NAMES = f"{', '.join((*ON_LOAD, *UNQUANTIZED))}, or, {_IF_STORED}"


def bnb_storage(bits: int) -> str | None:
    """The name of bitsandbytes' quantization with this number of bits, or None."""
    return next((name for name in ON_LOAD if STORAGES[name].bits == bits), None)


def method_storage(method: Any) -> str | None:
    """The name of the quantization that a `quant_method` implies, or None."""
    names = (name for name, row in STORAGES.items() if row.method == method)
    return next(names, None) if method else None


def codes_storage(code_type: str, bits: int) -> str | None:
    """The name of the quantization for compressed-tensors' codes of this type (float or int) and
    number of bits, or None.
    """
    rows = STORAGES.items()
    return next((n for n, row in rows if (row.codes[0], row.bits) == (code_type, bits)), None)


class Storage(NamedTuple):
    """The compute dtype of a base, the quantization of its linear layers if any, and the reason for
    the choice.
    """

    dtype: torch.dtype
    quantization: str | None = None  # one of QUANTIZED
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of this storage in STORAGES."""
        return self.quantization or NAME_OF_DTYPE.get(str(self.dtype), UNQUANTIZED[-1])


def check_storage(name: str) -> None:
    if name not in ("auto", *UNQUANTIZED, *QUANTIZED):
        raise LorafoldError(
            f"storage {name}: unknown; expected auto, {', '.join(UNQUANTIZED)},"
            f" {' or '.join(ON_LOAD)}, or {' or '.join(IN_FILES)} if the"
            " model's files are stored that way"
        )


def choose_storage(base: str, device: torch.device | str) -> Storage:
    """The storage with this name (auto or in STORAGES) on this device, and the reason as a line to
    print. auto is bf16 if the device has native bf16 matmuls, else fp32; quantized weights are
    dequantized to the same dtype.
    """
    import torch

    check_storage(base)
    dtypes = {name: getattr(torch, STORAGES[name].dtype) for name in UNQUANTIZED}
    native, reason = native_bf16(torch.device(device))
    best = "bf16" if native else "fp32"
    if base in QUANTIZED:
        return Storage(dtypes[best], base, f"{base}, computed in {best}: {reason}")
    if base == "auto":
        return Storage(dtypes[best], None, f"{best}: {reason}")
    return Storage(dtypes[base], None, f"{base}: as requested" + f"; {reason}" * (base == "bf16"))
