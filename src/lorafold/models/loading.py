"""Loading of base models on a device, in a dtype or quantization."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lorafold.core.contexts import prepare_model
from lorafold.errors import LorafoldError, listed
from lorafold.models.architecture import text_auto_class
from lorafold.models.load_errors import check_complete, loading, warn_unread
from lorafold.models.prequantized import can_read, storage_in_files
from lorafold.models.quantizations import NAME_OF_DTYPE, ON_LOAD, QUANTIZED, STORAGES, Storage
from lorafold.models.quantize_on_load import quantization_of, read_quantized, set_model_dtype
from lorafold.models.sources import ModelSource, remember_source, resolve_model
from lorafold.models.weights import MODEL_FILES, SHARDS, Weights, model_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"  # otherwise, threads of transformers read ahead without limit
log = logging.getLogger(__name__)


@contextmanager
def sequential_loading() -> Iterator[None]:
    """A context in which transformers reads each tensor only when a module receives it, to save
    memory.
    """
    before = os.environ.get(NO_ASYNC)
    os.environ[NO_ASYNC] = "1"
    try:
        yield
    finally:
        del os.environ[NO_ASYNC]
        if before is not None:
            os.environ[NO_ASYNC] = before


@contextmanager
def on_registration(keep: Callable[[Tensor], None]) -> Iterator[None]:
    """A context that calls `keep` with each parameter and buffer (any shape) registered on a
    module. The call happens at the next registration, because other hooks may replace the tensor
    before then.
    """
    last: list[tuple[Any, str]] = []

    def finish() -> None:
        while last:
            owner, name = last.pop()
            tensor = owner._parameters.get(name, owner._buffers.get(name))
            if tensor is not None:
                keep(tensor)

    def register(module: Any, name: str, _: Any) -> None:
        finish()
        last.append((module, name))

    of_parameters = register_module_parameter_registration_hook(register)
    with of_parameters, register_module_buffer_registration_hook(register):
        yield
        finish()


def load_model(
    source: ModelSource | str | Path,
    storage: Storage | torch.dtype,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Loads a language model in evaluation mode; missing weights are an error."""
    source = resolve_model(source)
    what = f"model {source.name}"
    with loading(what):
        source.intact("config.json")
        auto = text_auto_class(source.hf_config(), what)
        model, report = read_weights(auto, source, storage, device)
        check_complete(what, sorted(report["missing_keys"]), report["mismatched_keys"])
        warn_unread(what, sorted(report["unexpected_keys"]))
        return model


def read_weights(
    auto: Any,
    source: ModelSource,
    storage: Storage | torch.dtype,
    device: torch.device | str,
    **config: Any,
) -> tuple[Any, Any]:
    """Loads a model with an auto class and these fields of its configuration replaced. Returns the
    model and transformers' report on its weights.
    """
    source.intact(*MODEL_FILES, *["*.py"] * source.trust_remote_code)
    files = model_files(source.path)
    # left over from another save, or beside a file with the whole model
    if left_out := sorted(file.name for file in source.path.glob(SHARDS) if file not in files):
        log.warning(
            "model %s: ignoring other weight files (%d): %s",
            source.name, len(left_out), listed(left_out),
        )  # fmt: skip
    wanted = storage if isinstance(storage, Storage) else Storage(storage)
    if wanted.quantization is None and (stored := default_storage(source)) != "auto":
        raise LorafoldError(
            f"model {source.name}: the weights are stored as {stored}; load them as {stored}"
        )
    if wanted.quantization is None:
        model, info = auto.from_pretrained(
            source.path,
            dtype=wanted.dtype,
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # callers check the report
            use_kernels=False,
            **config,
        )
        model.to(device)
    else:
        model, info = read_quantized(auto, source, wanted, torch.device(device), **config)
        set_model_dtype(model, wanted.dtype)
    prepare_model(model)
    remember_source(model, source)
    # adapters record this name as their base
    model.config._name_or_path = model.name_or_path = source.name
    return model.eval(), info


def recorded_storage(model: nn.Module) -> dict[str, str] | None:
    """The quantization and compute dtype of a transformers model, as recorded with adapters; None
    for other models.
    """
    config = getattr(model, "config", None)
    find = getattr(model, "get_input_embeddings", None)
    weight = None
    with suppress(NotImplementedError):  # raised by models with two encoders
        weight = getattr(find() if config and find else None, "weight", None)
    if weight is None:
        return None
    dtype = NAME_OF_DTYPE.get(str(weight.dtype), str(weight.dtype).removeprefix("torch."))
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return {"storage": dtype, "dtype": dtype}
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    storage = str(settings.get("quant_method", "unknown"))
    with suppress(LorafoldError):  # an unsupported quantization keeps the files' name for it
        storage = quantization_of(settings, "model")
    options = STORAGES[storage].bnb_options if storage in ON_LOAD else {}
    double = "bnb_4bit_use_double_quant"
    if double in options and settings.get(double) != options[double]:
        storage += " without double quantization"
    return {"storage": storage, "dtype": dtype}


def default_storage(source: ModelSource) -> str:
    """The quantization of a model's files, or auto if they are not quantized."""
    settings = source.config().get("quantization_config")
    name = None if settings is None else quantization_of(settings, f"model {source.name}")
    return name if name in QUANTIZED else "auto"


def prequantized_storage(source: ModelSource) -> str | None:
    """The quantization of a model's files if lorafold reads it without bitsandbytes, else None."""
    settings = source.config().get("quantization_config") or {}
    return storage_in_files(settings, f"model {source.name}") if can_read(settings) else None


def unquantized_weights(source: ModelSource, storage: Storage) -> Weights | None:
    """The weights in the files of a base that was quantized on load; None for other bases."""
    if storage.quantization is None or prequantized_storage(source) is not None:
        return None
    from lorafold.models.checkpoint import original_weights

    return original_weights(source)
