"""The load-balancing loss of a mixture of experts, as the model itself would add it to its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorafold.errors import LorafoldError


def balancing_loss(model: Any, output: Any) -> Tensor | float:
    """The loss (), times its coefficient; 0 if the model would add none.

    Raises LorafoldError if its configuration asks for one that the model does not return.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
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
    return coefficient * aux
