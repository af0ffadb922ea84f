"""Weights that two modules share (input embedding and head): found, and given a copy of their own
where one side changes.
"""

from __future__ import annotations

from torch import nn

from lorafold.core.layer import bare


def untie(model: nn.Module, module: nn.Module) -> None:
    """Give the module its own copy of a shared weight, and say in the model's config that embedding
    and head are tied no longer.
    """
    weight: nn.Parameter = bare(module).weight  # type: ignore[assignment]
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
