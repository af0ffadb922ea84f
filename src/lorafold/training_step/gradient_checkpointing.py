"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): the backward recomputes a block's
activations, except the output of attention over long documents (`ops.attention`, LONG).
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lorafold.errors import LorafoldError
from lorafold.ops.checkpoint_segments import selective_context_fn


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on; gradients stay bit-identical, because random states are
    replayed.
    """
    try:
        options = {"use_reentrant": False, "context_fn": selective_context_fn}
        model.activation_checkpointing_enable(options)
    except ValueError as error:
        raise LorafoldError(
            f"gradient_checkpointing: not supported by this model: {error}; set it to off"
        ) from None
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        # transformers makes the embeddings require gradients, because reentrant checkpointing needs
        # them. Here they would only make the backward run through every frozen block below the
        # lowest trained one.
        model.disable_input_require_grads()
