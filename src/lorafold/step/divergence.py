"""How far a model is from another one that has the same head's vocabulary, at labelled positions.

    KL = sum_i sum_v p_i(v) (log p_i(v) - log q_i(v))         p the model, q the other, in nats

It is computed in chunks of positions, so that the logits of all of them never exist at once. Use it
to tell how far a policy has moved from its reference on given text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lorafold.ops.cross_entropy import chunks, widened
from lorafold.step.head import head_of, until_head


@torch.no_grad()
def divergence(
    model: Any,
    labels: Tensor,
    inputs: Mapping[str, Tensor],
    other: Callable[[], AbstractContextManager[None]],
) -> Tensor:  # ()
    """KL of the model to what it is in the context `other()`, in nats, summed over the labelled
    positions.

    Args:
        model: A causal language model of transformers.
        labels: (B, T), shifted, or -100.
        inputs: Keyword arguments of the model, each (B, T).
        other: Such as a context with fewer adapters.
    """
    h, *_ = until_head(model, labels, inputs)
    with other():
        h_other, *_ = until_head(model, labels, inputs)
    total = h.new_zeros((), dtype=widened(h.dtype))
    for run in chunks(len(h)):
        log_p = torch.log_softmax(head_of(model, h[run]).to(total.dtype), -1)
        with other():
            log_q = torch.log_softmax(head_of(model, h_other[run]).to(total.dtype), -1)
        total += torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total
