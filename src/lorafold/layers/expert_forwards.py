"""The forwards of modules of experts, for each way in which they are called
(`core.matrices`), over layers of the experts' matrices.

The tokens are sorted by expert, so that each expert's are one product (`ops.grouped`). Only the
rows of experts that a token was sent to are computed, also where the model's own forward multiplies
every token by every expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.contexts import is_fake
from lorafold.core.layer import Layer
from lorafold.core.matrices import CHOSEN, SORTED, WEIGHED, form_of
from lorafold.ops.autocast import lowered
from lorafold.ops.grouped import Groups, grouped

# the layers over groups of rows; of each row its index (S,) in the tokens' experts (T, k), if that
# is known; and T, k
Layers = Callable[[Groups, Tensor | None, tuple[int, int]], list[Layer]]


def chosen(
    routed: Any, holder: nn.Module, layers: Layers, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The output of the experts, of the shape of the input: each token's, weighted and summed.

    Args:
        routed: the module whose forward it is.
        holder: the module that has the matrices.
        hidden: the tokens (..., hidden), T in all.
        *args, **kwargs: the experts of each token (T, k) and their weights (T, k).
    """
    index, weights = (*args, *kwargs.values())
    tokens = hidden.reshape(-1, hidden.shape[-1])
    mixed = lowered(functools.partial(_mixed, holder, layers, index), tokens)
    summed: Tensor = (mixed * weights[..., None]).sum(1).to(hidden.dtype).view(hidden.shape)
    return summed


def weighed(
    routed: Any, holder: nn.Module, layers: Layers, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The output (T, hidden) of the experts and of the one that all tokens meet, summed; and what
    the router computes. Scores weigh the inputs, and those of experts that were not chosen are 0.

    Args:
        routed: the module whose forward it is.
        holder: the module that has the matrices.
        hidden: the tokens (..., hidden), T in all.
    """
    tokens = hidden.reshape(-1, hidden.shape[-1])
    scores, logits = routed.router(tokens)
    weights, index = scores.topk(routed.top_k, 1)
    mixed = lowered(functools.partial(_mixed, holder, layers, index), tokens, weights)
    shared: Tensor = routed.shared_expert(tokens)
    return shared + mixed.sum(1).to(shared.dtype), logits


def in_order(
    routed: Any, holder: nn.Module, layers: Layers, rows: Tensor, sizes: Sequence[int]
) -> Tensor:
    """The rows (S, in), each times the matrix of its expert: (S, out).

    Args:
        routed: the module whose forward it is.
        holder: the module that has the matrices.
        rows: sorted by expert.
        sizes: how many are of each expert.
    """
    each, count = torch.tensor(sizes), len(rows)  # its sum, which can't be read without values
    of = torch.arange(len(sizes)).repeat_interleave(each, output_size=count).to(rows.device)
    groups, taken, places = grouped(of, len(sizes))
    (layer,) = layers(groups, None, (0, 1))
    y: Tensor = lowered(lambda x: layer(x[taken]).index_select(0, places), rows)
    return y


CALLED: dict[str, Callable[..., Any]] = {CHOSEN: chosen, WEIGHED: weighed, SORTED: in_order}


def _mixed(
    holder: nn.Module, layers: Layers, index: Tensor, hidden: Tensor, weights: Tensor | None = None
) -> Tensor:  # (T, k, hidden)
    """The output of each expert of each token; experts without a matrix give back their input.

    Args:
        weights: of the inputs (T, k).
    """
    of, (tokens, k) = index.reshape(-1), index.shape
    most, number = _numbers(holder)
    at = None
    if number < most:  # without values, each token is sent to k that have matrices
        at = torch.arange(len(of)) if is_fake(of) else (of < number).nonzero()[:, 0]
    if at is not None and not len(at):
        return hidden[:, None].expand(-1, k, -1)
    groups, rows, places = grouped(of if at is None else of[at], number)
    rows = rows if at is None else at[rows]
    x = hidden.index_select(0, rows // k)  # whose backward is faster than that of indexing
    if weights is not None:
        x = x * weights.reshape(-1, 1).index_select(0, rows)
    *firsts, last = layers(groups, rows, (tokens, k))
    y = last(_activated(holder, [first(x) for first in firsts]))
    if getattr(holder, "has_post_expert_norm", False):
        y = holder.post_expert_norm(y)  # type: ignore[operator]
    y = y.index_select(0, places)
    if at is not None:
        y = hidden.repeat_interleave(k, 0).to(y.dtype).index_copy(0, at, y)
    return y.view(tokens, k, -1)


def _numbers(holder: nn.Module) -> tuple[int, int]:
    """The number of the experts, and of those that have matrices."""
    form = form_of(holder)
    assert form is not None
    found = [int(getattr(holder, stored.number)) for stored in form.parameters.values()]
    return max(found), found[-1]


def _activated(holder: Any, u: list[Tensor]) -> Tensor:
    """What the last matrices multiply (S, I), of what the others gave."""
    form = form_of(holder)
    assert form is not None
    if not form.activation:
        inner: Tensor = holder._apply_gate(*u) if holder.has_gate else holder.act_fn(*u)
        return inner
    gate, up = u if len(u) == 2 else u[0].chunk(2, -1)
    gated: Tensor = getattr(holder, form.activation)(gate) * up
    return gated
