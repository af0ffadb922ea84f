"""AdamW whose updates to 16-bit parameters are computed in fp32 and rounded stochastically.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2                      fp32, of the shape of W
    W = round((1 - lr wd) W - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps))

Loshchilov & Hutter 2019, arXiv 1711.05101; rounded by `core.rounding.turned`. At a learning rate of
1e-5 nearly every update of a bf16 weight is under half a unit in the last place. torch's AdamW
loses such updates: it rounds to the nearest, and stores its moments in the dtype of the weights.

Use it wherever 16-bit parameters are trained: a weight takes 2 bytes and its moments 8, without a
master copy or a compensation term. The random numbers follow from the seed, the parameter's number
and the step, so a checkpoint stores no random state and no other generator is used. Parameters in
fp32 are updated as torch's AdamW updates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lorafold.core.rounding import generator_of, turned
from lorafold.step.optim import parameters

MOMENTS = "exp_avg", "exp_avg_sq"  # torch's names
# elements that are updated at a time, with some 20 bytes each: on the CPU they fit a core's cache
CHUNKS = {"cpu": 1 << 16}
CHUNK = 1 << 22


class RoundedAdamW(Optimizer):
    """AdamW with stochastic rounding of 16-bit parameters. Its options and state have the names of
    torch's AdamW; each group also has the seed of the rounding. The moments of 16-bit parameters
    are in fp32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        fused: bool = False,
        seed: int = 0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options | {"fused": fused, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once; return the loss of `closure`, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers = {p: i for i, p in enumerate(parameters(self))}
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            _adamw(group, [(p, p.grad, *self._state(p, group)) for p in found if not narrow(p)])
            for p in filter(narrow, found):
                _update(group, numbers[p], (p, p.grad, *self._state(p, group)))
        return loss

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameter's two moments and the number of its steps, made anew if needed."""
        state = self.state[p]
        if not state and narrow(p):
            # contiguous, as the chunks are; the number of steps on the CPU, where it is read
            state["step"] = torch.zeros(())
            for name in MOMENTS:
                state[name] = torch.zeros(p.shape, device=p.device)
        elif not state:
            state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(p)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, whose moments keep their dtypes."""
        super().load_state_dict(state_dict)
        # torch has just cast the moments to the dtype of their parameter
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(parameters(self), keys, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[p][name] = value.to(self.state[p][name].device, copy=True)


def narrow(p: Tensor) -> bool:
    """Tell whether a tensor of any shape has 16-bit elements."""
    return p.element_size() == 2


def _adamw(group: dict[str, Any], parts: Sequence[tuple[Tensor, ...]]) -> None:
    """Update (parameter, gradient, moment, moment, steps done) tuples in place, as torch does."""
    if not parts:
        return
    params, grads, first, second, steps = map(list, zip(*parts, strict=True))
    beta1, beta2 = group["betas"]
    adamw(
        params, grads, first, second, [], steps, fused=group["fused"], amsgrad=False,
        beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
        eps=group["eps"], maximize=False,
    )  # fmt: skip


def _update(group: dict[str, Any], number: int, parts: tuple[Tensor, ...]) -> None:
    """Update one such tuple, of a 16-bit parameter, some slices along its first axis at a time."""
    p, g, m, v, step = parts
    generator = generator_of(group["seed"], str(number), p.device)
    tensors = [torch.atleast_1d(t) for t in (p, g, m, v)]
    # slices in fours, since four values share a random draw: so the result does not depend on the
    # size of the chunks
    chunk = CHUNKS.get(p.device.type, CHUNK)
    slices = max(1, chunk * len(tensors[0]) // max(1, 4 * p.numel())) * 4
    for w, g_part, *moments in zip(*(t.split(slices) for t in tensors), strict=True):
        wide, grad = (
            t.to(torch.float32, memory_format=torch.contiguous_format) for t in (w, g_part)
        )
        done = torch.full((), step.item(), device=p.device if group["fused"] else "cpu")
        _adamw(group, [(wide, grad, *moments, done)])
        w.copy_(turned(wide, p.dtype, generator, int(step)))
    step += 1
