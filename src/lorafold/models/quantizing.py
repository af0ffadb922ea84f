"""Loads models while bitsandbytes quantizes their linears, one tensor at a time, and models whose
files are quantized already.

    nf4      4-bit NormalFloat, constants in 8 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)
             0.26 of bf16's bytes
    int8     8 bits, a scale for each output (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339)
             0.50

Every linear of the blocks is quantized, from bf16; embeddings, norms and heads stay in 16 bits.
Tensors are read from the files and not mapped, so the peak of memory is the quantized model and one
tensor. A model whose files are quantized already is loaded as it is, which adds two storages:

    fp8, int4    of files that compressed-tensors wrote, or fine-grained FP8 (`models.compressed`)
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lorafold.bases import is_linear, layer_of
from lorafold.bases.bitsandbytes import bitsandbytes, set_compute_dtype
from lorafold.bases.compressed import CompressedLinear
from lorafold.core.anatomy import bare_modules, decoder_of
from lorafold.core.presets import all_linear
from lorafold.errors import LorafoldError
from lorafold.machine.allocator import freed_blocks_returned
from lorafold.models.compressed import (
    as_in_files,
    check_values,
    compress,
    remark,
    storage_of,
    stored_compressed,
)
from lorafold.models.weights import FileWeights, model_files
from lorafold.ops.nf4 import BLOCK

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


IN_FILES = ("fp8", "int4")  # what files may be stored as, and lorafold does not make
QUANTIZED = (*QUANTIZATIONS, *IN_FILES)
# quant_method -> the package that transformers reads it with
READ_BY = {"gptq": "gptqmodel", "awq": "gptqmodel", "auto-round": "auto_round"}


def quantization_of(settings: Mapping[str, Any], what: str) -> str:
    """Return the storage of a checkpoint by its `quantization_config`: nf4, fp4, int8, fp8 or int4.

    Raises LorafoldError, in a message that begins with `what`, if it is none of them, or if the
    package that reads it is not installed.
    """
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    if settings.get("load_in_8bit"):
        return "int8"
    if stored_compressed(settings):
        return storage_of(settings, what)
    method = str(settings.get("quant_method", "unknown"))
    instead = "train on the model that it was quantized from instead"
    package = READ_BY.get(method)
    if package is None:
        raise LorafoldError(
            f"{what}: unsupported quantization {method}; supported: compressed-tensors (fp8, int8,"
            f" int4), fp8, bitsandbytes (nf4, int8); {instead}"
        )
    absent = importlib.util.find_spec(package) is None
    raise LorafoldError(
        f"{what}: its weights are quantized by {method}, which the package {package} reads"
        f"{' (not installed)' * absent} and lorafold can't train over; {instead}"
    )


def packable(model: PreTrainedModel) -> list[str]:
    """Return the paths of the linears that are quantized: those of the blocks whose number of
    inputs is a multiple of 64, the block of NF4. bitsandbytes' own forward, which runs at modules
    without an adapter, computes others wrongly on some CPUs.
    """
    body, _ = decoder_of(model)
    head = model.get_output_embeddings()
    inside = [p for p in all_linear(model, is_linear) if not body or f"{p}.".startswith(f"{body}.")]
    modules = {p: model.get_submodule(p) for p in inside}
    return [p for p, m in modules.items() if m is not head and layer_of(m).shape[1] % BLOCK == 0]


def read_quantized(
    auto: Any,
    path: Path,
    name: str,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    **config: Any,
) -> tuple[Any, Any]:
    """Load a quantized model, in evaluation mode, and return it with transformers' report on its
    weights.

    Raises LorafoldError if the files are quantized in another way, or lack what their quantization
    takes; ImportError without bitsandbytes where that quantizes.

    Args:
        auto: One of transformers' auto classes.
        path: The directory of the model.
        name: The name of the model in messages.
        quantization: One of QUANTIZED.
        dtype: What is computed in.
        device: Where to load the model.
        trust_remote_code: Run the code in the model's directory.
        config: Fields that replace those of the model's configuration.
    """
    from transformers import AutoConfig, GenerationConfig

    found = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **config)
    settings: Any = getattr(found, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    what = f"model {name}"
    stored = None if settings is None else quantization_of(settings, what)
    if stored is None and quantization in IN_FILES:
        raise LorafoldError(
            f"{what}: found files that are not quantized, of which lorafold makes"
            f" {' or '.join(QUANTIZATIONS)}, not {quantization}"
        )
    if stored not in (None, quantization):
        raise LorafoldError(
            f"{what}: its weights are stored as {stored}, so it can't be loaded as"
            f" {quantization}; expected the base {stored}"
        )
    weights = FileWeights(model_files(path), mapped=False)
    given = {
        "state_dict": {n: weights.slice(n) for n in weights.names},
        "device_map": {"": device},
        "output_loading_info": True,
    }
    if stored is not None and stored_compressed(settings):
        model, info = _compressed(auto, found, settings, path, what, dtype, trust_remote_code, given)
    else:
        model, info = _by_bitsandbytes(auto, found, stored or quantization, trust_remote_code, given)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), info


def _by_bitsandbytes(
    auto: Any, config: Any, quantization: str, trust_remote_code: bool, given: dict[str, Any]
) -> tuple[Any, Any]:
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    with torch.device("meta"):
        mapped = auto.from_config(config, trust_remote_code=trust_remote_code)
    quantized = set(packable(mapped))
    others = [p for p, m in bare_modules(mapped) if is_linear(m) and p not in quantized]
    if getattr(config, "quantization_config", None) is None:
        given["quantization_config"] = BitsAndBytesConfig(
            **QUANTIZATIONS[quantization], llm_int8_skip_modules=others
        )
    with freed_blocks_returned():
        loaded: tuple[Any, Any] = type(mapped).from_pretrained(
            None, config=config, dtype=torch.bfloat16, **given
        )
    return loaded


def _compressed(
    auto: Any,
    config: Any,
    settings: dict[str, Any],
    path: Path,
    what: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    given: dict[str, Any],
) -> tuple[Any, Any]:
    from lorafold.models.checkpoint import by_parameter, entries_of

    # transformers would dequantize every weight on the first call, and round scales to `dtype`
    del config.quantization_config
    with torch.device("meta"):
        plan = auto.from_config(config, trust_remote_code=trust_remote_code)
    compress(plan, settings, what, torch.bfloat16)
    entries, _ = by_parameter(plan, entries_of(path))
    as_in_files(plan, entries, what)
    found = {p: m for p, m in bare_modules(plan) if isinstance(m, CompressedLinear)}

    class Prepared(type(plan)):  # type: ignore[misc]
        """The model's own class, made with the linears that the files are for."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for at, module in found.items():
                parent, _, leaf = at.rpartition(".")
                module._parameters["bias"] = self.get_submodule(at).bias
                setattr(self.get_submodule(parent), leaf, module)

    with freed_blocks_returned():
        model, info = Prepared.from_pretrained(None, config=config, dtype=dtype, **given)
    for module in found.values():
        for leaf, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(leaf == "bias")
    model.__class__ = type(plan)
    model.config.quantization_config = settings
    check_values(model, what)
    if (line := remark(settings, what)) is not None:
        log.warning(line)
    return model, info


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a quantized model compute in this dtype: its other weights are converted to it, and the
    quantized ones are dequantized to it at each use.
    """
    for module in model.modules():
        set_compute_dtype(module, dtype)
        if isinstance(module, CompressedLinear):
            continue  # the scales stay, and a bias was loaded in this dtype
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.dtype == torch.bfloat16:
                    tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
