"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with fp32 or 8-bit moments, and with
stochastic rounding of 16-bit parameters.

    adamw             fp32 moments, 8 bytes per parameter: torch's AdamW, or `RoundedAdamW` for
                      16-bit parameters
    adamw8bit         bitsandbytes: 8-bit moments with an fp32 scale per block of 256, 2.03 bytes
                      per parameter (fp32 moments for tensors under 4,096 elements)
    paged-adamw8bit   adamw8bit with moments in paged memory (for tensors of 100,000 or more
                      elements)

Dettmers et al. 2022, arXiv 2110.02861 (8 bits); Dettmers et al. 2023, arXiv 2305.14314, sec. 3
(paging).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from lorafold.core.rounding import generator_of, turn_rounded
from lorafold.errors import LorafoldError
from lorafold.files.terminal import format_bytes
from lorafold.layers.bitsandbytes import import_bitsandbytes
from lorafold.runtime.memory import free_bytes
from lorafold.runtime.processes import Processes
from lorafold.training_step.param_groups import parameters

PAGED = "paged-adamw8bit"
MIN_8BIT_SIZE = 4096  # bitsandbytes stores the moments of smaller tensors in fp32
# fp32 moments may take a third of the free memory: gradients take another sixth, and half of the
# memory is left for activations
MEMORY_SHARE = 3
DEVICES = {"cpu": "the CPU", "mps": "MPS"}


class OptimizerChoice(NamedTuple):
    """An optimizer's name, and a note on the choice, which may be empty."""

    name: str
    why: str


def choose_adamw(parameters: int, device: str, free: int) -> OptimizerChoice:
    state, share = 8 * parameters, f"a third of the free {format_bytes(free)}"
    if device != "cuda":
        return OptimizerChoice("adamw", f"{DEVICES.get(device, device)} does not support paging")
    if MEMORY_SHARE * state <= free:
        return OptimizerChoice("adamw", f"within {share}")
    return OptimizerChoice(PAGED, f"fp32 state would take {format_bytes(state)}, more than {share}")


