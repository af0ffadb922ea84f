"""How many positions a model has, where tables of its own bound them.

    wpe (n, d)          learned embeddings of positions: a row of more than n tokens has none
    bias (1, 1, n, n)   which position sees which, in models that read their mask from a buffer:
                        a sequence of more than n tokens is beyond it, packed of short rows too

Rotary and other computed positions have no end, whatever the configuration says that the model was
trained on. Use it to refuse rows, and to end packed sequences, before a run fails on them.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

OFFSET = 2  # rows before the first position, as OPT's table has


def positions_of(model: PreTrainedModel) -> int | None:
    """The most tokens of a row; None if no table bounds them."""
    config = model.config.get_text_config()
    given, words = getattr(config, "max_position_embeddings", None), model.get_input_embeddings()
    known = given is not None and any(
        isinstance(module, nn.Embedding)
        and module is not words
        and given <= module.num_embeddings <= given + OFFSET
        for module in model.modules()
    )
    found = [n for n in (given if known else None, sequence_of(model)) if n is not None]
    return min(found, default=None)


def sequence_of(model: nn.Module) -> int | None:
    """The most tokens of a sequence, packed or not; None if no buffer bounds them."""
    shapes = [tuple(buffer.shape) for buffer in model.buffers() if buffer.ndim == 4]
    return min((n for *one, m, n in shapes if one == [1, 1] and m == n > 1), default=None)
