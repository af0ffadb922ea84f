"""Gradient checkpointing: a block stores only its input, and the backward pass recomputes its other
activations, but for the output of attention over long documents (`ops.attention`, LONG).

It saves the memory of the activations inside the blocks and costs one more forward pass of the
blocks in each step. The random state is replayed, so dropout draws the same masks and the gradients
are equal, bit for bit. Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from lorafold.errors import LorafoldError
from lorafold.ops.checkpoint_segments import keeping


def recompute(model: PreTrainedModel) -> None:
    """Turn gradient checkpointing on."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": keeping})
    except ValueError as error:
        raise LorafoldError(
            f"gradient_checkpointing: found on, expected off for this model: {error}"
        ) from None
    if any(hasattr(module, "_gradient_checkpointing_func") for module in model.modules()):
        # transformers makes the embeddings require gradients, for a kind of checkpointing that
        # needs one at a block's input. This kind does not, and the backward pass would go through
        # every frozen block below the lowest trained one.
        model.disable_input_require_grads()
