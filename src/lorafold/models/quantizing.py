"""Loads models while bitsandbytes quantizes their linears, one tensor at a time.

    nf4      4-bit NormalFloat, constants in 8 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)
             0.26 of bf16's bytes
    int8     8 bits, a scale for each output (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339)
             0.50

Every linear of the blocks is quantized, from bf16, and so are the matrices of experts; embeddings,
norms, routers and heads stay in 16 bits. Tensors are read from the files and not mapped, so the
peak of memory is the quantized model and one tensor, or one block's experts. A model whose files
are quantized already is loaded as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from lorafold.bases import is_linear, layer_of
from lorafold.bases.bitsandbytes import bitsandbytes, set_compute_dtype
from lorafold.bases.experts import route
from lorafold.bases.stacks import held, quantized
from lorafold.core.anatomy import bare_modules, decoder_of
from lorafold.core.presets import all_linear
from lorafold.core.stacked import module_at, stack_names, stacks
from lorafold.errors import LorafoldError
from lorafold.machine.allocator import freed_blocks_returned
from lorafold.models.weights import FileWeights, model_files
from lorafold.ops.nf4 import BLOCK

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def quantization_of(settings: Mapping[str, Any]) -> str:
    """Return the name of a checkpoint's quantization, by its `quantization_config`: nf4, int8, or
    the name of another method.
    """
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if settings.get("load_in_8bit") else str(settings.get("quant_method", "unknown"))


def packable(model: PreTrainedModel) -> list[str]:
    """Return the sites whose matrices are quantized: those of the blocks whose number of inputs is
    a multiple of 64, the block of NF4. bitsandbytes' own forward, which runs at modules without an
    adapter, computes others wrongly on some CPUs.
    """
    body, _ = decoder_of(model)
    head = model.get_output_embeddings()
    inside = [p for p in all_linear(model, is_linear) if not body or f"{p}.".startswith(f"{body}.")]
    modules = {p: module_at(model, p) for p in inside}
    return [p for p, m in modules.items() if m is not head and layer_of(m).shape[1] % BLOCK == 0]


@contextmanager
def experts_quantized(quantization: str) -> Iterator[None]:
    """Context in which parameters of experts are quantized when a module gets them, so that a model
    that is being loaded never has more than one of them in 16 bits.
    """

    def quantize(module: Any, name: str, parameter: Any) -> Any:
        if name not in stack_names(module) or parameter.is_meta or parameter.dim() != 3:
            return None
        if parameter.shape[1 if module.is_transposed else 2] % BLOCK:
            return None
        made: Any = quantized(parameter, quantization)
        made._is_hf_initialized = True  # else transformers fills it with random numbers
        return made

    hook = register_module_parameter_registration_hook(quantize)
    try:
        yield
    finally:
        hook.remove()


def route_quantized(model: torch.nn.Module) -> None:
    """Make modules of experts that have quantized matrices compute with these."""
    for _, module in bare_modules(model):
        if any(held(stack).quantized for stack in stacks(module).values()):
            route(module)


def read_quantized(
    auto: Any,
    path: Path,
    name: str,
    quantization: str,
    device: torch.device,
    trust_remote_code: bool,
    **config: Any,
) -> tuple[Any, Any]:
    """Load a quantized model, in evaluation mode, and return it with transformers' report on its
    weights.

    Raises LorafoldError if the files are quantized in another way, ImportError without
    bitsandbytes.

    Args:
        auto: One of transformers' auto classes.
        path: The directory of the model.
        name: The name of the model in messages.
        quantization: nf4 or int8.
        device: Where to load the model.
        trust_remote_code: Run the code in the model's directory.
        config: Fields that replace those of the model's configuration.
    """
    from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

    bitsandbytes()
    found = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **config)
    settings = getattr(found, "quantization_config", None)
    stored = (
        None
        if settings is None
        else quantization_of(settings if isinstance(settings, dict) else settings.to_dict())
    )
    if stored not in (None, quantization):
        raise LorafoldError(
            f"model {name}: its weights are stored as {stored}, so it can't be loaded as"
            f" {quantization}; expected the base {stored}"
        )
    with torch.device("meta"):
        mapped = auto.from_config(found, trust_remote_code=trust_remote_code)
    chosen = set(packable(mapped))
    others = [p for p, m in bare_modules(mapped) if is_linear(m) and p not in chosen]
    how = (
        {}
        if stored
        else {
            "quantization_config": BitsAndBytesConfig(
                **QUANTIZATIONS[quantization], llm_int8_skip_modules=others
            )
        }
    )
    weights = FileWeights(model_files(path), mapped=False)
    with freed_blocks_returned(), experts_quantized(quantization):
        model, info = type(mapped).from_pretrained(
            None,
            config=found,
            state_dict={n: weights.slice(n) for n in weights.names},
            dtype=torch.bfloat16,
            device_map={"": device},
            output_loading_info=True,
            **how,
        )
    route_quantized(model)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), info


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a quantized model compute in this dtype: its other weights are converted to it, and the
    quantized ones are dequantized to it at each use.
    """
    for module in model.modules():
        set_compute_dtype(module, dtype)
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.dtype == torch.bfloat16:
                    tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
