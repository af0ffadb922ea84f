"""Models whose linears are packed by bitsandbytes while they load, a tensor at a time.

    nf4      4-bit NormalFloat, constants in 8 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)
             0.26 of bf16's bytes
    int8     8 bits, a scale for every row (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339)
             0.50

Every linear of the blocks is packed, from bf16; embeddings, norms and heads stay in 16 bits.
Tensors are read from the files and not mapped, so that the peak is the packed model and the tensor
at hand. A checkpoint that was saved packed is loaded as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lorafold.bases import is_linear, layer_of
from lorafold.bases.bitsandbytes import bitsandbytes, set_compute_dtype
from lorafold.core.anatomy import bare_modules, decoder_of
from lorafold.core.presets import all_linear
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
    """How a checkpoint's weights are packed, by its `quantization_config`: a word of the table, or
    another method's name.
    """
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if settings.get("load_in_8bit") else str(settings.get("quant_method", "unknown"))


def packable(model: PreTrainedModel) -> list[str]:
    """The paths of the linears that are packed: those of the blocks, if their rows are whole blocks
    of NF4's 64 weights. bitsandbytes' forward, which runs where no adapter lies, misreads others on
    some CPUs.
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
    device: torch.device,
    trust_remote_code: bool,
    **config: Any,
) -> tuple[Any, Any]:
    """The model of one of transformers' auto classes, packed and on the device, in evaluation mode,
    and transformers' report on its weights. `config` goes over the model's own. LorafoldError for a
    checkpoint that is packed in another way.
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
            f"model {name}: its weights are stored as {stored}, so it can't be held as"
            f" {quantization}"
        )
    with torch.device("meta"):
        mapped = auto.from_config(found, trust_remote_code=trust_remote_code)
    packed = set(packable(mapped))
    left_alone = [p for p, m in bare_modules(mapped) if is_linear(m) and p not in packed]
    how = (
        {}
        if stored
        else {
            "quantization_config": BitsAndBytesConfig(
                **QUANTIZATIONS[quantization], llm_int8_skip_modules=left_alone
            )
        }
    )
    weights = FileWeights(model_files(path), mapped=False)
    with freed_blocks_returned():
        model, info = type(mapped).from_pretrained(
            None,
            config=found,
            state_dict={n: weights.slice(n) for n in weights.names},
            dtype=torch.bfloat16,
            device_map={"": device},
            output_loading_info=True,
            **how,
        )
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval(), info


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a packed model compute in that dtype: what is not packed is held in it, what is packed is
    unpacked to it.
    """
    for module in model.modules():
        set_compute_dtype(module, dtype)
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.dtype == torch.bfloat16:
                    tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype
