"""Chooses how a base stores its weights, among the rows of `models.storages`: as was asked, or else
by its files, its adapters and the device; with the reason for the choice.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafold.errors import LorafoldError
from lorafold.machine.devices import native_bf16
from lorafold.models.in_files import readable, storage_in_files
from lorafold.models.quantizing import quantization_of
from lorafold.models.sources import ModelSource
from lorafold.models.storages import IN_FILES, MADE, PLAIN, QUANTIZED, STORAGES
from lorafold.models.weights import Weights

if TYPE_CHECKING:
    import torch
    from torch import nn


class Storage(NamedTuple):
    """How a base stores its weights: the dtype that is computed in, the quantization of its linears
    if there is one, and the reason for the choice.
    """

    dtype: "torch.dtype"
    quantization: str | None = None  # one of `storages.QUANTIZED`
    why: str = ""

    @property
    def name(self) -> str:
        """The storage as `choose_storage` takes it."""
        dtype = str(self.dtype).removeprefix("torch.")
        plain = next((name for name in PLAIN if STORAGES[name].dtype == dtype), PLAIN[-1])
        return self.quantization or plain


def check_storage(name: str) -> None:
    """Raise LorafoldError unless it is auto or a row of STORAGES."""
    if name not in ("auto", *PLAIN, *QUANTIZED):
        raise LorafoldError(
            f"storage {name}: unknown; expected auto, {', '.join(PLAIN)}, {' or '.join(MADE)}, or"
            f" {' or '.join(IN_FILES)} where its files are stored so"
        )


def choose_storage(base: str, device: "torch.device | str") -> Storage:
    """Return the storage for a base of auto or a row of STORAGES on this device, with the reason as
    a line to print. Raises LorafoldError for other names.

    auto is bf16 if the device multiplies it natively, else fp32, since emulated bf16 is slower than
    fp32. Quantized weights are dequantized to the dtype that auto would choose.
    """
    import torch

    check_storage(base)
    dtypes = {name: getattr(torch, STORAGES[name].dtype) for name in PLAIN}
    native, why = native_bf16(torch.device(device))
    best = "bf16" if native else "fp32"
    if base in QUANTIZED:
        return Storage(dtypes[best], base, f"{base}, computed in {best}: {why}")
    if base == "auto":
        return Storage(dtypes[best], None, f"{best}: {why}")
    return Storage(dtypes[base], None, f"{base}: as asked" + f"; {why}" * (base == "bf16"))


def recorded_storage(model: "nn.Module") -> dict[str, str] | None:
    """How a loaded transformers model stores its weights and which dtype it computes in, by the
    names that records use; None for any other model.
    """
    config: Any = getattr(model, "config", None)
    find: Any = getattr(model, "get_input_embeddings", None)
    weight = None
    with suppress(NotImplementedError):  # transformers', of a model of two encoders
        weight = getattr(find() if config and find else None, "weight", None)
    if weight is None:
        return None
    of_torch = str(weight.dtype).removeprefix("torch.")
    dtype = next((name for name in PLAIN if STORAGES[name].dtype == of_torch), of_torch)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return {"storage": dtype, "dtype": dtype}
    told = settings if isinstance(settings, dict) else settings.to_dict()
    storage = str(told.get("quant_method", "unknown"))
    with suppress(LorafoldError):  # one that lorafold does not read is called as its files call it
        storage = quantization_of(told, "model")
    made = STORAGES[storage].made if storage in MADE else {}
    if any(told.get(key) != made[key] for key in made.keys() & {"bnb_4bit_use_double_quant"}):
        storage += " without double quantization"
    return {"storage": storage, "dtype": dtype}


def default_storage(source: ModelSource) -> str:
    """Return the quantization of the files if they have one, else auto."""
    in_files = source.config().get("quantization_config")
    name = quantization_of(in_files, f"model {source.name}") if in_files is not None else None
    return name if name in QUANTIZED else "auto"


def stored_in_files(source: ModelSource) -> str | None:
    """Return the storage of files that are quantized and that adapters are folded into,
    dequantized; None if they are not.
    """
    settings = source.config().get("quantization_config") or {}
    return storage_in_files(settings, f"model {source.name}") if readable(settings) else None


def weights_of(source: ModelSource, storage: Storage) -> Weights | None:
    """Return the base's original weights, read from its files, if the model's are quantized and
    they are in the files; else None. `load_model` must have checked the files.
    """
    if storage.quantization is None or stored_in_files(source) is not None:
        return None
    from lorafold.models.originals import original_weights

    return original_weights(source)
