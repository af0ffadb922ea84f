"""Updates a model's quantization config after some of its matrices were dequantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorafold.core.expert_matrices import Matrices, matrices_of, module_at
from lorafold.layers.compressed import CompressedLinear
from lorafold.layers.expert_storage import stored_matrices


def record_dequantized(model: nn.Module, paths: Iterable[str]) -> None:
    """Removes the quantization config if no module is quantized any more, else lists the modules at
    `paths` in it as not quantized.
    """
    config: Any = getattr(model, "config", None)
    settings: Any = getattr(config, "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(settings, dict):
        if not any(map(_is_quantized, model.modules())):
            del config.quantization_config
            return
        # the list of unquantized modules
        compressed = settings["quant_method"] == "compressed-tensors"
        name = "ignore" if compressed else "modules_to_not_convert"
        sites = ((path, module_at(model, path)) for path in paths)
        plain = [
            p.rpartition(".")[0] if isinstance(m, Matrices) else p
            for p, m in sites
            if not (isinstance(m, Matrices) and _is_quantized(m.owner))
        ]
        settings[name] = list(dict.fromkeys([*(settings.get(name) or []), *plain]))
    elif quantizer is not None:
        linears = (m for m in model.modules() if isinstance(m, nn.Linear))
        if any(m.weight.dtype in (torch.uint8, torch.int8) for m in linears):
            settings.llm_int8_skip_modules = [*(settings.llm_int8_skip_modules or []), *paths]
            return
        quantizer.remove_quantization_config(model)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(flag, None)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, CompressedLinear) or any(
        stored_matrices(matrices).quantized for matrices in matrices_of(module).values()
    )
