"""Chooses how a base stores its weights (fp32, bf16, nf4, int8): as was asked, or else by its
files, its adapters and the device; with the reason for the choice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorafold.errors import LorafoldError
from lorafold.files.record import base_trained_on
from lorafold.machine.devices import native_bf16
from lorafold.models.quantizing import QUANTIZATIONS, quantization_of
from lorafold.models.sources import ModelSource
from lorafold.models.weights import Weights

if TYPE_CHECKING:
    import torch


class Storage(NamedTuple):
    """How a base stores its weights: the dtype that is computed in, the quantization of its linears
    if there is one, and the reason for the choice.
    """

    dtype: "torch.dtype"
    quantization: str | None = None  # nf4, int8 (the keys of `quantizing.QUANTIZATIONS`)
    why: str = ""


def choose_storage(base: str, device: "torch.device | str") -> Storage:
    """Return the storage for a base of auto, fp32, bf16, nf4 or int8 on this device, with the
    reason as a line to print. Raises LorafoldError for other names.

    auto is bf16 if the device multiplies it natively, else fp32, since emulated bf16 is slower than
    fp32. Quantized weights are dequantized to the dtype that auto would choose.
    """
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if base not in ("auto", *dtypes, *QUANTIZATIONS):
        raise LorafoldError(
            f"base {base}: unknown; expected auto, {', '.join(dtypes)},"
            f" {' or '.join(QUANTIZATIONS)}"
        )
    native, why = native_bf16(torch.device(device))
    best = "bf16" if native else "fp32"
    if base in QUANTIZATIONS:
        return Storage(dtypes[best], base, f"{base}, computed in {best}: {why}")
    if base == "auto":
        return Storage(dtypes[best], None, f"{best}: {why}")
    return Storage(dtypes[base], None, f"{base}: as asked" + f"; {why}" * (base == "bf16"))


def default_storage(source: ModelSource, adapters: Sequence[str | Path] = ()) -> str:
    """Return the storage for a base if none was asked for: the quantization of its files if they
    have one, else that of the base on which the adapters were trained, else auto.

    Raises LorafoldError if the adapters were trained on different ones.
    """
    in_files = source.config().get("quantization_config")
    name = base_trained_on(adapters) if in_files is None else quantization_of(in_files)
    return name if name in QUANTIZATIONS else "auto"


def weights_of(source: ModelSource, storage: Storage) -> Weights | None:
    """Return the base's original weights, read from its files, if the model's are quantized; else
    None. `load_model` must have checked the files.
    """
    if storage.quantization is None:
        return None
    from lorafold.models.originals import original_weights

    return original_weights(source)
