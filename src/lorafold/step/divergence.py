"""A model beside what it is with fewer adapters, at labelled positions.

    KL = sum_i sum_v p_i(v) (log p_i(v) - log q_i(v))         p the model, q the other, in nats

Both are run once, and their logits compared in chunks of positions, so that those of all never
exist at once. Use it to tell how far a policy has moved from its reference on given text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.ops.cross_entropy import chunks
from lorafold.ops.logits import widened
from lorafold.step.head import head_of, until_head


class Beside(NamedTuple):
    """The losses of the model and of the other at n labelled positions, (n,) each, and the KL of
    the model to the other summed over them, (), all in nats.
    """

    losses: Tensor
    others: Tensor
    kl: Tensor


@torch.no_grad()
def beside(
    model: Any,
    labels: Tensor,
    inputs: Mapping[str, Tensor],
    other: Callable[[], AbstractContextManager[None]],
) -> Beside:
    """Compare the model with what it is in the context `other()`.

    Args:
        labels: (B, T), shifted, or -100.
        inputs: Keyword arguments of the model, each (B, T).
        other: Such as a context with fewer adapters.
    """
    h, targets, *_ = until_head(model, labels, inputs)
    with other():
        h_other, *_ = until_head(model, labels, inputs)
    losses, others = (h.new_empty(len(h), dtype=widened(h.dtype)) for _ in range(2))
    kl = losses.new_zeros(())
    for run in chunks(len(h)):
        log_p = torch.log_softmax(head_of(model, h[run]).to(kl.dtype), -1)
        with other():
            log_q = torch.log_softmax(head_of(model, h_other[run]).to(kl.dtype), -1)
        losses[run] = F.nll_loss(log_p, targets[run], reduction="none")
        others[run] = F.nll_loss(log_q, targets[run], reduction="none")
        kl += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return Beside(losses, others, kl)
