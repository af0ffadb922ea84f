"""Quantizes the matrices of experts while a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from lorafold.bases.expert_matrices import Floats, held, quantized
from lorafold.bases.experts import route
from lorafold.core.anatomy import Anatomy
from lorafold.core.matrices import Matrices, form_of
from lorafold.models.storages import STORAGES
from lorafold.ops.nf4 import BLOCK


@contextmanager
def experts_quantized(quantization: str) -> Iterator[None]:
    """Context in which parameters of experts are quantized when a module gets them, so that a model
    that is being loaded never has more than one of them in 16 bits.
    """

    pack = STORAGES[quantization].pack

    def quantize(module: Any, name: str, parameter: Any) -> Any:
        form = form_of(module)
        stored = None if form is None else form.parameters.get(name)
        if stored is None or parameter.is_meta or parameter.dim() != 3 - stored.flat:
            return None
        if not parameter.is_floating_point() or Floats(Matrices(module, name)).shape[2] % BLOCK:
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
    for _, module in Anatomy.of(model).modules:
        if isinstance(module, Matrices) and held(module).quantized:
            route(module.routed)
