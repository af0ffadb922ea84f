"""Who updates which of the parameters that are whole in every process, and has their moments (the
scheme of ZeRO, stage 1: Rajbhandari et al. 2020, arXiv 1910.02054).

    moments.share_out(parameters)
    with moments.updating():
        optimizer.step()            of those that are this process's; afterwards all have all

Every process has the sum of all gradients, so what one computes is what each would have computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lorafold.machine.processes import Processes


class Moments:
    """The processes by the parameters that each updates; a parameter of no process is all's."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._of: dict[nn.Parameter, int] = {}

    def share_out(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have each parameter, of any shape, updated by one process."""
        self._of = balanced(parameters, self.processes.count)

    def mine(self, p: nn.Parameter) -> bool:
        """Whether this process updates a parameter of any shape."""
        return self._of.get(p, self.processes.index) == self.processes.index

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Let an optimizer see the gradients of this process's parameters alone in the `with`
        block, and give all processes what each has updated.
        """
        learned = [p for p in self._of if p.grad is not None]
        others = [(p, p.grad) for p in learned if not self.mine(p)]
        for p, _ in others:
            p.grad = None
        yield
        for p, grad in others:
            p.grad = grad
        for owner in range(self.processes.count):
            self.processes.same([p.detach() for p in learned if self._of[p] == owner], owner)


def balanced(parameters: Iterable[nn.Parameter], count: int) -> dict[nn.Parameter, int]:
    """The process, of so many, that has each parameter: the largest first, each goes to the one
    that has least.
    """
    loads, chosen = [0] * count, dict[nn.Parameter, int]()
    for p in sorted(parameters, key=lambda p: -p.nbytes):
        chosen[p] = loads.index(min(loads))
        loads[chosen[p]] += p.nbytes
    return chosen
