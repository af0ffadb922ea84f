"""How a base stores its weights (fp32, bf16, nf4, int8): as was asked, or else as its files, its
adapters and the device suggest, with the reason.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorafold.errors import LorafoldError
from lorafold.files.record import base_trained_on
from lorafold.machine.devices import native_bf16
from lorafold.models.quantizing import QUANTIZATIONS, quantization_of
from lorafold.models.sources import ModelSource
from lorafold.models.weights import FileWeights, Weights, model_files

if TYPE_CHECKING:
    import torch


class Storage(NamedTuple):
    """How a base's weights are held: the dtype of what is computed with them, the packing of its
    linears if any, and why.
    """

    dtype: "torch.dtype"
    quantization: str | None = None  # a word of `quantized.QUANTIZATIONS`
    why: str = ""


def choose_storage(base: str, device: "torch.device | str") -> Storage:
    """How the base's weights are held, with the reason, a line to print.

    `base` is auto, fp32, bf16, nf4 or int8.

    auto takes bf16 where the device multiplies it natively, else fp32: emulated bf16 is slower than
    fp32. Packed weights are computed with in the dtype that auto would take. Raises LorafoldError
    for another word.
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


def held_as(source: ModelSource, adapters: Sequence[str | Path] = ()) -> str:
    """The word for how a base is best held where none was asked for: as its files hold it if they
    are packed, else as the adapters were trained on it, if that was packed, else auto.
    LorafoldError where the adapters differ.
    """
    stored = source.config().get("quantization_config")
    word = base_trained_on(adapters) if stored is None else quantization_of(stored)
    return word if word in QUANTIZATIONS else "auto"


def weights_of(source: ModelSource, storage: Storage) -> Weights | None:
    """The base's own weights, from its files, where a model that is held so does not have them.

    The files are those that `load_model` has checked.
    """
    return None if storage.quantization is None else FileWeights(model_files(source.path))
