"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): the backward pass recomputes each
block's activations, except the attention output of long documents (SAVE_FROM_LENGTH in
`ops.attention`).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lorafold.errors import LorafoldError
from lorafold.ops.checkpoint_segments import save_outputs


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Gradients stay bit-identical with checkpointing, because random states are replayed."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": save_outputs})
    except ValueError as error:
        raise LorafoldError(
            f"gradient_checkpointing: not supported by this model: {error}; set it to off"
        ) from None
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        # transformers makes the embeddings' outputs require gradients for reentrant checkpointing.
        # Here, that would only run the backward pass through every frozen block before the first
        # trained one.
        model.disable_input_require_grads()
