"""Copies of factors in 16 bits are what the factors are now, and are made together."""

import contextvars
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.contexts import unchanged
from lorafold.ops.arithmetic import _copies, scaled_as
from shadow import Device, Shadow

FORM = 0.3, torch.bfloat16


def expected(x: Tensor) -> Tensor:
    return (0.3 * x.host).bfloat16()  # type: ignore[attr-defined]


def test_a_step_has_the_factors_of_that_step_and_makes_them_together() -> None:
    with Device() as device:
        factors = [nn.Parameter(Shadow(torch.randn(3, n))) for n in range(1, 6)]
        for step in range(3):
            with unchanged(), device.counting() as found:
                for x in factors:
                    assert torch.equal(scaled_as(x, *FORM).host, expected(x))
                    assert scaled_as(x, *FORM) is scaled_as(x, *FORM)
            assert found.launches.total() == (len(factors) if step == 0 else 2)
            for x in factors:
                x.data.mul_(1.5)
                assert torch.equal(scaled_as(x, *FORM).host, expected(x))  # outside of a step
        with unchanged():  # what is asked for no longer is not made again
            scaled_as(factors[0], *FORM)
        with unchanged(), device.counting() as found:
            scaled_as(factors[1], *FORM)
            assert scaled_as(factors[0], *FORM) is scaled_as(factors[0], *FORM)
        assert found.launches.total() <= 3


class Replayed(torch.autograd.Function):
    """Asks for a factor in its backward, as a checkpointed block does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.factor, ctx.seen = factor, seen
        return x.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append(scaled_as(ctx.factor, *FORM))
        return g.expand(4), None, None


def test_a_backward_reads_what_its_forward_made_and_nothing_older() -> None:
    with Device():
        factor, seen = nn.Parameter(Shadow(torch.randn(4))), list[Tensor]()
        x = Shadow(torch.ones(4)).requires_grad_()
        with unchanged():
            made = scaled_as(factor, *FORM)
            losses = [Replayed.apply(x, factor, seen) for _ in range(2)]
            contextvars.Context().run(losses[0].backward)  # a thread of autograd has no scope
        assert seen[0] is made
        factor.data.mul_(2)
        losses[1].backward()
        assert torch.equal(seen[1].host, expected(factor))  # type: ignore[attr-defined]


def test_copies_end_with_their_factors() -> None:
    with Device():
        copies = list[weakref.ref[Tensor]]()
        for _ in range(3):
            factor = nn.Parameter(Shadow(torch.randn(4)))
            for _ in range(2):
                with unchanged():
                    copies.append(weakref.ref(scaled_as(factor, *FORM)))
                    scaled_as(factor * 2, *FORM)  # what a method computes from it is not kept
            del factor
        assert [ref() for ref in copies] == [None] * 6
        assert not _copies
