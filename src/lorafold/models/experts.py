"""Quantizes the matrices of experts while a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from lorafold.bases.expert_matrices import held, quantized
from lorafold.bases.experts import route
from lorafold.core.anatomy import bare_modules
from lorafold.core.matrices import expert_parameters, matrices_of
from lorafold.models.storages import STORAGES
from lorafold.ops.nf4 import BLOCK


@contextmanager
def experts_quantized(quantization: str) -> Iterator[None]:
    """Context in which parameters of experts are quantized when a module gets them, so that a model
    that is being loaded never has more than one of them in 16 bits.
    """

    pack = STORAGES[quantization].pack

    def quantize(module: Any, name: str, parameter: Any) -> Any:
        if name not in expert_parameters(module) or parameter.is_meta or parameter.dim() != 3:
            return None
        if parameter.shape[1 if module.is_transposed else 2] % BLOCK:
            return None
        made: Any = quantized(parameter, pack)
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
        if any(held(matrices).quantized for matrices in matrices_of(module).values()):
            route(module)
