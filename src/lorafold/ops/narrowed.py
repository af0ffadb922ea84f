"""Copies of trained factors in the dtype of products, on a GPU made for all layers at once.

    k x                             multiplied in fp32 and rounded once, as `arithmetic.times` does

A layer of low rank multiplies in 16 bits with factors that are stored in fp32. Cast where they are
used, they are two launches in each layer and micro-batch. No factor changes between two updates of
the optimizer (`core.modes`), so the first copy that is asked for in a step has all made again
that the step before asked for, in a few launches for the whole model. A backward reads what its
forward made. Outside of such a scope, and on a CPU, each is made where it is used.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lorafold.core.modes import Scope, in_backward, scope
from lorafold.ops.arithmetic import times

Form = tuple[float, torch.dtype]


class _Copy:
    """k x in a dtype, and the scopes for which it was made and last asked for."""

    def __init__(self, x: Tensor, form: Form, family: _Family) -> None:
        self.factor, self.form, self.family = weakref.ref(x), form, family
        self.value = times(x.detach(), *form)
        self.made = self.asked = family.during


class _Family:
    """The copies that are made together, which one step asked for; each lives with its factor."""

    def __init__(self, during: Scope) -> None:
        self.during = during
        self.copies: list[weakref.ref[_Copy]] = []

    def renew(self, during: Scope) -> None:
        """Make again, for another scope, what the last one asked for, and forget the rest."""
        found = [(c, x) for ref in self.copies if (c := ref()) and (x := c.factor()) is not None]
        asked = [(c, x) for c, x in found if c.asked is self.during]
        for copy, x in found:
            if copy.asked is not self.during:
                _copies[x].pop(copy.form)
        self.during, self.copies = during, [weakref.ref(c) for c, _ in asked]
        for form in dict.fromkeys(c.form for c, _ in asked):
            values, sources = zip(
                *((c.value, x.detach()) for c, x in asked if c.form == form), strict=True
            )
            scaled = sources if form[0] == 1.0 else torch._foreach_mul(sources, form[0])
            torch._foreach_copy_(values, scaled)
        for copy, _ in asked:
            copy.made = during


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # factor -> {form: its copy}


def narrowed(x: Tensor, k: float, dtype: torch.dtype) -> Tensor:
    """k x, of any shape, in a dtype; x itself where that is the same. Not differentiable.

    Args:
        x: a factor; a parameter is asked for at every step.
    """
    if k == 1.0 and x.dtype is dtype:
        return x
    kept = x.is_cuda and isinstance(x, nn.Parameter) and not torch.compiler.is_compiling()
    during = scope() if kept else None
    if not kept or (during is None and not in_backward()):
        return times(x.detach(), k, dtype)
    forms: dict[Form, _Copy] = _copies.setdefault(x, {})
    copy = forms.get((k, dtype))
    if during is None:  # in a backward, which does not know of the scope
        return copy.value if copy is not None and copy.made.open else times(x.detach(), k, dtype)
    if copy is not None and copy.family.during is not during:
        copy.family.renew(during)
    if copy is None or copy.made is not during:
        family: _Family = during.kept.setdefault(_Family, _Family(during))
        forms[k, dtype] = copy = _Copy(x, (k, dtype), family)
        family.copies.append(weakref.ref(copy))
    copy.asked = during
    return copy.value
