"""Untie weights that several modules share, such as input embedding and head.

A config of transformers has one switch for all of a model's ties. Without it the files must have
each weight under every name, also those that stay equal. Zamba's blocks are such, whose attention
is shared.
"""

from __future__ import annotations

from torch import nn

from lorafold.core.anatomy import bare_modules
from lorafold.core.base import bare


def untie(model: nn.Module, module: nn.Module) -> None:
    """Give the module its own copy of a tied weight."""
    weight: nn.Parameter = bare(module).weight  # type: ignore[assignment]
    module.weight = _own(weight)


def untie_others(model: nn.Module) -> None:
    """Record in the model's config that its weights are not tied, if it says that they are, and
    give every module its own copy of those that still are.
    """
    config = getattr(model, "config", None)
    parts = [part for part in (config, getattr(config, "text_config", None)) if part is not None]
    tied = [part for part in parts if getattr(part, "tie_word_embeddings", False)]
    if not tied:
        return
    for part in tied:
        part.tie_word_embeddings = False
    seen: set[int] = set()
    for _, module in bare_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                setattr(module, name, _own(parameter))
            seen.add(id(parameter))


def _own(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
