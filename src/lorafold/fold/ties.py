"""Untie a weight that two modules share, such as input embedding and head."""

from __future__ import annotations

from torch import nn

from lorafold.core.base import bare


def untie(model: nn.Module, module: nn.Module) -> None:
    """Give the module its own copy of a tied weight, and record in the model's config that
    embedding and head are not tied.
    """
    weight: nn.Parameter = bare(module).weight  # type: ignore[assignment]
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
