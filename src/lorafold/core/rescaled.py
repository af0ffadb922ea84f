"""Weights that a model divides in place for inference, and multiplies again for training.

    RWKV    every n blocks (`rescale_every`) the hidden states are halved, and the two matrices of
            each later block that add to them with them, so that float16 does not overflow

A delta would not be divided with its matrix, and what is folded would be off by a power of two. So
before a delta is attached the weights become those of the files again, and stay so. Both ways
compute the same but for the epsilon of norms (2e-5 of the logits of a tiny model in fp32).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lorafold.errors import LorafoldError


def keep_scale(model: nn.Module) -> None:
    """Undo the division of weights in a model, and let it happen no more.

    Raises LorafoldError where quantized weights were divided, which can't be undone.
    """
    for module in model.modules():
        own: Any = module
        if "layers_are_rescaled" not in vars(module) or not own.config.rescale_every:
            continue
        if own.layers_are_rescaled:
            if any(hasattr(p, "quant_state") or hasattr(p, "SCB") for p in module.parameters()):
                raise LorafoldError(
                    f"{type(module).__name__}: its quantized weights were divided by a forward pass"
                    " for inference; expected a model that was just loaded"
                )
            training, own.training = own.training, True
            own._rescale_layers()
            own.training = training
        own.config.rescale_every = 0
