"""Tokens whose last expert and the next one are as good as equal: which of the two a router takes
is then a matter of rounding, and another engine takes the other.

    a router's logits are W h; those of the last expert that is taken and of the next differ by g
    h + (1 + e) g (w_next - w_last) / |w_next - w_last|^2        takes the next in its place

So a model is asked once more, with one state that a router reads moved by as little. Where its
answer is then the engine's, the engine differs by that choice and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafold.exporting.answers import last

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTER = "TopKRouter"  # ends the names of transformers' routers, which give logits, scores, experts
CLOSE = 0.02  # of logits; a larger difference is no rounding
TRIED = 4
PAST = 1.5  # how far a state is moved, of what makes the two equal


def exchanged(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[Tensor]:
    """Yield the answers of a model with active adapters (vocabulary,) where one token has the next
    expert in place of its last, that with the smallest difference of the two first. Between them
    the model is as it was, however many are taken.
    """
    found: list[tuple[float, nn.Module, int, Tensor]] = []
    routers = [m for m in model.modules() if type(m).__name__.endswith(ROUTER)]
    with ExitStack() as hooks:
        for router in routers:
            hooks.callback(router.register_forward_hook(partial(_note, found)).remove)
        if routers:
            last(model, ids)
    for _, router, at, step in sorted(found, key=lambda one: one[0])[:TRIED]:
        handle = router.register_forward_pre_hook(partial(_moved, at, step))
        try:
            moved = last(model, ids)
        finally:
            handle.remove()
        yield moved


def _note(
    found: list[tuple[float, nn.Module, int, Tensor]], router: nn.Module, _: Any, out: Any
) -> None:
    """Note the tokens with two experts that are close, and what exchanges them."""
    logits, experts = out[0].flatten(0, -2), out[-1].flatten(0, -2)
    taken = experts.shape[-1]
    if taken >= logits.shape[-1]:
        return
    values, order = logits.float().topk(taken + 1, -1)
    gaps = values[:, -2] - values[:, -1]
    weight: Any = router.weight
    for at in (gaps < CLOSE).nonzero().flatten().tolist():
        way = (weight[order[at, -1]] - weight[order[at, -2]]).float()
        found.append((float(gaps[at]), router, at, PAST * gaps[at] * way / (way @ way)))


def _moved(at: int, step: Tensor, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden = given[0].clone()
    hidden.view(-1, hidden.shape[-1])[at] += step.to(hidden.dtype)
    return (hidden, *given[1:])
