"""Deltas that an adapter can have in addition to its method's.

    BiasDelta       y = layer(x) + c        c (out,), zero at start: a trained bias as an offset,
                                            added before the layer rounds; the bias is added after
    ReplaceDelta    y = copy(x)             a trained copy instead of the module (PEFT's
                                            `modules_to_save`), for a new head or norms
    token rows      see `trainable_tokens.py`
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lorafold.core.anatomy import Anatomy
from lorafold.core.attach import Adapted, adapted_modules
from lorafold.core.delta import Delta
from lorafold.core.expert_matrices import module_at
from lorafold.core.layer import Layer, WeightAndBias, add, bare
from lorafold.core.spec import Spec
from lorafold.core.targets import Matches
from lorafold.errors import LorafoldError, join_problems
from lorafold.layers import layer_of
from lorafold.layers.dense import Plain
from lorafold.methods.common.options_and_init import zeros
from lorafold.methods.common.trainable_tokens import TokenRows, TrainableTokens, token_rows_on

Bias = Literal["none", "lora_only", "all"]


def add_biases(
    model: nn.Module, matches: Matches, bias: Bias, deltas: dict[str, list[Delta]]
) -> None:
    """Adds a `BiasDelta` for each bias that `bias` selects, except in experts and their routers."""
    anatomy = Anatomy.of(model)
    every = (path for path, _ in anatomy.modules if path not in anatomy.routers)
    for path in {"lora_only": matches.paths, "all": every}[bias]:
        own = module_at(model, path)._parameters.get("bias")
        if own is not None:
            deltas.setdefault(path, []).append(BiasDelta(len(own), own.device))


def add_token_rows(
    model: nn.Module, spec: Spec, tokens: TrainableTokens, active: Sequence[str],
    deltas: dict[str, list[Delta]],
) -> None:  # fmt: skip
    """Adds the deltas that train the embedding and head rows of `tokens`."""
    rows = tokens.deltas(model, active) if tokens.ids else {}
    if rows and spec.trains_base:
        raise LorafoldError(
            f"tokens: {type(spec).__name__} trains the base's own weights, so token rows can't be"
            " added; leave out the tokens"
        )
    carry = {id(m) for _, m in adapted_modules(model) if any(token_rows_on(m))}
    problems = [
        f"{path} has token rows of another adapter, which may add rows; merge that adapter first"
        for path in deltas
        if carry and path not in rows and id(module_at(model, path)) in carry
    ]
    for path, delta in rows.items():
        if any(not isinstance(other, BiasDelta) for other in deltas.get(path, ())):
            problems.append(
                f"tokens: {path} is also a target or in modules_to_save; leave it out there, or"
                " leave out the tokens"
            )
        deltas.setdefault(path, []).append(delta)
    if problems:
        raise LorafoldError(join_problems(problems))


def vocabulary(model: nn.Module, parts: Iterable[tuple[str, Delta]]) -> int | None:
    """The vocabulary size of a model with an adapter's new tokens, or None if the adapter has no
    new tokens. `parts` are the adapter's deltas with their module paths.
    """
    ids = {path: part.ids for path, part in parts if isinstance(part, TokenRows)}
    ends: dict[str, Any] = {path: bare(module_at(model, path)) for path in ids}
    sizes = {path: max(own) + 1 for path, own in ids.items()}
    return max((n for path, n in sizes.items() if n > len(ends[path].weight)), default=None)


class BiasDelta(Delta):
    """The offset c (out,), fp32. Merging adds it to the layer's bias, or creates the bias."""

    def __init__(self, out: int, device: torch.device) -> None:
        super().__init__()
        self.offset = zeros((out,), device)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Any:
        return layer(x, onto=add(layer.each(self.offset), onto))

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        return w, add(self.offset, b)


def param_paths(module: nn.Module, path: str) -> list[str]:
    """The paths of the modules that own parameters, among the module at `path` and its submodules.
    """
    return [f"{path}.{p}" if p else path for p, m in module.named_modules() if m._parameters]


class ReplaceDelta(Delta):
    """fp32 copies of a module's parameters. They are converted to the dtype in which the module
    computes.
    """

    whole = True

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        if isinstance(module, Adapted):
            raise LorafoldError(
                f"{path} has another adapter attached, so it can't be trained in full; merge or"
                " detach that adapter first"
            )
        if others := [n for n in module._parameters if n not in ("weight", "bias")]:
            raise LorafoldError(
                f"{path} can't be trained in full: found parameters {', '.join(others)},"
                " expected only weight and bias"
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
        if self.multiplies and args[0].is_floating_point():  # may differ under autocast
            dtype = args[0].dtype
        own = {n: p.to(dtype) for n, p in self.copy.named_parameters()}
        y = functional_call(self.copy, own, args, kwargs)
        return y if onto is None else y + onto

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        return layer_of(self.copy).dense()
