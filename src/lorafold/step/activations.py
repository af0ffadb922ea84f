"""Gradient checkpointing: a block keeps its input alone, and runs once more in the backward pass to
have the rest.

One more forward pass of the blocks a step buys the memory of all that lies between their inputs.
Random state is replayed, so dropout draws the same masks and gradients are the same, bit for bit.
Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lorafold.errors import LorafoldError


def recompute(model: PreTrainedModel) -> None:
    """Turn it on. LorafoldError if the model's code can't do it."""
    try:
        model.activation_checkpointing_enable()
    except ValueError as error:
        raise LorafoldError(
            f"gradient_checkpointing: found on, expected off for this model: {error}"
        ) from None
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        # Asking for the gradient of the embeddings, as transformers does, is for replays that need
        # one at their input. These don't, and it would send the backward pass through every frozen
        # block below the lowest trained one.
        model.disable_input_require_grads()
