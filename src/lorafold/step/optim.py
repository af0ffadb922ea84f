"""What any optimizer of an adapter is given and gives back: groups with a learning rate each, the
schedule, and its state in a checkpoint.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns lambda = 16 times as fast as A, for every
low-rank method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafold.core.delta import Delta
from lorafold.errors import LorafoldError
from lorafold.step.recipe import Recipe


def param_groups(parts: Iterable[tuple[str, Delta]], lr: float, lr_up: float) -> list[dict]:
    """Two groups, by the role that each delta gives its own parameters: up factors, and everything
    else.
    """
    up: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for _, delta in parts:
        for name, p in delta.named_parameters():
            # a choice of entries may leave a matrix none, and CUDA launches no kernel over nothing
            if p.requires_grad and p.numel():
                (up if name in delta.up_names else rest).append(p)
    groups = ({"params": rest, "lr": lr, "peak": lr}, {"params": up, "lr": lr_up, "peak": lr_up})
    return [g for g in groups if g["params"]]


def set_learning_rates(optimizer: Optimizer, recipe: Recipe, step: int, steps: int) -> None:
    """Each group's peak rate times the schedule at `step` (from 0) of `steps`: a function of the
    step, so nothing to resume.

    Linear warm-up over the first `warmup` share of the steps (rounded up), then cosine or linear to
    zero, or constant.
    """
    warm = math.ceil(recipe.warmup * steps)
    done = (step - warm) / max(1, steps - warm)
    after = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[
        recipe.schedule
    ]
    factor = (step + 1) / (warm + 1) if step < warm else after
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors `<parameter number>.<name>`: what a checkpoint holds.

    A number is a tensor without dimensions, and a tensor that parameters share is there once, with
    the first of them.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for i, p in enumerate(parameters(optimizer)):
        for name, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor):
                found[f"{i}.{name}"] = torch.tensor(value)
            elif id(value) not in seen:
                seen.add(id(value))
                found[f"{i}.{name}"] = value
    return found


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer over the same parameters that has made
    no step.

    It first makes a state of its own, by a step that changes nothing since rates and gradients are
    zero; that one is filled. So every tensor lies where this optimizer puts it: load_state_dict
    would cast it, or take it out of paged memory. LorafoldError if the tensors are those of another
    optimizer.
    """
    owners = {int(key.split(".")[0]) for key in tensors}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for i, p in enumerate(parameters(optimizer)):
        p.grad = torch.zeros_like(p) if i in owners else None
    optimizer.step()
    optimizer.zero_grad()
    own = optimizer_tensors(optimizer)
    shapes, found = ({key: tuple(t.shape) for key, t in of.items()} for of in (own, tensors))
    if wrong := [
        key for key in sorted(shapes.keys() | found.keys()) if shapes.get(key) != found.get(key)
    ]:
        listed = "; ".join(
            f"{key}: expected {shapes.get(key, 'none')}, found {found.get(key, 'none')}"
            for key in wrong
        )
        raise LorafoldError(f"the checkpoint's optimizer state is of another optimizer: {listed}")
    for i, p in enumerate(parameters(optimizer)):
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if (stored := tensors.get(f"{i}.{name}")) is not None:
                state[name] = value.copy_(stored) if isinstance(value, Tensor) else stored.item()


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def rng_state() -> dict[str, Tensor]:
    """The states of torch's generators, on CPU and on CUDA where there is one."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"rng.cpu": torch.get_rng_state()} | {f"rng.cuda.{i}": s for i, s in enumerate(cuda)}


def restore_rng(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if (state := tensors.get(f"rng.cuda.{i}")) is not None:
            torch.cuda.set_rng_state(state, i)
