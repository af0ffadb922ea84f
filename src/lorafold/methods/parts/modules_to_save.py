"""Modules that are trained whole: a trained copy runs in the module's place (PEFT's
`modules_to_save`).

    y = copy(x)                     the copy starts equal to the module, which is never changed

Use it for a new head, or for norms, together with a low-rank update elsewhere.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorafold.core.attach import Adapted
from lorafold.core.delta import Delta
from lorafold.core.layer import Layer
from lorafold.errors import LorafoldError
from lorafold.layers import layer_of
from lorafold.layers.dense import Plain


def leaves(module: nn.Module, path: str) -> list[str]:
    """The paths, at and under `path`, of the modules that have parameters of their own."""
    return [f"{path}.{p}" if p else path for p, m in module.named_modules() if m._parameters]


class ReplaceDelta(Delta):
    """fp32 copies of the module's parameters, which compute in the module's own dtype."""

    whole = True

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        if isinstance(module, Adapted):
            raise LorafoldError(
                f"{path} has another adapter attached, which a module to save must not have; merge"
                " or detach that one first"
            )
        if others := [n for n in module._parameters if n not in ("weight", "bias")]:
            raise LorafoldError(
                f"{path} can't be a module to save: found parameters {', '.join(others)}, expected"
                " only weight and bias"
            )
        self.copy = copy.deepcopy(module, {id(p): p for p in module.parameters()})
        layer_of(self.copy).dequantize()
        self.multiplies = not isinstance(layer_of(self.copy), Plain)
        self.dtype = next(self.copy.parameters()).dtype
        for owner in self.copy.modules():
            for name, p in owner.named_parameters(recurse=False):
                setattr(owner, name, nn.Parameter(p.detach().to(torch.float32, copy=True)))

    def forward(self, layer: Layer, *args: Any, onto: Tensor | None = None, **kwargs: Any) -> Any:
        dtype = self.dtype
        if self.multiplies and args[0].is_floating_point():  # autocast's dtype may be another one
            dtype = args[0].dtype
        own = {n: p.to(dtype) for n, p in self.copy.named_parameters()}
        y = functional_call(self.copy, own, args, kwargs)
        return y if onto is None else y + onto

    def fold(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return layer_of(self.copy).dense()
