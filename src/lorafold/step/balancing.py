"""The load-balancing loss of a mixture of experts, as the model itself would add it to its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lorafold.errors import LorafoldError


def balances(model: Any) -> bool:
    """Whether the model adds such a loss."""
    config = getattr(model, "config", None)
    return config is not None and getattr(config.get_text_config(), "output_router_logits", False)


def weighs(model: Any) -> bool:
    """Whether the loss can count a token as often as rows have it: transformers' function of it is
    beside the model, and weights tokens by their mask.
    """
    return _own(model) is not None and hasattr(model, "num_experts_per_tok")


def balancing_loss(model: Any, output: Any, rows: Tensor | None = None) -> Tensor | float:
    """The loss (), times its coefficient; 0 if the model would add none.

    Raises LorafoldError if its configuration asks for one that the model does not return.

    Args:
        rows: (B, T), how many rows have each token; None: one.
    """
    if not balances(model):
        return 0.0
    config = model.config.get_text_config()
    aux, coefficient = (
        getattr(output, "aux_loss", None),
        getattr(config, "router_aux_loss_coef", None),
    )
    if aux is None or coefficient is None:
        raise LorafoldError(
            f"{type(model).__name__}: config.output_router_logits is set; found aux_loss {aux},"
            f" router_aux_loss_coef {coefficient}; expected both. Set output_router_logits to false"
            " to train without the router's loss"
        )
    if rows is not None and (function := _own(model)) is not None:
        aux = function(output.router_logits, model.num_experts, model.num_experts_per_tok, rows)
    return coefficient * aux


def _own(model: Any) -> Callable[..., Any] | None:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
