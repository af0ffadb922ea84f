"""The parameters of a model with adapters folded in, computed one at a time.

    W' = fold_n(... fold_1(W)) in fp32, rounded by whoever writes it, once

W is what the adapters were trained on, where the round trip (`merging.into`) is attached.

Tied parameters are one, under the first of their names, unless adapters change them in different
ways: then there are both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from lorafold.core.attach import Adapted
from lorafold.core.matrices import module_at
from lorafold.errors import NotMergeable, listed
from lorafold.fold.as_trained import ROUND_TRIP
from lorafold.fold.plan import FoldPlan, plan_fold
from lorafold.merging.folding import before_and_after
from lorafold.models.converted import OnDemand

DELTAS = ".deltas."


@dataclass(frozen=True)
class Folded:
    """A parameter: its dotted name, its shape, and its values when they are asked for."""

    path: str
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    def part(self, shape: Sequence[int], of: Callable[[Tensor], Tensor]) -> Folded:
        """What a function makes of the values (*, in), or (n,) of a vector.

        Args:
            shape: of what it makes.
        """
        return Folded(self.path, tuple(shape), lambda: of(self.values()))


def folded(model: nn.Module, names: Sequence[str]) -> Iterator[Folded]:
    """The parameters of a model under adapters; the model is not changed.

    Raises NotMergeable with every reason for which they have no form in weight space.

    Args:
        names: of the adapters, lowest first.
    """
    plan = plan_fold(model, (ROUND_TRIP, *names))
    if plan.problems:
        raise NotMergeable(listed((f"{path}: {why}" for path, why in plan.problems), "; "))
    apart = {name for first, others in plan.apart.items() for name in (first, *others)}
    seen: set[int] = set()
    left = dict(plan.shapes)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if DELTAS in path or (id(parameter) in seen and path not in apart):
            left.pop(path, None)
            continue
        seen.add(id(parameter))
        own = tuple(parameter.shape)
        if path in plan.shapes:
            yield Folded(path, left.pop(path), partial(_changed, model, plan, path, names))
        else:
            yield Folded(path, own, partial(_same, parameter))
    for path, shape in left.items():  # biases that there were not
        yield Folded(path, shape, partial(_changed, model, plan, path, names))


def _changed(model: nn.Module, plan: FoldPlan, name: str, names: Sequence[str]) -> Tensor:
    path, leaf = plan.sites[name]
    module: Adapted = module_at(model, path)  # type: ignore[assignment]
    return before_and_after(module, names, leaf)[1]


def _same(parameter: Tensor) -> Tensor:
    return parameter.make() if isinstance(parameter, OnDemand) else parameter
