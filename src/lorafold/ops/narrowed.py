"""Copies of trained factors in the dtype of products, on a GPU made for all layers at once.

    k x                             multiplied in fp32 and rounded once, as `arithmetic.times` does

A layer of low rank multiplies in 16 bits with factors that are stored in fp32. Cast where they are
used, they are two launches in each layer and micro-batch. No factor changes between two updates of
the optimizer (`core.unchanged`), so the first copy that is asked for in a step has all made again
that the step before asked for, in a few launches for the whole model. A backward reads what its
forward made. Outside of such a scope, and on a CPU, each is made where it is used.
"""

from __future__ import annotations

import weakref
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lorafold.core.unchanged import Scope, in_backward, scope
from lorafold.ops.arithmetic import times

Form = tuple[float, torch.dtype]


class _Copy:
    """k x in a dtype, and the scopes for which it was made and last asked for."""

    def __init__(self, x: Tensor, form: Form, family: _Family) -> None:
        self.factor, self.form, self.family = weakref.ref(x), form, family
        self.value = times(x.detach(), *form)
        self.made = self.asked = family.during


class _Family:
    """The copies that are made together, which one step asked for."""

    def __init__(self, during: Scope) -> None:
        self.during = during
        self.copies: list[_Copy] = []

    def renew(self, during: Scope) -> None:
        """Make again, for another scope, what the last one asked for, and forget the rest."""
        alive = {c: x for c in self.copies if (x := c.factor()) is not None}
        self.copies = [c for c in alive if c.asked is self.during]
        self.during = during
        for form in dict.fromkeys(c.form for c in self.copies):
            same = [c for c in self.copies if c.form == form]
            sources = [alive[c].detach() for c in same]
            scaled = sources if form[0] == 1.0 else torch._foreach_mul(sources, form[0])
            torch._foreach_copy_([c.value for c in same], scaled)
        for copy in self.copies:
            copy.made = during


_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # factor -> {form: its copy}
_families: WeakKeyDictionary[Scope, _Family] = WeakKeyDictionary()


def narrowed(x: Tensor, k: float, dtype: torch.dtype) -> Tensor:
    """k x, of any shape, in a dtype; x itself where that is the same. Not differentiable.

    Args:
        x: a factor, of which the same tensor is asked for at every step.
    """
    if k == 1.0 and x.dtype is dtype:
        return x
    during = scope()
    if not (x.is_cuda and x.is_leaf) or (during is None and not in_backward()):
        return times(x, k, dtype)
    forms: dict[Form, _Copy] = _copies.setdefault(x, {})
    copy = forms.get((k, dtype))
    if during is None:  # in a backward, which does not know of the scope
        return copy.value if copy is not None and copy.made.open else times(x, k, dtype)
    if copy is not None and copy.family.during is not during:
        copy.family.renew(during)
    if copy is None or copy.made is not during:
        family = _families.setdefault(during, _Family(during))
        forms[k, dtype] = copy = _Copy(x, (k, dtype), family)
        family.copies.append(copy)
    copy.asked = during
    return copy.value