def choose_optimizer(
    name: str, before: str, groups: list[dict], where: torch.device, processes: Processes,
    parts: int = 1,
) -> OptimizerChoice:  # fmt: skip
    """Chooses a run's optimizer. `auto` depends on free memory, so a resumed run keeps its
    optimizer. `parts` is the number of processes over which the optimizer's state is sharded.
    """
    device, trained = where.type, parameters(groups)
    if name != "auto":
        choice = OptimizerChoice(name, "")
    elif before:
        choice = OptimizerChoice(before, "as before the resume")
    elif any(p.itemsize == 2 for p in trained):
        choice = OptimizerChoice("adamw", "16-bit weights are trained")
    else:
        # the smallest free memory decides, so that all processes choose the same optimizer
        free = min(processes.gather(free_bytes(where)))
        choice = choose_adamw(sum(p.numel() for p in trained) // parts, device, free)
    if choice.name == PAGED and device != "cuda":
        return OptimizerChoice(PAGED, f"not paged: not supported on {DEVICES.get(device, device)}")
    return choice


def make_optimizer(name: str, groups: list[dict], recipe: Any) -> Optimizer:
    trained = parameters(groups)
    check_rounding(name, (p.dtype for p in trained))
    options = {key: getattr(recipe, key) for key in ("betas", "eps", "weight_decay")}
    if name == "adamw":
        options["fused"] = all(p.device.type in ("cpu", "cuda") for p in trained)
        if any(p.itemsize == 2 for p in trained):
            return RoundedAdamW(groups, seed=recipe.seed, **options)
        return AdamW(groups, **options)
    optim = bitsandbytes_optimizers(name)
    # on other devices, bitsandbytes warns and does not page
    paged = name == PAGED and all(p.is_cuda for p in trained)
    return (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **options)


def check_rounding(name: str, dtypes: Iterable[torch.dtype]) -> None:
    """Rejects 8-bit optimizers for 16-bit parameters, because rounding to nearest loses small
    updates.
    """
    narrow = sorted({str(t).removeprefix("torch.") for t in dtypes if t.itemsize == 2})
    if name not in ("auto", "adamw") and narrow:
        raise LorafoldError(
            f"optimizer {name} rounds to nearest, so weights in {' and '.join(narrow)} would lose"
            " updates below half a unit in the last place; use optimizer adamw or quantization fp32"
        )


def bitsandbytes_optimizers(name: str) -> Any:
    try:
        return import_bitsandbytes().optim
    except ImportError as error:
        raise LorafoldError(
            f"optimizer {name} needs bitsandbytes, which can't be imported ({error});"
            " pip install bitsandbytes, or choose optimizer adamw"
        ) from None


def optimizer_line(choice: OptimizerChoice, groups: list[dict], seed: int, parts: int = 1) -> str:
    trained, is_8bit = parameters(groups), choice.name != "adamw"
    is_small = is_8bit and all(p.numel() < MIN_8BIT_SIZE for p in trained)
    size = f"all tensors have fewer than {MIN_8BIT_SIZE:,} elements" * is_small
    reasons = "; ".join(filter(None, (choice.why, size)))
    return (
        f"optimizer: {choice.name} with {'8-bit' if is_8bit and not is_small else 'fp32'} state,"
        f" {format_bytes(state_bytes(choice.name, trained))}"
        + f" across {parts} processes" * (parts > 1)
        + f" ({reasons})" * bool(reasons)
        + f"; updates rounded stochastically, seed {seed}" * any(p.itemsize == 2 for p in trained)
    )


def state_bytes(name: str, parameters: Sequence[Tensor]) -> int:
    """The size in bytes of AdamW's two moments, for parameters of any shapes."""
    sizes = [p.numel() for p in parameters]
    whole = name == "adamw"
    return sum(8 * n if whole or n < MIN_8BIT_SIZE else 2 * n + 8 * ceil(n / 256) for n in sizes)


MOMENTS = "exp_avg", "exp_avg_sq"  # the keys in torch's optimizer state
# elements updated at a time, about 20 bytes each: on the CPU they fit into a core's cache
CHUNKS = {"cpu": 1 << 16}
CHUNK = 1 << 22


class RoundedAdamW(Optimizer):
    """AdamW for 16-bit parameters, which computes updates in fp32 and rounds the parameters
    stochastically with `core.rounding.turn_rounded`. At a learning rate of 1e-5, nearly every
    update of a bf16 weight is below half a unit in the last place, so rounding to nearest would
    lose it. Options and state have the same names as in torch's AdamW. The random numbers depend
    only on `seed`, the parameter's index and the step, so checkpoints contain no random state.
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
        with torch.enable_grad():
            loss = None if closure is None else closure()
        numbers = {p: i for i, p in enumerate(parameters(self.param_groups))}
        for group in self.param_groups:
            learned = [p for p in group["params"] if p.grad is not None]
            parts = {p: (p, p.grad, *self._state(p, group)) for p in learned}
            _adamw(group, [part for p, part in parts.items() if p.itemsize != 2])
            for p, part in parts.items():
                if p.itemsize == 2:
                    _update(group, numbers[p], part)
        return loss

    def _state(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        state, narrow = self.state[p], p.itemsize == 2
        if not state:
            # for 16-bit parameters, Python reads the step count, so it stays on the CPU; their
            # moments are contiguous, like the chunks
            on_device = group["fused"] and not narrow
            state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
            for name in MOMENTS:
                fresh = torch.zeros(p.shape, device=p.device) if narrow else torch.zeros_like(p)
                state[name] = fresh
        return state["exp_avg"], state["exp_avg_sq"], state["step"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # torch has cast the fp32 moments to the dtype of their parameter, so copy them again
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(parameters(self.param_groups), keys, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                self.state[p][name] = value.to(self.state[p][name].device, copy=True)


def _adamw(group: dict[str, Any], parts: Sequence[tuple[Tensor, ...]]) -> None:
    """Runs torch's AdamW in place on tuples (parameter, gradient, first moment, second moment, step
    count).
    """
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
    """Updates a 16-bit parameter in chunks along its first axis."""
    p, g, m, v, step = parts
    generator = generator_of(group["seed"], str(number), p.device)
    tensors = [torch.atleast_1d(t) for t in (p, g, m, v)]
    # multiples of four slices, because four values share a random number: otherwise the result
    # would depend on the chunk size
    chunk = CHUNKS.get(p.device.type, CHUNK)
    slices = max(1, chunk * len(tensors[0]) // max(1, 4 * p.numel())) * 4
    for w, g_part, *moments in zip(*(t.split(slices) for t in tensors), strict=True):
        wide, grad = (
            t.to(torch.float32, memory_format=torch.contiguous_format) for t in (w, g_part)
        )
        done = torch.full((), step.item(), device=p.device if group["fused"] else "cpu")
        _adamw(group, [(wide, grad, *moments, done)])
        w.copy_(turn_rounded(wide, p.dtype, generator, int(step)))
    step += 1
